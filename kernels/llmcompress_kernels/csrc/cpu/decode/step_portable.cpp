// The decode step and prompts for any machine.
#include "standard.h"

#define LLMCOMPRESS_ISA decode_portable
#define LLMCOMPRESS_LEVEL 0
#include "prompt.h"
#include "step.h"

namespace llmcompress::decode {
const Workers workers = {
    [](Engine& engine, const Cache& cache, const Step& step, Barrier& barrier, int thread) {
        decode_portable::Worker(engine, cache, step, barrier, thread).run();
    },
    [](Engine& engine, const Cache& cache, const Prompt& prompt, PromptRoom& room, Barrier& barrier, int thread) {
        decode_portable::PromptWorker(engine, cache, prompt, room, barrier, thread).run();
    },
};
}  // namespace llmcompress::decode
