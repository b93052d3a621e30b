// Which instruction set runs.
#include "llmcompress/isa.h"
#include "llmcompress/lowbit.h"

namespace llmcompress {
namespace {

const Candidate<Variant> candidates[] = {
#ifdef __x86_64__
    {&avx512_variant, has_avx512},
#ifdef LLMCOMPRESS_AVXVNNI
    {&avxvnni_variant, has_avxvnni},
#endif
    {&avx2_variant, has_avx2},
#endif
#ifdef __aarch64__
    {&neon_variant, has_neon},
#endif
    {&portable_variant, always},
};

Choice choice(candidates);

bool is_amd() {
#ifdef __x86_64__
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") != 0;
#else
    return false;
#endif
}

}  // namespace

const bool unpacks_beside = is_amd();

bool select_variant(const char* name) { return choice.select(name); }

const Variant& variant() { return choice.get(); }

}  // namespace llmcompress

extern "C" __attribute__((visibility("default"))) int llmcompress_select_isa(const char* name) {
    return llmcompress::select_variant(name) ? 1 : 0;
}
extern "C" __attribute__((visibility("default"))) const char* llmcompress_isa() { return llmcompress::variant().name; }
// For families that multiply but are not built with these kernels (cpu/state).
extern "C" __attribute__((visibility("default"))) const void* llmcompress_variant() { return &llmcompress::variant(); }
