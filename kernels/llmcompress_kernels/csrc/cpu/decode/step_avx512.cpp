// The decode step for AVX-512.
#include "standard.h"

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#define LLMCOMPRESS_ISA decode_avx512
#define LLMCOMPRESS_LEVEL 4
#include "step.h"
#pragma GCC pop_options

namespace llmcompress::decode {
void work_avx512(Engine& engine, const Cache& cache, const Step& step, Barrier& barrier, int thread) {
    decode_avx512::Worker(engine, cache, step, barrier, thread).run();
}
}  // namespace llmcompress::decode
#endif
