// The kernels for AVX-512 with VNNI. Headers come before the pragma, so that no function that other files
// share is compiled with instructions that the processor may lack.
#include "llmcompress/lowbit.h"
#include "llmcompress/types.h"

#ifdef __x86_64__
#include <immintrin.h>

#include <cmath>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2")
namespace llmcompress {
namespace avx512 {
#include "llmcompress/lanes_avx512.h"
#define LLMCOMPRESS_WIDE_QUANTIZE 64  // columns that quantize_avx512.h takes at once
#include "llmcompress/lowbit.inc"
}  // namespace avx512
const Variant avx512_variant = avx512::variant_called("avx512");
}  // namespace llmcompress
#pragma GCC pop_options
#endif
