// The column loop for any machine.
#include "columns.h"

#define LLMCOMPRESS_ISA columns_portable
#include "tile.h"

namespace llmcompress::columns {
void tile_portable(const Problem& p, int64_t expert, int64_t first_row, float* scratch) {
    columns_portable::solve_tile(p, expert, first_row, scratch);
}
}  // namespace llmcompress::columns
