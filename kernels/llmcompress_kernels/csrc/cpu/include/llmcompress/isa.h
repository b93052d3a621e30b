// Which instruction sets this processor has, and how one of several variants of the same code is chosen by them.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>

#ifdef __aarch64__
#include <sys/auxv.h>
#endif

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
// older compilers do not know it
#if !defined(__clang__) && __GNUC__ >= 11 || defined(__clang__) && __clang_major__ >= 12
#define LLMCOMPRESS_AVXVNNI
inline bool has_avxvnni() {
#ifdef LLMCOMPRESS_EVEX
    return has_avx512_core() && __builtin_cpu_supports("avx512vnni");
#else
    return has_avx2() && __builtin_cpu_supports("avxvnni");
#endif
}
#endif
inline bool has_avx512() {
    return has_avx512_core() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vbmi2");
}
#endif
#ifdef __aarch64__
// dot products of bytes
inline bool has_neon() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#endif
inline bool always() { return true; }

// For code that multiplies no bytes, AVX-VNNI is AVX2.
inline bool is_avx2(const char* name) { return std::strcmp(name, "avx2") == 0 || std::strcmp(name, "avxvnni") == 0; }

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
        bool known = false;
        for (const Candidate<V>& c : candidates_) {
            if (name && *name && std::strcmp(name, c.variant->name) != 0) continue;
            known = true;
            if (!c.runs()) continue;
            chosen_ = c.variant;
            return true;
        }
        return !known && std::strcmp(name, "avxvnni") == 0 && select("avx2");
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
