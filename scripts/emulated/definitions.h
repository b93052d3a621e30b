// Intrinsics of AVX-512 for processors without it, in plain loops, from the pseudo-code of Intel's Intrinsics Guide: those that
// SIMDe lacks, those where it differs (_mm512_scalef_ps loses subnormal numbers, aligned accesses take any address), and those
// where it is a macro, whose every use is compiled anew. check.cpp holds them to a processor that has them, and to SIMDe.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

typedef float Float32s __attribute__((vector_size(64)));
typedef int32_t Int32s __attribute__((vector_size(64)));
typedef uint32_t Uint32s __attribute__((vector_size(64)));
typedef int16_t Int16s __attribute__((vector_size(64)));
typedef uint16_t Uint16s __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(64)));

// never inlined: these files are compiled to be tested, and the compiler is most of the time that this takes
#define EMULATED static __attribute__((noinline, unused))

template <class To>
inline To read(const void* p, int at = 0) {
    To value;
    std::memcpy(&value, static_cast<const char*>(p) + at * sizeof(To), sizeof(To));
    return value;
}
template <class To, class From>
inline To same_bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    return read<To>(&from);
}
// Loads and stores of whole registers that must be aligned to 64 bytes end a program otherwise, as the processor does.
inline void must_be_aligned(const void* p) {
    if (reinterpret_cast<uintptr_t>(p) % 64 != 0) __builtin_trap();
}

EMULATED __m512 mm512_load_ps(const void* p) { return must_be_aligned(p), read<__m512>(p); }
EMULATED __m512i mm512_load_si512(const void* p) { return must_be_aligned(p), read<__m512i>(p); }
EMULATED void mm512_store_ps(void* p, __m512 x) { must_be_aligned(p), std::memcpy(p, &x, 64); }
EMULATED void mm512_store_si512(void* p, __m512i x) { must_be_aligned(p), std::memcpy(p, &x, 64); }
EMULATED __m512 mm512_maskz_loadu_ps(__mmask16 k, const void* p) {
    Float32s r = {};
    for (int i = 0; i < 16; ++i)
        if (k >> i & 1) r[i] = read<float>(p, i);
    return (__m512)r;
}
EMULATED void mm512_mask_storeu_ps(void* p, __mmask16 k, __m512 x) {
    for (int i = 0; i < 16; ++i)
        if (k >> i & 1) std::memcpy(static_cast<char*>(p) + 4 * i, reinterpret_cast<const char*>(&x) + 4 * i, 4);
}
EMULATED void mm512_mask_store_ps(void* p, __mmask16 k, __m512 x) { must_be_aligned(p), mm512_mask_storeu_ps(p, k, x); }
EMULATED void mm256_mask_storeu_epi16(void* p, __mmask16 k, __m256i x) {
    for (int i = 0; i < 16; ++i)
        if (k >> i & 1) std::memcpy(static_cast<char*>(p) + 2 * i, reinterpret_cast<const char*>(&x) + 2 * i, 2);
}

// Conversions; floats become integers by the nearest even one, as the processor's own halves do.
EMULATED __m512 mm512_cvtepi32_ps(__m512i x) { return (__m512)__builtin_convertvector((Int32s)x, Float32s); }
EMULATED __m512i mm512_cvtps_epi32(__m512 x) {
    const __m256i low = _mm256_cvtps_epi32(read<__m256>(&x)), high = _mm256_cvtps_epi32(read<__m256>(&x, 1));
    const __m256i both[2] = {low, high};
    return read<__m512i>(both);
}
EMULATED __m512 mm512_cvtph_ps(__m256i x) {
    const __m256 both[2] = {_mm256_cvtph_ps(read<__m128i>(&x)), _mm256_cvtph_ps(read<__m128i>(&x, 1))};
    return read<__m512>(both);
}
EMULATED __m256i mm512_cvtps_ph(__m512 x, int how) {
    if ((how & ~_MM_FROUND_NO_EXC) != 0) __builtin_trap();  // another rounding than to the nearest is not here
    const __m128i both[2] = {_mm256_cvtps_ph(read<__m256>(&x), 0), _mm256_cvtps_ph(read<__m256>(&x, 1), 0)};
    return read<__m256i>(both);
}
template <class Narrow, class From>
inline __m512i widened(const From& x) {
    Int32s r;
    for (int i = 0; i < 16; ++i) r[i] = read<Narrow>(&x, i);
    return (__m512i)r;
}
EMULATED __m512i mm512_cvtepu16_epi32(__m256i x) { return widened<uint16_t>(x); }
EMULATED __m512i mm512_cvtepi16_epi32(__m256i x) { return widened<int16_t>(x); }
EMULATED __m512i mm512_cvtepu8_epi32(__m128i x) { return widened<uint8_t>(x); }
template <class Narrow, class To>
inline To narrowed(__m512i x) {
    Narrow r[16];
    for (int i = 0; i < 16; ++i) r[i] = Narrow(((Uint32s)x)[i]);
    return read<To>(r);
}
EMULATED __m256i mm512_cvtepi32_epi16(__m512i x) { return narrowed<uint16_t, __m256i>(x); }
EMULATED __m128i mm512_cvtepi32_epi8(__m512i x) { return narrowed<uint8_t, __m128i>(x); }

