// C interface of the decode step.
#include <omp.h>

#include <cstring>

#include "llmcompress/barrier.h"
#include "engine.h"

namespace llmcompress::decode {

using Work = void (*)(Engine&, const Cache&, const Step&, Barrier&, int);
void work_portable(Engine&, const Cache&, const Step&, Barrier&, int);
#ifdef __x86_64__
void work_avx2(Engine&, const Cache&, const Step&, Barrier&, int);
void work_avx512(Engine&, const Cache&, const Step&, Barrier&, int);
#endif

namespace {

// the instruction set of the packed products
Work work() {
#ifdef __x86_64__
    if (std::strcmp(variant().name, "avx512") == 0) return work_avx512;
    if (std::strcmp(variant().name, "avx2") == 0) return work_avx2;
#endif
    return work_portable;
}

}  // namespace
}  // namespace llmcompress::decode

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace llmcompress::decode;
using llmcompress::Barrier;

// The caller keeps everything alive that `model` points to.
EXPORT void* llmcompress_decode_create(const Model* model) { return new Engine(*model); }

EXPORT void llmcompress_decode_destroy(void* engine) { delete static_cast<Engine*>(engine); }

// Sizes of the structures by which Python checks that it declares the same.
EXPORT int llmcompress_decode_size(int which) {
    const size_t sizes[] = {sizeof(Matrix), sizeof(Layer), sizeof(Model), sizeof(Cache), sizeof(Step)};
    return int(sizes[which]);
}

EXPORT void llmcompress_decode_step(void* handle, const Cache* cache, const Step* step) {
    Engine& engine = *static_cast<Engine*>(handle);
    engine.prepare(*step, *cache);
    const Work run = work();
    Barrier barrier;
    if (step->threads == 1) return run(engine, *cache, *step, barrier, 0);
#pragma omp parallel num_threads(step->threads)
    {
        // the runtime may give fewer threads than asked for
#pragma omp single
        barrier.expect(omp_get_num_threads());
        run(engine, *cache, *step, barrier, omp_get_thread_num());
    }
}
