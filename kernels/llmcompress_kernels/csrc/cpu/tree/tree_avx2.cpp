// Nodes of a residual tree for AVX2. Headers come before the pragma, see cpu/products/avx2.cpp.
#include "llmcompress/tree.h"
#include "llmcompress/target.h"
#include "llmcompress/types.h"

#include <immintrin.h>

LLMCOMPRESS_TARGET("avx2,fma,f16c")
namespace llmcompress {
namespace tree_avx2 {
#include "llmcompress/lanes_avx2.h"
#define LLMCOMPRESS_TABLES "tables_avx2.inc"
#include "rows.inc"
#undef LLMCOMPRESS_TABLES
}  // namespace tree_avx2
const TreeVariant tree_variant = {tree_avx2::quantize_token, tree_avx2::add_node};
}  // namespace llmcompress
LLMCOMPRESS_TARGET_END
