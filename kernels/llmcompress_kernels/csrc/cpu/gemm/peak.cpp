// How many byte products this machine multiplies and adds in a second, from registers: the roof that every product with
// many tokens is measured against.
#include <omp.h>

#include <cstdint>

#include "llmcompress/target.h"

#ifdef __x86_64__
#include <immintrin.h>

namespace {

// Sixteen sums that do not wait for one another.
LLMCOMPRESS_TARGET("avx512f,avx512vnni")
int64_t wide_products(int64_t turns) {
    __m512i sums[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sums[i] = _mm512_set1_epi32(i);
    const __m512i codes = _mm512_set1_epi32(0x01020304), x = _mm512_set1_epi32(0x01010101);
    for (int64_t turn = 0; turn < turns; ++turn)
#pragma GCC unroll 16
        // as in lanes_avx512.h: the intrinsic would move registers as well
        for (int i = 0; i < 16; ++i) asm("vpdpbusd %2, %1, %0" : "+v"(sums[i]) : "v"(codes), "v"(x));
#pragma GCC unroll 16
    for (int i = 1; i < 16; ++i) sums[0] = _mm512_add_epi32(sums[0], sums[i]);
    return _mm512_reduce_add_epi32(sums[0]);
}
LLMCOMPRESS_TARGET_END

LLMCOMPRESS_TARGET("avx2")
// Multiplications alone, whose sums of pairs another instruction has to add up: more than any product reaches. 16 products of
// numbers of 16 bits, which lanes_avx2.h makes of two planes, are an instruction of the same units.
int64_t products(int64_t turns) {
    __m256i pairs[12];
    const __m256i codes = _mm256_set1_epi32(0x01020304), x = _mm256_set1_epi32(0x01010101);
    for (int64_t turn = 0; turn < turns; ++turn)
#pragma GCC unroll 12
        for (int i = 0; i < 12; ++i) asm volatile("vpmaddubsw %2, %1, %0" : "=x"(pairs[i]) : "x"(codes), "x"(x));
    int64_t sum = 0;
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) sum += _mm256_extract_epi16(pairs[i], 0);
    return sum;
}
LLMCOMPRESS_TARGET_END

bool has_vnni() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni"); }
bool has_avx2() { return __builtin_cpu_supports("avx2"); }

}  // namespace
#else
static int64_t wide_products(int64_t) { return 0; }
static int64_t products(int64_t) { return 0; }
static bool has_vnni() { return false; }
static bool has_avx2() { return false; }
#endif

// Multiplications and additions that `threads` threads make in `turns` turns each; 0 where the CPU has no such
// instruction.
extern "C" __attribute__((visibility("default"))) int64_t llmcompress_byte_products(int threads, int64_t turns) {
    const bool wide = has_vnni();
    if (!wide && !has_avx2()) return 0;
    int64_t sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : sum)
    for (int part = 0; part < threads; ++part) sum += wide ? wide_products(turns) : products(turns);
    // the sum has to be used, or nothing would be computed
    return sum == -1 ? 0 : int64_t(threads) * turns * (wide ? 16 * 64 : 12 * 32) * 2;
}
