// Which instruction set runs where the low-bit products are not there to choose it (variants.cpp).
#include <cstdlib>
#include <cstring>

#include "llmcompress/tree.h"

namespace llmcompress {
namespace {

struct Candidate {
    const TreeVariant* variant;
    bool (*runs)();
};

#ifdef __x86_64__
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vbmi2");
}
#endif
bool always() { return true; }

const Candidate candidates[] = {
#ifdef __x86_64__
    {&avx512_tree, has_avx512},
    {&avx2_tree, has_avx2},
#endif
    {&portable_tree, always},
};

const TreeVariant* chosen = nullptr;

bool select(const char* name) {
    for (const Candidate& c : candidates) {
        if (name && *name && std::strcmp(name, c.variant->name) != 0) continue;
        if (!c.runs()) continue;
        chosen = c.variant;
        return true;
    }
    return false;
}

}  // namespace

const TreeVariant& tree_variant() {
    if (!chosen && !select(std::getenv("LLMCOMPRESS_CPU_ISA"))) select(nullptr);
    return *chosen;
}

}  // namespace llmcompress

extern "C" __attribute__((visibility("default"))) int llmcompress_select_isa(const char* name) {
    return llmcompress::select(name) ? 1 : 0;
}
