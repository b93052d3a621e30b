// The column loop for AVX2.
#include <cstring>

#include "columns.h"
#include "llmcompress/target.h"

#ifdef __x86_64__
LLMCOMPRESS_TARGET("avx2,fma,f16c")
#define LLMCOMPRESS_ISA columns_avx2
#define LLMCOMPRESS_MANY_REGISTERS false
#include "tile.h"
LLMCOMPRESS_TARGET_END

namespace llmcompress::columns {
void tile_avx2(const Problem& p, const Roots& roots, int64_t expert, int64_t first_row, float* scratch) {
    columns_avx2::solve_tile(p, roots, expert, first_row, scratch);
}
}  // namespace llmcompress::columns
#endif
