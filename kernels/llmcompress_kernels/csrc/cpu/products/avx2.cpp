// The kernels for AVX2. Headers come before the pragma, so that no function that other files
// share is compiled with instructions that the processor may lack.
#include "llmcompress/lowbit.h"
#include "llmcompress/target.h"
#include "llmcompress/types.h"

#include <immintrin.h>

#include <cmath>

LLMCOMPRESS_TARGET("avx2,fma,f16c")
namespace llmcompress {
namespace avx2 {
#include "llmcompress/lanes_avx2.h"
#define LLMCOMPRESS_WIDENED  // of 16 bits, for the widest codes: panel_avx2.h
#include "llmcompress/lowbit.inc"
}  // namespace avx2
const Variant llmcompress_products = avx2::products;
}  // namespace llmcompress
LLMCOMPRESS_TARGET_END
