// Sixteen lanes in one AVX-512 register; needs F, BW, VL, VNNI, VBMI and VBMI2 (Ice Lake and later, Zen 4 and later).
#pragma once

constexpr int MOST = 8;  // tokens that share one unpacking of the weight: what the registers hold
constexpr int STREAMS = 4;  // blocks of rows that one token reads at once
#define UNROLL _Pragma("GCC unroll 8")
using Ints = __m512i;
using Floats = __m512;

inline Ints zero_ints() { return _mm512_setzero_si512(); }
inline Floats zero_floats() { return _mm512_setzero_ps(); }
inline Ints load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
template <int N>
inline Ints shift_right(Ints a) {
    return _mm512_srli_epi32(a, N);
}
inline Ints shift_right(Ints a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
inline Ints shift_left(Ints a, int n) { return _mm512_sll_epi32(a, _mm_cvtsi32_si128(n)); }
inline Ints quarter(Ints a) { return _mm512_srai_epi32(a, 2); }
inline Ints keep(Ints a, uint32_t mask) { return _mm512_and_si512(a, _mm512_set1_epi32(int(mask))); }
inline Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
template <int N>
inline Ints rotate_right(Ints a) {
    return _mm512_ror_epi32(a, N);
}
// bytes of `a` where the mask has ones, of `b` elsewhere
template <uint32_t MASK>
inline Ints merge_bytes(Ints a, Ints b) {
    // on Zen 4 a blend leaves the units that multiply alone, ternary logic does not
    constexpr uint64_t bytes = (MASK & 1) | (MASK >> 7 & 2) | (MASK >> 14 & 4) | (MASK >> 21 & 8);
    return _mm512_mask_blend_epi8(bytes * 0x1111111111111111, b, a);
}
template <int BITS>
inline Ints dot(Ints sum, Ints codes, const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, 4);
    // by its intrinsic GCC keeps every sum in two registers and moves it forth and back: half of a loop's instructions
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(_mm512_set1_epi32(quad)));
    return sum;
}
// The same with a quad that no other product takes: its load is part of the instruction.
template <int BITS>
inline Ints dot_once(Ints sum, Ints codes, const int8_t* x) {
    using Quad = int8_t __attribute__((vector_size(4), aligned(1), may_alias));
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const Quad*>(x)));
    return sum;
}
inline Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Floats spread(float a) { return _mm512_set1_ps(a); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
// `a` times a power of two as kept_scale() keeps it, by its exponent: on Zen 4 this leaves the units that multiply alone
inline Floats scaled(Floats a, float kept) { return _mm512_scalef_ps(a, spread(kept)); }
inline float kept_scale(float power) { return power != power ? power : float(int(bits_of(power) >> 23) - 127); }
inline Floats load_halves(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
inline void store_floats(float* p, Floats a) { _mm512_storeu_ps(p, a); }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_second_level(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

// float_to_bf16 of sixteen lanes
inline void store_bf16(uint16_t* to, Floats value) {
    const Ints u = _mm512_castps_si512(value), top = _mm512_srli_epi32(u, 16);
    const Ints odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
    const Ints rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const Ints kept = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), top, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(kept));
}
