// The decode step for AVX2.
#include "standard.h"

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define LLMCOMPRESS_ISA decode_avx2
#define LLMCOMPRESS_LEVEL 3
#include "step.h"
#pragma GCC pop_options

namespace llmcompress::decode {
void work_avx2(Engine& engine, const Cache& cache, const Step& step, Barrier& barrier, int thread) {
    decode_avx2::Worker(engine, cache, step, barrier, thread).run();
}
}  // namespace llmcompress::decode
#endif