// Comparisons; only the low bits of a mask have lanes.
inline bool compared(float a, float b, int how) {
    const bool unordered = a != a || b != b;
    switch (how & 15) {
        case _CMP_EQ_OQ: return a == b;
        case _CMP_LT_OS: return a < b;
        case _CMP_LE_OS: return a <= b;
        case _CMP_UNORD_Q: return unordered;
        case _CMP_NEQ_UQ: return !(a == b);
        case _CMP_NLT_US: return !(a < b);
        case _CMP_NLE_US: return !(a <= b);
        case _CMP_ORD_Q: return !unordered;
        case _CMP_EQ_UQ: return unordered || a == b;
        case _CMP_NGE_US: return !(a >= b);
        case _CMP_NGT_US: return !(a > b);
        case _CMP_FALSE_OQ: return false;
        case _CMP_NEQ_OQ: return !unordered && a != b;
        case _CMP_GE_OS: return a >= b;
        case _CMP_GT_OS: return a > b;
        default: return true;
    }
}
EMULATED __mmask16 mm512_cmp_ps_mask(__m512 x, __m512 y, int how) {
    unsigned k = 0;
    for (int i = 0; i < 16; ++i) k |= unsigned(compared(((Float32s)x)[i], ((Float32s)y)[i], how)) << i;
    return __mmask16(k);
}
EMULATED __mmask16 mm512_mask_cmp_ps_mask(__mmask16 k, __m512 x, __m512 y, int how) {
    return k & mm512_cmp_ps_mask(x, y, how);
}
EMULATED __mmask8 mm256_cmp_ps_mask(__m256 x, __m256 y, int how) {
    unsigned k = 0;
    for (int i = 0; i < 8; ++i) k |= unsigned(compared(read<float>(&x, i), read<float>(&y, i), how)) << i;
    return __mmask8(k);
}
EMULATED __mmask8 mm256_cmplt_epu32_mask(__m256i x, __m256i y) {
    unsigned k = 0;
    for (int i = 0; i < 8; ++i) k |= unsigned(read<uint32_t>(&x, i) < read<uint32_t>(&y, i)) << i;
    return __mmask8(k);
}
EMULATED __mmask32 mm512_testn_epi16_mask(__m512i x, __m512i y) {
    const Int16s both = (Int16s)x & (Int16s)y;
    uint32_t k = 0;
    for (int i = 0; i < 32; ++i) k |= uint32_t(both[i] == 0) << i;
    return k;
}
EMULATED __mmask32 mm512_mask_test_epi16_mask(__mmask32 k, __m512i x, __m512i y) {
    return k & ~mm512_testn_epi16_mask(x, y);
}

// Sums of all lanes: halves are added until one is left, the order of GCC's and Clang's.
EMULATED float mm512_reduce_add_ps(__m512 x) {
    float eight[8], four[4];
    for (int i = 0; i < 8; ++i) eight[i] = read<float>(&x, i + 8) + read<float>(&x, i);
    for (int i = 0; i < 4; ++i) four[i] = eight[i + 4] + eight[i];
    return (four[0] + four[2]) + (four[1] + four[3]);
}
EMULATED int mm512_reduce_add_epi32(__m512i x) {
    uint32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += read<uint32_t>(&x, i);
    return int(sum);
}
EMULATED float mm512_reduce_max_ps(__m512 x) {
    float most = read<float>(&x);
    for (int i = 1; i < 16; ++i) most = read<float>(&x, i) > most ? read<float>(&x, i) : most;
    return most;
}
EMULATED unsigned mm512_reduce_max_epu32(__m512i x) {
    uint32_t most = 0;
    for (int i = 0; i < 16; ++i) most = read<uint32_t>(&x, i) > most ? read<uint32_t>(&x, i) : most;
    return most;
}

