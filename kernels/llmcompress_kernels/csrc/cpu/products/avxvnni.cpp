// The kernels for AVX2 with byte products in one instruction: AVX-VNNI, which Intel's processors without AVX-512 have.
//
// Processors with AVX-512 VNNI have the same instruction in another encoding. LLMCOMPRESS_EVEX takes that one, so that what is
// built here can be checked on them: LLMCOMPRESS_CXXFLAGS=-DLLMCOMPRESS_EVEX LLMCOMPRESS_CPU_ISA=avxvnni.
#include "llmcompress/lowbit.h"
#include "llmcompress/target.h"
#include "llmcompress/types.h"

#include <immintrin.h>

#include <cmath>

#ifdef LLMCOMPRESS_EVEX
LLMCOMPRESS_TARGET("avx2,fma,f16c,avx512f,avx512vl,avx512vnni")
#define DOT_BYTES _mm256_dpbusd_epi32
#else
LLMCOMPRESS_TARGET("avx2,fma,f16c,avxvnni")
#define DOT_BYTES _mm256_dpbusd_avx_epi32
#endif
namespace llmcompress {
namespace avxvnni {
#include "llmcompress/lanes_avx2.h"
#include "llmcompress/lowbit.inc"
}  // namespace avxvnni
const Variant llmcompress_products = avxvnni::products;
}  // namespace llmcompress
LLMCOMPRESS_TARGET_END
