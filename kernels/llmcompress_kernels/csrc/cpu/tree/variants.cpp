// The variant for the instruction set that the low-bit products have chosen.
#include <cstring>

#include "llmcompress/isa.h"
#include "llmcompress/tree.h"

namespace llmcompress {

const TreeVariant& tree_variant() {
#ifdef __x86_64__
    if (std::strcmp(variant().name, "avx512") == 0) return avx512_tree;
    if (is_avx2(variant().name)) return avx2_tree;
#endif
    return portable_tree;
}

}  // namespace llmcompress
