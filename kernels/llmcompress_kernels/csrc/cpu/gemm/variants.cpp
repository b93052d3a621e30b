// Which instruction set runs, and where quantized activations lie in memory.
#include <cstdlib>
#include <cstring>

#include "llmcompress/lowbit.h"

namespace llmcompress {
namespace {

struct Candidate {
    const Variant* variant;
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
    {&avx512_variant, has_avx512},
    {&avx2_variant, has_avx2},
#endif
    {&portable_variant, always},
};

const Variant* chosen = nullptr;

}  // namespace

bool select_variant(const char* name) {
    for (const Candidate& c : candidates) {
        if (name && *name && std::strcmp(name, c.variant->name) != 0) continue;
        if (!c.runs()) continue;
        chosen = c.variant;
        return true;
    }
    return false;
}

const Variant& variant() {
    // an unknown or impossible wish falls back to the best; the Python side has refused it before
    if (!chosen && !select_variant(std::getenv("LLMCOMPRESS_CPU_ISA"))) select_variant(nullptr);
    return *chosen;
}

Activations place_activations(const Weight& w, int64_t tokens, int planes, void* memory) {
    const int64_t padded = (tokens + 7) / 8 * 8;
    const int64_t count = chunks(w.bits, w.group, w.columns, nullptr, planes);
    auto at = reinterpret_cast<uintptr_t>(memory);
    const auto take = [&](int64_t bytes) {
        at = (at + 63) / 64 * 64;
        const uintptr_t begin = at;
        at += uintptr_t(bytes);
        return reinterpret_cast<void*>(begin);
    };
    Activations a;
    a.bytes = static_cast<int8_t*>(take(padded * Activations::quads(w.bits, w.columns, w.group) * 4 * planes));
    a.scale = static_cast<float*>(take(padded * count * int64_t(sizeof(float))));
    a.sum = static_cast<float*>(take(padded * count * int64_t(sizeof(float))));
    a.tokens = tokens;
    a.planes = planes;
    a.most = variant().token_block;
    return a;
}

}  // namespace llmcompress

extern "C" __attribute__((visibility("default"))) int llmcompress_select_isa(const char* name) {
    return llmcompress::select_variant(name) ? 1 : 0;
}
extern "C" __attribute__((visibility("default"))) const char* llmcompress_isa() { return llmcompress::variant().name; }
