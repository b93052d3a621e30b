// The column loop for AVX2.
#include <cstring>

#include "columns.h"

#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define LLMCOMPRESS_ISA columns_avx2
#define LLMCOMPRESS_MANY_REGISTERS false
#include "tile.h"
#pragma GCC pop_options

namespace llmcompress::columns {
void tile_avx2(const Problem& p, const Roots& roots, int64_t expert, int64_t first_row, float* scratch) {
    columns_avx2::solve_tile(p, roots, expert, first_row, scratch);
}
}  // namespace llmcompress::columns
#endif
