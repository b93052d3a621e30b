// The column loop for any machine.
#include <cstring>

#include "columns.h"

#define LLMCOMPRESS_ISA columns_portable
#define LLMCOMPRESS_MANY_REGISTERS false
#include "tile.h"

namespace llmcompress::columns {
void tile_portable(const Problem& p, const Roots& roots, int64_t expert, int64_t first_row, float* scratch) {
    columns_portable::solve_tile(p, roots, expert, first_row, scratch);
}
}  // namespace llmcompress::columns
