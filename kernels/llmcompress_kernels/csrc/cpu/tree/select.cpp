// Which instruction set runs where the low-bit products are not there to choose it (variants.cpp).
#include "llmcompress/isa.h"
#include "llmcompress/tree.h"

namespace llmcompress {
namespace {

const Candidate<TreeVariant> candidates[] = {
#ifdef __x86_64__
    {&avx512_tree, has_avx512},
    {&avx2_tree, has_avx2},
#endif
    {&portable_tree, always},
};

Choice choice(candidates);

}  // namespace

const TreeVariant& tree_variant() { return choice.get(); }

}  // namespace llmcompress

extern "C" __attribute__((visibility("default"))) int llmcompress_select_isa(const char* name) {
    return llmcompress::choice.select(name) ? 1 : 0;
}
