// Vectors of sixteen floats without AVX-512.
//
// The kernels of this folder are written in AVX-512 intrinsics. They become one of three libraries (cpu_state.py): for
// AVX-512; where LLMCOMPRESS_AVX2 is defined the names below hide the real ones within namespace `state`, each doing the
// same to two registers of eight; where LLMCOMPRESS_NARROW is defined too, registers of eight are narrow.h's, on any
// processor. Same operations in the same order, so all give the same codes.
#pragma once

#include <cstdint>

#include "llmcompress/target.h"

#define STATE_INLINE static inline __attribute__((always_inline))

#ifdef LLMCOMPRESS_NARROW
#include "narrow.h"
#else
#include <immintrin.h>
#endif

#ifndef LLMCOMPRESS_AVX2
namespace state {
constexpr bool kAvx512 = true;
}
#else

// some headers have macros for these
#undef _mm512_setr_epi32
#undef _mm512_setr_ps
#undef _mm512_extractf32x8_ps
#undef _mm512_extracti64x4_epi64
#undef _mm512_cmp_ps_mask
#undef _mm512_mask_cmp_ps_mask
#undef _mm512_permute_ps
#undef _mm512_shuffle_ps
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_i32x4
#undef _mm512_shuffle_i64x2
#undef _mm512_cvtps_ph
#undef _mm512_ternarylogic_epi32
#undef _mm512_range_ps
#undef _mm512_roundscale_ps
#undef _mm256_cmp_ps_mask
#undef _mm256_cmplt_epu32_mask

