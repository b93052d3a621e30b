// Which instruction sets this processor has, and how one of several variants of the same code is chosen by them.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>

namespace llmcompress {

#ifdef __x86_64__
inline bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
// For floating-point code; the integer products need more.
inline bool has_avx512_core() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
inline bool has_avx512() {
    return has_avx512_core() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vbmi2");
}
#endif
inline bool always() { return true; }

template <class V>
struct Candidate {
    const V* variant;
    bool (*runs)();
};

// Variants with a `name`, best first; the last one runs everywhere.
template <class V, size_t N>
class Choice {
public:
    explicit constexpr Choice(const Candidate<V> (&candidates)[N]) : candidates_(candidates) {}

    // By name, or null for the best; false where the processor cannot run it.
    bool select(const char* name) {
        for (const Candidate<V>& c : candidates_) {
            if (name && *name && std::strcmp(name, c.variant->name) != 0) continue;
            if (!c.runs()) continue;
            chosen_ = c.variant;
            return true;
        }
        return false;
    }

    const V& get() {
        // an unknown or impossible wish falls back to the best; the Python side has refused it before
        if (!chosen_ && !select(std::getenv("LLMCOMPRESS_CPU_ISA"))) select(nullptr);
        return *chosen_;
    }

private:
    const Candidate<V> (&candidates_)[N];
    const V* chosen_ = nullptr;
};

}  // namespace llmcompress
