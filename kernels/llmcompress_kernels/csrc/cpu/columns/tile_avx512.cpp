// The column loop for AVX-512.
#include <cstring>

#include "columns.h"
#include "llmcompress/target.h"

#ifdef __x86_64__
LLMCOMPRESS_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#define LLMCOMPRESS_ISA columns_avx512
#define LLMCOMPRESS_MANY_REGISTERS true
#include "tile.h"
LLMCOMPRESS_TARGET_END

namespace llmcompress::columns {
void tile_avx512(const Problem& p, const Roots& roots, int64_t expert, int64_t first_row, float* scratch) {
    columns_avx512::solve_tile(p, roots, expert, first_row, scratch);
}
}  // namespace llmcompress::columns
#endif
