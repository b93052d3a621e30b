// Nodes of a residual tree without any instruction set in mind.
#include <cmath>

#include "llmcompress/tree.h"
#include "llmcompress/types.h"

namespace llmcompress {
namespace tree_portable {
#include "llmcompress/lanes_portable.h"
#include "rows.inc"
}  // namespace tree_portable
const TreeVariant tree_variant = {tree_portable::quantize_token, tree_portable::add_node};
}  // namespace llmcompress
