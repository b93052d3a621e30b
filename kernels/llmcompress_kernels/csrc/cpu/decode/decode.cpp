// C interface of the decode step and of prompts.
#include <omp.h>

#include <memory>

#include "llmcompress/barrier.h"
#include "engine.h"
#include "prompt_room.h"
#include "workers.h"

namespace llmcompress::decode {

namespace {

// What Python holds of a decoder.
struct Handle {
    Engine engine;
    std::unique_ptr<PromptRoom> room;
};

template <class F>
void in_parallel(int threads, F&& work) {
    Barrier barrier;
    if (threads == 1) return work(barrier, 0);
#pragma omp parallel num_threads(threads)
    {
        // the runtime may give fewer threads than asked for
#pragma omp single
        barrier.expect(omp_get_num_threads());
        work(barrier, omp_get_thread_num());
    }
}

}  // namespace
}  // namespace llmcompress::decode

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace llmcompress::decode;
using llmcompress::Barrier;

// The caller keeps everything alive that `model` points to.
EXPORT void* llmcompress_decode_create(const Model* model) { return new Handle{Engine(*model), nullptr}; }

EXPORT void llmcompress_decode_destroy(void* handle) { delete static_cast<Handle*>(handle); }

// Sizes of the structures by which Python checks that it declares the same.
EXPORT int llmcompress_decode_size(int which) {
    const size_t sizes[] = {sizeof(Matrix), sizeof(Layer),  sizeof(Model),      sizeof(Cache),
                            sizeof(Step),   sizeof(Prompt), sizeof(BoundMixers), sizeof(BoundLowStates)};
    return int(sizes[which]);
}

EXPORT void llmcompress_decode_step(void* handle, const Cache* cache, const Step* step) {
    Engine& engine = static_cast<Handle*>(handle)->engine;
    engine.prepare(*step, *cache);
    const BoundMixers* mixers = step->mixers;
    if (mixers != nullptr) mixers->run->prepare(mixers->engine, step->batch, Mixers::STEP, step->threads);
    const auto run = workers.step;
    in_parallel(step->threads, [&](Barrier& barrier, int thread) { run(engine, *cache, *step, barrier, thread); });
    const BoundLowStates* low = cache->low;
    // a step without layers says what a prompt ends with
    const bool ends = step->first_layer < step->last_layer && step->last_layer == engine.m.layer_count;
    if (low != nullptr && ends) low->run->advance(low->held, step->slots, step->batch);
}

EXPORT void llmcompress_decode_prompt(void* handle, const Cache* cache, const Prompt* prompt) {
    auto& [engine, held] = *static_cast<Handle*>(handle);
    if (held == nullptr) held = std::make_unique<PromptRoom>();
    PromptRoom& room = *held;
    room.prepare(engine, *prompt);
    const BoundMixers* mixers = prompt->mixers;
    if (mixers != nullptr) {
        const Mixers::Call what = prompt->start == 0 ? Mixers::PROMPT : Mixers::MORE;
        mixers->run->prepare(mixers->engine, prompt->count, what, prompt->threads);
    }
    const auto run = workers.prompt;
    in_parallel(prompt->threads, [&, &engine = engine](Barrier& barrier, int thread) {
        run(engine, *cache, *prompt, room, barrier, thread);
    });
    if (prompt->count >= SPARED) held.reset();
    if (mixers != nullptr && prompt->last != 0) mixers->run->finish(mixers->engine);
}