namespace state {

constexpr bool kAvx512 = false;

struct __m512 {
  __m256 a, b;
};
struct __m512d {
  __m256d a, b;
};
struct __m512i {
  __m256i a, b;
};
using __mmask16 = uint16_t;
using __mmask8 = uint8_t;

// One operation on both halves, of one, two or three vectors.
#define STATE_ONE(V, W, name, half) \
  STATE_INLINE V name(W x) { return {half(x.a), half(x.b)}; }
#define STATE_TWO(V, name, half) \
  STATE_INLINE V name(V x, V y) { return {half(x.a, y.a), half(x.b, y.b)}; }
#define STATE_THREE(name, half) \
  STATE_INLINE __m512 name(__m512 x, __m512 y, __m512 z) { return {half(x.a, y.a, z.a), half(x.b, y.b, z.b)}; }
#define STATE_SHIFT(name, half) \
  STATE_INLINE __m512i name(__m512i x, unsigned n) { return {half(x.a, int(n)), half(x.b, int(n))}; }

STATE_TWO(__m512, _mm512_add_ps, _mm256_add_ps)
STATE_TWO(__m512, _mm512_sub_ps, _mm256_sub_ps)
STATE_TWO(__m512, _mm512_mul_ps, _mm256_mul_ps)
STATE_TWO(__m512, _mm512_div_ps, _mm256_div_ps)
STATE_TWO(__m512, _mm512_max_ps, _mm256_max_ps)
STATE_TWO(__m512, _mm512_min_ps, _mm256_min_ps)
STATE_TWO(__m512, _mm512_and_ps, _mm256_and_ps)
STATE_TWO(__m512, _mm512_or_ps, _mm256_or_ps)
STATE_TWO(__m512, _mm512_unpacklo_ps, _mm256_unpacklo_ps)
STATE_TWO(__m512, _mm512_unpackhi_ps, _mm256_unpackhi_ps)
STATE_TWO(__m512d, _mm512_unpacklo_pd, _mm256_unpacklo_pd)
STATE_TWO(__m512d, _mm512_unpackhi_pd, _mm256_unpackhi_pd)
STATE_TWO(__m512i, _mm512_add_epi32, _mm256_add_epi32)
STATE_TWO(__m512i, _mm512_sub_epi32, _mm256_sub_epi32)
STATE_TWO(__m512i, _mm512_mullo_epi32, _mm256_mullo_epi32)
STATE_TWO(__m512i, _mm512_max_epu32, _mm256_max_epu32)
STATE_TWO(__m512i, _mm512_and_si512, _mm256_and_si256)
STATE_TWO(__m512i, _mm512_xor_si512, _mm256_xor_si256)
STATE_TWO(__m512i, _mm512_unpacklo_epi32, _mm256_unpacklo_epi32)
STATE_TWO(__m512i, _mm512_unpackhi_epi32, _mm256_unpackhi_epi32)
STATE_TWO(__m512i, _mm512_unpacklo_epi64, _mm256_unpacklo_epi64)
STATE_TWO(__m512i, _mm512_unpackhi_epi64, _mm256_unpackhi_epi64)
STATE_TWO(__m512i, _mm512_packs_epi32, _mm256_packs_epi32)
STATE_TWO(__m512i, _mm512_packs_epi16, _mm256_packs_epi16)
STATE_THREE(_mm512_fmadd_ps, _mm256_fmadd_ps)
STATE_THREE(_mm512_fmsub_ps, _mm256_fmsub_ps)
STATE_THREE(_mm512_fnmadd_ps, _mm256_fnmadd_ps)
STATE_ONE(__m512, __m512, _mm512_sqrt_ps, _mm256_sqrt_ps)
STATE_ONE(__m512i, __m512, _mm512_castps_si512, _mm256_castps_si256)
STATE_ONE(__m512, __m512i, _mm512_castsi512_ps, _mm256_castsi256_ps)
STATE_ONE(__m512d, __m512, _mm512_castps_pd, _mm256_castps_pd)
STATE_ONE(__m512, __m512d, _mm512_castpd_ps, _mm256_castpd_ps)
STATE_ONE(__m512, __m512i, _mm512_cvtepi32_ps, _mm256_cvtepi32_ps)
STATE_ONE(__m512i, __m512, _mm512_cvtps_epi32, _mm256_cvtps_epi32)
STATE_SHIFT(_mm512_slli_epi32, _mm256_slli_epi32)
STATE_SHIFT(_mm512_srli_epi32, _mm256_srli_epi32)
STATE_SHIFT(_mm512_srai_epi32, _mm256_srai_epi32)
#undef STATE_ONE
#undef STATE_TWO
#undef STATE_THREE
#undef STATE_SHIFT

STATE_INLINE __m512 _mm512_set1_ps(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
STATE_INLINE __m512i _mm512_set1_epi32(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
STATE_INLINE __m512i _mm512_set1_epi8(char x) { return {_mm256_set1_epi8(x), _mm256_set1_epi8(x)}; }
STATE_INLINE __m512 _mm512_setzero_ps() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
STATE_INLINE __m512i _mm512_setzero_si512() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
template <class... X>
STATE_INLINE __m512i _mm512_setr_epi32(X... x) {
  alignas(64) const int all[] = {x...};
  const __m256i* p = reinterpret_cast<const __m256i*>(all);
  return {p[0], p[1]};
}
template <class... X>
STATE_INLINE __m512 _mm512_setr_ps(X... x) {
  alignas(64) const float all[] = {static_cast<float>(x)...};
  return {_mm256_load_ps(all), _mm256_load_ps(all + 8)};
}

STATE_INLINE __m512 _mm512_loadu_ps(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
STATE_INLINE __m512 _mm512_load_ps(const float* p) { return {_mm256_load_ps(p), _mm256_load_ps(p + 8)}; }
STATE_INLINE __m512i _mm512_loadu_si512(const void* from) {
  const __m256i* p = static_cast<const __m256i*>(from);
  return {_mm256_loadu_si256(p), _mm256_loadu_si256(p + 1)};
}
STATE_INLINE void _mm512_storeu_ps(float* p, __m512 x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
STATE_INLINE void _mm512_store_ps(float* p, __m512 x) { _mm256_store_ps(p, x.a), _mm256_store_ps(p + 8, x.b); }

STATE_INLINE __m256 _mm512_castps512_ps256(__m512 x) { return x.a; }
STATE_INLINE __m256i _mm512_castsi512_si256(__m512i x) { return x.a; }
STATE_INLINE __m256 _mm512_extractf32x8_ps(__m512 x, int half) { return half == 0 ? x.a : x.b; }
STATE_INLINE __m256i _mm512_extracti64x4_epi64(__m512i x, int half) { return half == 0 ? x.a : x.b; }

STATE_INLINE __m512i _mm512_cvtepu8_epi32(__m128i x) {
  return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
STATE_INLINE __m512i _mm512_cvtepu16_epi32(__m256i x) {
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1))};
}
STATE_INLINE __m512i _mm512_cvtepi16_epi32(__m256i x) {
  return {_mm256_cvtepi16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepi16_epi32(_mm256_extracti128_si256(x, 1))};
}
// the lower half of each number
STATE_INLINE __m256i _mm512_cvtepi32_epi16(__m512i x) {
  const __m256i low = _mm256_set1_epi32(0xffff);
  const __m256i both = _mm256_packus_epi32(_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low));
  return _mm256_permute4x64_epi64(both, 0xd8);
}
// the lowest byte of each number
STATE_INLINE __m128i _mm512_cvtepi32_epi8(__m512i x) {
  const __m256i low = _mm256_set1_epi32(0xff);
  const __m256i pairs = _mm512_cvtepi32_epi16({_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low)});
  return _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}
STATE_INLINE __m512 _mm512_cvtph_ps(__m256i x) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
}
STATE_INLINE __m256i _mm512_cvtps_ph(__m512 x, int) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm256_set_m128i(_mm256_cvtps_ph(x.b, nearest), _mm256_cvtps_ph(x.a, nearest));
}

