// The decode step and prompts for AVX-512.
#include "standard.h"
#include "llmcompress/target.h"

LLMCOMPRESS_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#define LLMCOMPRESS_ISA decode_avx512
#define LLMCOMPRESS_LEVEL 4
#include "prompt.h"
#include "step.h"
LLMCOMPRESS_TARGET_END

namespace llmcompress::decode {
const Workers workers = {
    [](Engine& engine, const Cache& cache, const Step& step, Barrier& barrier, int thread) {
        decode_avx512::Worker(engine, cache, step, barrier, thread).run();
    },
    [](Engine& engine, const Cache& cache, const Prompt& prompt, PromptRoom& room, Barrier& barrier, int thread) {
        decode_avx512::PromptWorker(engine, cache, prompt, room, barrier, thread).run();
    },
};
}  // namespace llmcompress::decode
