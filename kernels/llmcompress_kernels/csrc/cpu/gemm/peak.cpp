// How many byte products this machine multiplies and adds in a second, from registers: the roof that every product with
// many tokens is measured against.
#include <omp.h>

#include <cstdint>

#ifdef __x86_64__
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vnni")
namespace {

// Sixteen sums that do not wait for one another.
int64_t products(int64_t turns) {
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

}  // namespace
#pragma GCC pop_options

static bool has_vnni() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni"); }
#else
static int64_t products(int64_t) { return 0; }
static bool has_vnni() { return false; }
#endif

// Multiplications and additions that `threads` threads make in `turns` turns each; 0 where the CPU has no such
// instruction.
extern "C" __attribute__((visibility("default"))) int64_t llmcompress_byte_products(int threads, int64_t turns) {
    if (!has_vnni()) return 0;
    int64_t sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : sum)
    for (int part = 0; part < threads; ++part) sum += products(turns);
    // the sum has to be used, or nothing would be computed
    return sum == -1 ? 0 : int64_t(threads) * turns * 16 * 64 * 2;
}
