// Sixteen lanes in two AVX2 registers; needs AVX2, FMA and F16C (Haswell and later, Zen and later). Where DOT_BYTES is
// defined, it is one instruction for what takes three or eight otherwise.
#pragma once

constexpr int MOST = 4;  // tokens that share one unpacking of the weight: what the registers hold
constexpr int STREAMS = 2;  // blocks of rows that one token reads at once
#define UNROLL _Pragma("GCC unroll 8")
struct Ints {
    __m256i a, b;
};
struct Floats {
    __m256 a, b;
};

inline Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Floats zero_floats() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Ints load_words(const uint32_t* p) {
    const __m256i* q = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
template <int N>
inline Ints shift_right(Ints x) {
    return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)};
}
inline Ints shift_right(Ints x, int n) {
    const __m128i by = _mm_cvtsi32_si128(n);
    return {_mm256_srl_epi32(x.a, by), _mm256_srl_epi32(x.b, by)};
}
inline Ints shift_left(Ints x, int n) {
    const __m128i by = _mm_cvtsi32_si128(n);
    return {_mm256_sll_epi32(x.a, by), _mm256_sll_epi32(x.b, by)};
}
inline Ints quarter(Ints x) { return {_mm256_srai_epi32(x.a, 2), _mm256_srai_epi32(x.b, 2)}; }
inline Ints keep(Ints x, uint32_t mask) {
    const __m256i m = _mm256_set1_epi32(int(mask));
    return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
inline Ints either(Ints x, Ints y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline Ints add(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
template <int N>
inline Ints rotate_right(Ints x) {
    return {_mm256_or_si256(_mm256_srli_epi32(x.a, N), _mm256_slli_epi32(x.a, 32 - N)),
            _mm256_or_si256(_mm256_srli_epi32(x.b, N), _mm256_slli_epi32(x.b, 32 - N))};
}
// bytes of `x` where the mask has ones, of `y` elsewhere
template <uint32_t MASK>
inline Ints merge_bytes(Ints x, Ints y) {
    const __m256i mask = _mm256_set1_epi32(int(MASK));
    return {_mm256_blendv_epi8(y.a, x.a, mask), _mm256_blendv_epi8(y.b, x.b, mask)};
}
#ifdef DOT_BYTES
inline __m256i dot_half(__m256i sum, __m256i codes, __m256i x) { return DOT_BYTES(sum, codes, x); }
inline __m256i dot_half_wide(__m256i sum, __m256i codes, __m256i x) { return DOT_BYTES(sum, codes, x); }
#else
inline __m256i dot_half(__m256i sum, __m256i codes, __m256i x) {
    // up to four bits a code, two products stay far below the 16-bit saturation of maddubs
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
}
inline __m256i dot_half_wide(__m256i sum, __m256i codes, __m256i x) {
    // 255 * 128 * 2 does not fit 16 bits, so the two nibbles of a code go separately
    const __m256i nibble = _mm256_set1_epi8(0x0f);
    const __m256i low = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(codes, nibble), x), _mm256_set1_epi16(1));
    const __m256i top = _mm256_and_si256(_mm256_srli_epi32(codes, 4), nibble);
    const __m256i high = _mm256_madd_epi16(_mm256_maddubs_epi16(top, x), _mm256_set1_epi16(16));
    return _mm256_add_epi32(sum, _mm256_add_epi32(low, high));
}
#endif
template <int BITS>
inline Ints dot(Ints sum, Ints codes, const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, 4);
    const __m256i all = _mm256_set1_epi32(quad);
    if constexpr (BITS == 8) return {dot_half_wide(sum.a, codes.a, all), dot_half_wide(sum.b, codes.b, all)};
    return {dot_half(sum.a, codes.a, all), dot_half(sum.b, codes.b, all)};
}
inline void store_words(uint32_t* p, Ints x) {
    __m256i* q = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(q, x.a);
    _mm256_storeu_si256(q + 1, x.b);
}
#ifndef DOT_BYTES
// Two planes are multiplied as numbers of 16 bits: two instructions and additions for 32 products, where planes of bytes take
// four and two, and half as many sums, which fit the registers. One token, for which widening codes would take as long as its
// products, has sums of bytes in 16 bits instead (narrow_steps()).
#define LLMCOMPRESS_PAIRS
// bytes 0 and 2, then 1 and 3 of every lane, as numbers of 16 bits
inline Ints even_bytes(Ints x) {
    const __m256i low = _mm256_set1_epi16(0xff);
    return {_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low)};
}
inline Ints odd_bytes(Ints x) { return {_mm256_srli_epi16(x.a, 8), _mm256_srli_epi16(x.b, 8)}; }
// Added by their intrinsics GCC adds products to each other first, and lacks the registers for that.
inline __m256i add_words(__m256i sum, __m256i x) {
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x));
    return sum;
}
inline __m256i add_halves(__m256i sum, __m256i x) {
    asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x));
    return sum;
}
inline __m256i same_quads(const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, 4);
    return _mm256_set1_epi32(quad);
}
inline Ints dot_pair(Ints sum, Ints codes, const int8_t* x) {
    const __m256i all = same_quads(x);
    return {add_words(sum.a, _mm256_madd_epi16(codes.a, all)), add_words(sum.b, _mm256_madd_epi16(codes.b, all))};
}
inline Ints dot_narrow(Ints sum, Ints codes, const int8_t* x) {
    const __m256i all = same_quads(x);
    return {add_halves(sum.a, _mm256_maddubs_epi16(codes.a, all)), add_halves(sum.b, _mm256_maddubs_epi16(codes.b, all))};
}
// Sums of 16 bits, `times` as much, added to those of 32.
inline Ints add_narrow(Ints sum, Ints narrow, int times) {
    const __m256i by = _mm256_set1_epi16(int16_t(times));
    return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(narrow.a, by)), _mm256_add_epi32(sum.b, _mm256_madd_epi16(narrow.b, by))};
}
#endif
template <int BITS>
inline Ints dot_once(Ints sum, Ints codes, const int8_t* x) {
    return dot<BITS>(sum, codes, x);
}
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Floats spread(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats multiply(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats multiply_add(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats multiply_subtract(Floats x, Floats y, Floats z) {
    return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
// `a` times a power of two as kept_scale() keeps it
inline Floats scaled(Floats a, float kept) { return multiply(a, spread(kept)); }
inline float kept_scale(float power) { return power; }
inline Floats load_halves(const uint16_t* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline Floats load_floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store_floats(float* p, Floats x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_second_level(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