// All ones where a mask has a bit.
STATE_INLINE __m512i lanes_of(__mmask16 mask) {
  const __m256i all = _mm256_set1_epi32(mask), low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i high = _mm256_slli_epi32(low, 8);
  return {_mm256_cmpeq_epi32(_mm256_and_si256(all, low), low), _mm256_cmpeq_epi32(_mm256_and_si256(all, high), high)};
}
STATE_INLINE __mmask8 _mm256_cmp_ps_mask(__m256 x, __m256 y, int how) {
  const auto bits = [](__m256 found) { return static_cast<__mmask8>(_mm256_movemask_ps(found)); };
  switch (how) {
    case _CMP_LT_OQ: return bits(_mm256_cmp_ps(x, y, _CMP_LT_OQ));
    case _CMP_GT_OQ: return bits(_mm256_cmp_ps(x, y, _CMP_GT_OQ));
    case _CMP_GE_OQ: return bits(_mm256_cmp_ps(x, y, _CMP_GE_OQ));
    case _CMP_NLT_UQ: return bits(_mm256_cmp_ps(x, y, _CMP_NLT_UQ));
    case _CMP_UNORD_Q: return bits(_mm256_cmp_ps(x, y, _CMP_UNORD_Q));
    default: __builtin_trap();
  }
}
STATE_INLINE __mmask16 _mm512_cmp_ps_mask(__m512 x, __m512 y, int how) {
  return static_cast<__mmask16>(_mm256_cmp_ps_mask(x.a, y.a, how) | _mm256_cmp_ps_mask(x.b, y.b, how) << 8);
}
STATE_INLINE __mmask16 _mm512_mask_cmp_ps_mask(__mmask16 some, __m512 x, __m512 y, int how) {
  return some & _mm512_cmp_ps_mask(x, y, how);
}
STATE_INLINE __mmask8 _mm256_cmplt_epu32_mask(__m256i x, __m256i y) {
  const __m256i sign = _mm256_set1_epi32(INT32_MIN);
  const __m256i less = _mm256_cmpgt_epi32(_mm256_xor_si256(y, sign), _mm256_xor_si256(x, sign));
  return static_cast<__mmask8>(_mm256_movemask_ps(_mm256_castsi256_ps(less)));
}
STATE_INLINE __m512 choose_lanes(__mmask16 some, __m512 from, __m512 other) {
  const __m512 lanes = _mm512_castsi512_ps(lanes_of(some));
  return {_mm256_blendv_ps(other.a, from.a, lanes.a), _mm256_blendv_ps(other.b, from.b, lanes.b)};
}
STATE_INLINE __m512 _mm512_maskz_mov_ps(__mmask16 some, __m512 x) { return choose_lanes(some, x, _mm512_setzero_ps()); }
STATE_INLINE __m512 _mm512_mask_div_ps(__m512 other, __mmask16 some, __m512 x, __m512 y) {
  return choose_lanes(some, _mm512_div_ps(x, y), other);
}
STATE_INLINE __m512 _mm512_maskz_loadu_ps(__mmask16 some, const float* p) {
  const __m512i lanes = lanes_of(some);
  return {_mm256_maskload_ps(p, lanes.a), _mm256_maskload_ps(p + 8, lanes.b)};
}
STATE_INLINE void _mm512_mask_storeu_ps(float* p, __mmask16 some, __m512 x) {
  const __m512i lanes = lanes_of(some);
  _mm256_maskstore_ps(p, lanes.a, x.a), _mm256_maskstore_ps(p + 8, lanes.b, x.b);
}
STATE_INLINE void _mm512_mask_store_ps(float* p, __mmask16 some, __m512 x) { _mm512_mask_storeu_ps(p, some, x); }
STATE_INLINE void _mm256_mask_storeu_epi16(uint16_t* p, __mmask16 some, __m256i x) {
  alignas(32) uint16_t all[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(all), x);
  for (int i = 0; i < 16; ++i) {
    if (some >> i & 1) p[i] = all[i];
  }
}

