// Which instruction sets this processor has.
#pragma once

#ifdef __x86_64__
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>

#include <cstddef>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace llmcompress {

#ifdef __x86_64__
// What compilers have no name for, or only newer ones; whoever asks knows that the system keeps AVX's registers.
inline bool has_f16c() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
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
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
#endif
}
#endif
inline bool has_avx512() {
    return has_avx512_core() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vbmi2");
}
#else
inline bool has_avx512() { return false; }
#endif
#ifdef __aarch64__
// dot products of bytes
inline bool has_neon() {
#ifdef __APPLE__
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has != 0;
#else
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
}
#endif
inline bool always() { return true; }

// Whose cores multiply in two of four vector units (lowbit.h).
inline bool is_amd() {
#ifdef __x86_64__
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") != 0;
#else
    return false;
#endif
}

}  // namespace llmcompress
