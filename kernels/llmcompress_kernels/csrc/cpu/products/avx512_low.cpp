// 2 and 3 bits of avx512.cpp.
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
#include "llmcompress/rows.inc"
template void by_planes<2>(const Weight&, const Chunk*, int64_t, const Activations&, int64_t, int64_t, void*, Type, int64_t);
template void by_planes<3>(const Weight&, const Chunk*, int64_t, const Activations&, int64_t, int64_t, void*, Type, int64_t);
}  // namespace avx512
}  // namespace llmcompress
LLMCOMPRESS_TARGET_END