// Lanes of sixteen, or of x and then y, by number; bits above the fourth, or fifth, do not count.
STATE_INLINE __m256 pick_eight(__m512 x, __m256i at) {
  const __m256 high = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(x.a, at), _mm256_permutevar8x32_ps(x.b, at), high);
}
STATE_INLINE __m512 _mm512_permutexvar_ps(__m512i at, __m512 x) { return {pick_eight(x, at.a), pick_eight(x, at.b)}; }
STATE_INLINE __m512i _mm512_permutexvar_epi32(__m512i at, __m512i x) {
  return _mm512_castps_si512(_mm512_permutexvar_ps(at, _mm512_castsi512_ps(x)));
}
STATE_INLINE __m512 _mm512_mask_permutexvar_ps(__m512 other, __mmask16 some, __m512i at, __m512 x) {
  return choose_lanes(some, _mm512_permutexvar_ps(at, x), other);
}
STATE_INLINE __m512 _mm512_permutex2var_ps(__m512 x, __m512i at, __m512 y) {
  const auto half = [&](__m256i i) __attribute__((always_inline)) {
    const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(i, 27));
    return _mm256_blendv_ps(pick_eight(x, i), pick_eight(y, i), second);
  };
  return {half(at.a), half(at.b)};
}
// instructions with a constant in them, which an argument is not to every compiler
template <int How>
STATE_INLINE __m512 permute(__m512 x) {
  return {_mm256_permute_ps(x.a, How), _mm256_permute_ps(x.b, How)};
}
template <int How>
STATE_INLINE __m512 shuffle(__m512 x, __m512 y) {
  return {_mm256_shuffle_ps(x.a, y.a, How), _mm256_shuffle_ps(x.b, y.b, How)};
}
#define _mm512_permute_ps(x, how) state::permute<how>(x)
#define _mm512_shuffle_ps(x, y, how) state::shuffle<how>(x, y)
// Quarters of a vector: two of x, two of y, two bits each.
STATE_INLINE __m128 quarter_of(__m512 x, int which) {
  const __m256 half = which < 2 ? x.a : x.b;
  return which % 2 == 0 ? _mm256_castps256_ps128(half) : _mm256_extractf128_ps(half, 1);
}
STATE_INLINE __m512 _mm512_shuffle_f32x4(__m512 x, __m512 y, int how) {
  return {_mm256_set_m128(quarter_of(x, how >> 2 & 3), quarter_of(x, how & 3)),
          _mm256_set_m128(quarter_of(y, how >> 6 & 3), quarter_of(y, how >> 4 & 3))};
}
STATE_INLINE __m512i _mm512_shuffle_i32x4(__m512i x, __m512i y, int how) {
  return _mm512_castps_si512(_mm512_shuffle_f32x4(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), how));
}
STATE_INLINE __m512i _mm512_shuffle_i64x2(__m512i x, __m512i y, int how) { return _mm512_shuffle_i32x4(x, y, how); }

// (x & y) | (~x & z), the one table that is used
STATE_INLINE __m512i _mm512_ternarylogic_epi32(__m512i x, __m512i y, __m512i z, int) {
  const auto half = [](__m256i p, __m256i q, __m256i r) __attribute__((always_inline)) {
    return _mm256_or_si256(_mm256_and_si256(p, q), _mm256_andnot_si256(p, r));
  };
  return {half(x.a, y.a, z.a), half(x.b, y.b, z.b)};
}
// The larger magnitude without its sign, the number where the other is none; the one form that is used, in which x is the largest
// magnitude so far.
STATE_INLINE __m512 _mm512_range_ps(__m512 x, __m512 y, int) {
  const __m512 magnitude = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
  // max gives its second operand where one is no number; what has been found so far always is one
  return _mm512_max_ps(_mm512_and_ps(y, magnitude), x);
}
STATE_INLINE __m512 _mm512_roundscale_ps(__m512 x, int) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, nearest), _mm256_round_ps(x.b, nearest)};
}
// x times 2 to the whole part of n, for n between -126 and 127
STATE_INLINE __m512 _mm512_scalef_ps(__m512 x, __m512 n) {
  const auto half = [](__m256 v, __m256 e) __attribute__((always_inline)) {
    const __m256i whole = _mm256_cvtps_epi32(_mm256_floor_ps(e));
    return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(whole, _mm256_set1_epi32(127)), 23)));
  };
  return {half(x.a, n.a), half(x.b, n.b)};
}
// better than 14 bits
STATE_INLINE __m512 _mm512_rcp14_ps(__m512 x) { return _mm512_div_ps(_mm512_set1_ps(1.0f), x); }
// halves, quarters and so on, as GCC's own
STATE_INLINE float _mm512_reduce_add_ps(__m512 x) {
  const __m256 eight = _mm256_add_ps(x.b, x.a);
  const __m128 four = _mm_add_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace state
#endif
