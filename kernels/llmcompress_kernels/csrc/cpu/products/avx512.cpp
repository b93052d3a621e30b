// The kernels for AVX-512 with VNNI. Headers come before the pragma, so that no function that other files
// share is compiled with instructions that the processor may lack. Compiling them takes so long that 2 and 3 bits are in
// avx512_low.cpp.
#include "llmcompress/lowbit.h"
#include "llmcompress/target.h"
#include "llmcompress/types.h"

#include <immintrin.h>

#include <cmath>

LLMCOMPRESS_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2")
namespace llmcompress {
namespace avx512 {
#include "llmcompress/lanes_avx512.h"
#define LLMCOMPRESS_WIDE_QUANTIZE 64  // columns that quantize_avx512.h takes at once
#define LLMCOMPRESS_BESIDE
#include "llmcompress/lowbit.inc"
}  // namespace avx512
const Variant llmcompress_products = avx512::products;
}  // namespace llmcompress
LLMCOMPRESS_TARGET_END
