// Nodes of a residual tree for AVX-512 with VNNI. Headers come before the pragma, see cpu/products/avx512.cpp.
#include "llmcompress/tree.h"
#include "llmcompress/target.h"
#include "llmcompress/types.h"

#include <immintrin.h>

LLMCOMPRESS_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2")
namespace llmcompress {
namespace tree_avx512 {
#include "llmcompress/lanes_avx512.h"
#define LLMCOMPRESS_TABLES "tables.inc"
#include "rows.inc"
#undef LLMCOMPRESS_TABLES
}  // namespace tree_avx512
const TreeVariant tree_variant = {tree_avx512::quantize_token, tree_avx512::add_node};
}  // namespace llmcompress
LLMCOMPRESS_TARGET_END
