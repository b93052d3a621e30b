// The decode step and prompts for AVX2.
#include "standard.h"
#include "llmcompress/target.h"

LLMCOMPRESS_TARGET("avx2,fma,f16c")
#define LLMCOMPRESS_ISA decode_avx2
#define LLMCOMPRESS_LEVEL 3
#include "prompt.h"
#include "step.h"
LLMCOMPRESS_TARGET_END

namespace llmcompress::decode {
const Workers workers = {
    [](Engine& engine, const Cache& cache, const Step& step, Barrier& barrier, int thread) {
        decode_avx2::Worker(engine, cache, step, barrier, thread).run();
    },
    [](Engine& engine, const Cache& cache, const Prompt& prompt, PromptRoom& room, Barrier& barrier, int thread) {
        decode_avx2::PromptWorker(engine, cache, prompt, room, barrier, thread).run();
    },
};
}  // namespace llmcompress::decode