// Floats. Of the reciprocal the processor promises a relative error of at most 2^-14, so here it is nearly that.
EMULATED __m512 mm512_rcp14_ps(__m512 x) {
    Uint32s r;
    for (int i = 0; i < 16; ++i) {
        r[i] = same_bits<uint32_t>(1.0f / read<float>(&x, i));
        if ((r[i] & 0x7f800000) != 0x7f800000) r[i] = (r[i] + 0x1ff) & ~0x3ffu;
    }
    return (__m512)r;
}
EMULATED __m512 mm512_scalef_ps(__m512 x, __m512 y) {
    Float32s r;
    for (int i = 0; i < 16; ++i) {
        const float n = read<float>(&y, i);
        // in a double every product is exact, and is rounded once, to a float
        r[i] = n != n ? n : float(std::ldexp(double(read<float>(&x, i)), int(std::fmax(-500, std::fmin(500, std::floor(n))))));
    }
    return (__m512)r;
}
EMULATED __m512 mm512_range_ps(__m512 x, __m512 y, int how) {
    Float32s r;
    for (int i = 0; i < 16; ++i) {
        const float a = read<float>(&x, i), b = read<float>(&y, i);
        const float u = how & 2 ? std::fabs(a) : a, v = how & 2 ? std::fabs(b) : b;
        // of zeros, and of equal magnitudes, the negative one is less
        const bool less = u < v || (u == v && std::signbit(a) >= std::signbit(b));
        const float chosen = a != a ? b : b != b ? a : less != bool(how & 1) ? a : b;
        const float signs[4] = {std::copysign(chosen, a), chosen, std::fabs(chosen), -std::fabs(chosen)};
        r[i] = signs[how >> 2 & 3];
    }
    return (__m512)r;
}
EMULATED __m512 mm512_roundscale_ps(__m512 x, int how) {
    if ((how & ~_MM_FROUND_NO_EXC) != 0) __builtin_trap();  // to the nearest integer is all that is here
    Float32s r;
    for (int i = 0; i < 16; ++i) r[i] = std::nearbyint(read<float>(&x, i));
    return (__m512)r;
}

// Integers.
EMULATED __m512i mm512_srai_epi32(__m512i x, unsigned n) { return (__m512i)((Int32s)x >> int(n > 31 ? 31 : n)); }
EMULATED __m512i mm512_shldi_epi16(__m512i x, __m512i y, int n) {
    Uint16s r;
    for (int i = 0; i < 32; ++i)
        r[i] = uint16_t((uint32_t(((Uint16s)x)[i]) << 16 | ((Uint16s)y)[i]) << (n & 15) >> 16);
    return (__m512i)r;
}
EMULATED __m512i mm512_ternarylogic_epi32(__m512i x, __m512i y, __m512i z, int table) {
    const Uint32s a = (Uint32s)x, b = (Uint32s)y, c = (Uint32s)z;
    Uint32s r = {};
    for (int n = 0; n < 8; ++n)
        if (table >> n & 1) r |= (n & 4 ? a : ~a) & (n & 2 ? b : ~b) & (n & 1 ? c : ~c);
    return (__m512i)r;
}
// sums of four products of bytes, without a sign and with one
EMULATED __m512i mm512_dpbusd_epi32(__m512i sum, __m512i x, __m512i y) {
    __m256i r[2];
    for (int half = 0; half < 2; ++half) {
        const __m256i a = read<__m256i>(&x, half), b = read<__m256i>(&y, half);
        // by even and odd bytes, which 16 bits hold
        const __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)),
                                               _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
        const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
        r[half] = _mm256_add_epi32(read<__m256i>(&sum, half), _mm256_add_epi32(even, odd));
    }
    return read<__m512i>(r);
}

// Lanes in another order.
EMULATED __m256 mm512_extractf32x8_ps(__m512 x, int half) { return read<__m256>(&x, half & 1); }
EMULATED __m512 mm512_permute_ps(__m512 x, int how) {
    Float32s r;
    for (int i = 0; i < 16; ++i) r[i] = read<float>(&x, (i & ~3) + (how >> 2 * (i & 3) & 3));
    return (__m512)r;
}
EMULATED __m512 mm512_shuffle_ps(__m512 x, __m512 y, int how) {
    Float32s r;
    for (int i = 0; i < 16; ++i) r[i] = read<float>((i & 3) < 2 ? &x : &y, (i & ~3) + (how >> 2 * (i & 3) & 3));
    return (__m512)r;
}
EMULATED __m512i mm512_shuffle_i64x2(__m512i x, __m512i y, int how) {
    __m128i r[4];
    for (int i = 0; i < 4; ++i) r[i] = read<__m128i>(i < 2 ? &x : &y, how >> 2 * i & 3);
    return read<__m512i>(r);
}
EMULATED __m512i mm512_shuffle_i32x4(__m512i x, __m512i y, int how) { return mm512_shuffle_i64x2(x, y, how); }
EMULATED __m512 mm512_shuffle_f32x4(__m512 x, __m512 y, int how) {
    return (__m512)mm512_shuffle_i64x2((__m512i)x, (__m512i)y, how);
}
EMULATED __m512i mm512_permutexvar_epi8(__m512i at, __m512i x) {
    Bytes r;
    for (int i = 0; i < 64; ++i) r[i] = ((Bytes)x)[((Bytes)at)[i] & 63];
    return (__m512i)r;
}
EMULATED __m512i mm512_permutex2var_epi8(__m512i x, __m512i at, __m512i y) {
    Bytes r;
    for (int i = 0; i < 64; ++i) r[i] = (((Bytes)at)[i] & 64 ? (Bytes)y : (Bytes)x)[((Bytes)at)[i] & 63];
    return (__m512i)r;
}

}  // namespace emulated
