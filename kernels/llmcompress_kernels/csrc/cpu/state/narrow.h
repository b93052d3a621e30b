// Registers of eight floats on any processor: two of four, under the names that wide.h takes from AVX2.
//
// Only what is used here is defined, and each does what its instruction does, bit by bit, numbers that are none and sums
// that overflow included: codes have to be those of the other two libraries. On Arm four floats are a register and the
// operations that plain C++ has no word for are NEON's; elsewhere compilers make of the vectors what the target offers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __aarch64__
#include <arm_neon.h>
#endif

#include "llmcompress/types.h"

#define _MM_SHUFFLE(z, y, x, w) ((z) << 6 | (y) << 4 | (x) << 2 | (w))

namespace state {

enum { _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8, _MM_HINT_T0 = 3 };
enum { _CMP_UNORD_Q = 0x03, _CMP_LT_OQ = 0x11, _CMP_NLT_UQ = 0x15, _CMP_GE_OQ = 0x1d, _CMP_GT_OQ = 0x1e };

typedef float F4 __attribute__((vector_size(16), may_alias));
typedef int32_t I4 __attribute__((vector_size(16), may_alias));
typedef uint32_t U4 __attribute__((vector_size(16), may_alias));
typedef int64_t L2 __attribute__((vector_size(16), may_alias));
typedef int16_t S8 __attribute__((vector_size(16), may_alias));
typedef int8_t B16 __attribute__((vector_size(16), may_alias));

using __m128 = F4;
using __m128i = I4;
struct __m256 {
  F4 a, b;
};
struct __m256d {
  F4 a, b;
};
struct __m256i {
  I4 a, b;
};

// The lanes of x where `mask` is all ones, else those of y.
STATE_INLINE I4 choose(I4 mask, I4 x, I4 y) { return (mask & x) | (~mask & y); }
STATE_INLINE F4 choose(I4 mask, F4 x, F4 y) { return (F4)choose(mask, (I4)x, (I4)y); }
STATE_INLINE F4 four(float x) { return F4{x, x, x, x}; }
STATE_INLINE I4 four(int x) { return I4{x, x, x, x}; }
STATE_INLINE I4 limited(I4 x, int low, int high) {
  x = choose((I4)(x < four(low)), four(low), x);
  return choose((I4)(x > four(high)), four(high), x);
}

// What four lanes do; eight are twice that.
STATE_INLINE F4 fused(F4 x, F4 y, F4 z) {
#ifdef __aarch64__
  return (F4)vfmaq_f32((float32x4_t)z, (float32x4_t)x, (float32x4_t)y);
#else
  return F4{__builtin_fmaf(x[0], y[0], z[0]), __builtin_fmaf(x[1], y[1], z[1]), __builtin_fmaf(x[2], y[2], z[2]),
            __builtin_fmaf(x[3], y[3], z[3])};
#endif
}
STATE_INLINE F4 root(F4 x) {
#ifdef __aarch64__
  return (F4)vsqrtq_f32((float32x4_t)x);
#else
  return F4{__builtin_sqrtf(x[0]), __builtin_sqrtf(x[1]), __builtin_sqrtf(x[2]), __builtin_sqrtf(x[3])};
#endif
}
// to the nearest, halves to even; adding 2^23 and taking it away does so below it
STATE_INLINE F4 nearest(F4 x) {
  const I4 sign = (I4)x & four(INT32_MIN);
  const F4 size = (F4)((I4)x & four(INT32_MAX)), round = four(8388608.0f);
  const F4 rounded = (F4)((I4)((size + round) - round) | sign);
  return choose((I4)(size < round), rounded, x);
}
STATE_INLINE F4 down(F4 x) {
  const F4 near = nearest(x);
  return choose((I4)(near > x), near - four(1.0f), near);
}
// what does not fit becomes the least number
STATE_INLINE I4 whole(F4 x) {
  const F4 size = (F4)((I4)x & four(INT32_MAX));
  const I4 fits = (I4)(size < four(2147483648.0f));
  return choose(fits, __builtin_convertvector(nearest((F4)((I4)x & fits)), I4), four(INT32_MIN));
}
STATE_INLINE I4 halves_of(F4 x, F4 y) {
#ifdef __aarch64__
  return (I4)vcombine_f16(vcvt_f16_f32((float32x4_t)x), vcvt_f16_f32((float32x4_t)y));
#else
  alignas(16) uint16_t all[8];
  for (int i = 0; i < 4; ++i) all[i] = llmcompress::float_to_half(x[i]), all[4 + i] = llmcompress::float_to_half(y[i]);
  I4 found;
  std::memcpy(&found, all, 16);
  return found;
#endif
}
// Numbers of 16 bits to halves of 32: the lower four, the upper four.
STATE_INLINE I4 widened_low(I4 x) { return (I4)__builtin_shufflevector((S8)x, S8{}, 0, 8, 1, 8, 2, 8, 3, 8); }
STATE_INLINE I4 widened_high(I4 x) { return (I4)__builtin_shufflevector((S8)x, S8{}, 4, 8, 5, 8, 6, 8, 7, 8); }
// of four halves that widened_low and widened_high give
STATE_INLINE F4 floats_of(I4 half) {
#ifdef __aarch64__
  return (F4)vcvt_f32_f16((float16x4_t)vmovn_u32((uint32x4_t)half));
#else
  const I4 sign = (I4)((U4)(half & four(0x8000)) << 16), rest = (half & four(0x7fff)) << 13;
  const I4 scaled = (I4)((F4)rest * four(0x1p112f)), none = rest | four(0x7f800000);
  return (F4)(sign | choose((I4)(rest >= four(0x0f800000)), none, scaled));
#endif
}
STATE_INLINE int signs(I4 x) {
#ifdef __aarch64__
  const I4 places = {1, 2, 4, 8};
  return vaddvq_s32((int32x4_t)((x >> 31) & places));
#else
  const I4 one = (I4)((U4)x >> 31);
  return one[0] | one[1] << 1 | one[2] << 2 | one[3] << 3;
#endif
}
// the lower half of each number, x first
STATE_INLINE I4 low_halves(I4 x, I4 y) { return (I4)__builtin_shufflevector((S8)x, (S8)y, 0, 2, 4, 6, 8, 10, 12, 14); }
STATE_INLINE F4 pick_four(F4 x, F4 y, int how) { return F4{x[how & 3], x[how >> 2 & 3], y[how >> 4 & 3], y[how >> 6 & 3]}; }

#define STATE_EIGHT_ONE(V, W, name, half) \
  STATE_INLINE V name(W x) { return {half(x.a), half(x.b)}; }
#define STATE_EIGHT_TWO(V, name, half)                                                        \
  STATE_INLINE V name(V p, V q) {                                                             \
    const auto of = [](auto x, auto y) __attribute__((always_inline)) { return half; };       \
    return {of(p.a, q.a), of(p.b, q.b)};                                                      \
  }
STATE_EIGHT_TWO(__m256, _mm256_add_ps, x + y)
STATE_EIGHT_TWO(__m256, _mm256_sub_ps, x - y)
STATE_EIGHT_TWO(__m256, _mm256_mul_ps, x * y)
STATE_EIGHT_TWO(__m256, _mm256_div_ps, x / y)
// the second where one is no number, or both are zero
STATE_EIGHT_TWO(__m256, _mm256_max_ps, choose((I4)(x > y), x, y))
STATE_EIGHT_TWO(__m256, _mm256_min_ps, choose((I4)(x < y), x, y))
STATE_EIGHT_TWO(__m256, _mm256_and_ps, (F4)((I4)x & (I4)y))
STATE_EIGHT_TWO(__m256, _mm256_or_ps, (F4)((I4)x | (I4)y))
STATE_EIGHT_TWO(__m256, _mm256_unpacklo_ps, (F4)__builtin_shufflevector(x, y, 0, 4, 1, 5))
STATE_EIGHT_TWO(__m256, _mm256_unpackhi_ps, (F4)__builtin_shufflevector(x, y, 2, 6, 3, 7))
STATE_EIGHT_TWO(__m256d, _mm256_unpacklo_pd, (F4)__builtin_shufflevector(x, y, 0, 1, 4, 5))
STATE_EIGHT_TWO(__m256d, _mm256_unpackhi_pd, (F4)__builtin_shufflevector(x, y, 2, 3, 6, 7))
STATE_EIGHT_TWO(__m256i, _mm256_add_epi32, (I4)((U4)x + (U4)y))
STATE_EIGHT_TWO(__m256i, _mm256_sub_epi32, (I4)((U4)x - (U4)y))
STATE_EIGHT_TWO(__m256i, _mm256_mullo_epi32, (I4)((U4)x * (U4)y))
STATE_EIGHT_TWO(__m256i, _mm256_max_epu32, choose((I4)((U4)x > (U4)y), x, y))
STATE_EIGHT_TWO(__m256i, _mm256_and_si256, x & y)
STATE_EIGHT_TWO(__m256i, _mm256_or_si256, x | y)
STATE_EIGHT_TWO(__m256i, _mm256_xor_si256, x ^ y)
STATE_EIGHT_TWO(__m256i, _mm256_andnot_si256, ~x & y)
STATE_EIGHT_TWO(__m256i, _mm256_unpacklo_epi32, (I4)__builtin_shufflevector(x, y, 0, 4, 1, 5))
STATE_EIGHT_TWO(__m256i, _mm256_unpackhi_epi32, (I4)__builtin_shufflevector(x, y, 2, 6, 3, 7))
STATE_EIGHT_TWO(__m256i, _mm256_unpacklo_epi64, (I4)__builtin_shufflevector(x, y, 0, 1, 4, 5))
STATE_EIGHT_TWO(__m256i, _mm256_unpackhi_epi64, (I4)__builtin_shufflevector(x, y, 2, 3, 6, 7))
STATE_EIGHT_TWO(__m256i, _mm256_cmpeq_epi32, (I4)(x == y))
STATE_EIGHT_TWO(__m256i, _mm256_cmpgt_epi32, (I4)(x > y))
STATE_EIGHT_TWO(__m256i, _mm256_cmpeq_epi16, (I4)((S8)x == (S8)y))
STATE_EIGHT_TWO(__m256i, _mm256_packs_epi32, low_halves(limited(x, INT16_MIN, INT16_MAX), limited(y, INT16_MIN, INT16_MAX)))
STATE_EIGHT_TWO(__m256i, _mm256_packus_epi32, low_halves(limited(x, 0, UINT16_MAX), limited(y, 0, UINT16_MAX)))
STATE_EIGHT_ONE(__m256, __m256, _mm256_sqrt_ps, root)
STATE_EIGHT_ONE(__m256, __m256, _mm256_floor_ps, down)
STATE_EIGHT_ONE(__m256i, __m256, _mm256_castps_si256, (I4))
STATE_EIGHT_ONE(__m256, __m256i, _mm256_castsi256_ps, (F4))
STATE_EIGHT_ONE(__m256d, __m256, _mm256_castps_pd, (F4))
STATE_EIGHT_ONE(__m256, __m256d, _mm256_castpd_ps, (F4))
STATE_EIGHT_ONE(__m256i, __m256, _mm256_cvtps_epi32, whole)
#undef STATE_EIGHT_ONE
#undef STATE_EIGHT_TWO

STATE_INLINE __m256 _mm256_cvtepi32_ps(__m256i x) { return {__builtin_convertvector(x.a, F4), __builtin_convertvector(x.b, F4)}; }
STATE_INLINE __m256i _mm256_slli_epi32(__m256i x, int n) { return {(I4)((U4)x.a << n), (I4)((U4)x.b << n)}; }
STATE_INLINE __m256i _mm256_srli_epi32(__m256i x, int n) { return {(I4)((U4)x.a >> n), (I4)((U4)x.b >> n)}; }
STATE_INLINE __m256i _mm256_srai_epi32(__m256i x, int n) { return {x.a >> n, x.b >> n}; }
STATE_INLINE __m256 _mm256_fmadd_ps(__m256 x, __m256 y, __m256 z) { return {fused(x.a, y.a, z.a), fused(x.b, y.b, z.b)}; }
STATE_INLINE __m256 _mm256_fmsub_ps(__m256 x, __m256 y, __m256 z) { return {fused(x.a, y.a, -z.a), fused(x.b, y.b, -z.b)}; }
STATE_INLINE __m256 _mm256_fnmadd_ps(__m256 x, __m256 y, __m256 z) { return {fused(-x.a, y.a, z.a), fused(-x.b, y.b, z.b)}; }
STATE_INLINE __m256 _mm256_round_ps(__m256 x, int) { return {nearest(x.a), nearest(x.b)}; }

STATE_INLINE __m256 _mm256_set1_ps(float x) { return {four(x), four(x)}; }
STATE_INLINE __m256i _mm256_set1_epi32(int x) { return {four(x), four(x)}; }
STATE_INLINE __m256i _mm256_set1_epi8(char x) { return _mm256_set1_epi32(int(uint8_t(x) * 0x01010101u)); }
STATE_INLINE __m256 _mm256_setzero_ps() { return {F4{}, F4{}}; }
STATE_INLINE __m256i _mm256_setzero_si256() { return {I4{}, I4{}}; }
STATE_INLINE __m256i _mm256_setr_epi32(int p, int q, int r, int s, int t, int u, int v, int w) {
  return {I4{p, q, r, s}, I4{t, u, v, w}};
}

template <class V>
STATE_INLINE V load_bytes(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
STATE_INLINE __m256 _mm256_loadu_ps(const float* p) { return load_bytes<__m256>(p); }
STATE_INLINE __m256 _mm256_load_ps(const float* p) { return load_bytes<__m256>(p); }
STATE_INLINE __m256i _mm256_loadu_si256(const __m256i* p) { return load_bytes<__m256i>(p); }
STATE_INLINE __m128i _mm_loadu_si128(const __m128i* p) { return load_bytes<__m128i>(p); }
STATE_INLINE void _mm256_storeu_ps(float* p, __m256 x) { std::memcpy(p, &x, sizeof x); }
STATE_INLINE void _mm256_store_ps(float* p, __m256 x) { std::memcpy(p, &x, sizeof x); }
STATE_INLINE void _mm256_storeu_si256(__m256i* p, __m256i x) { std::memcpy(static_cast<void*>(p), &x, sizeof x); }
STATE_INLINE void _mm256_store_si256(__m256i* p, __m256i x) { std::memcpy(static_cast<void*>(p), &x, sizeof x); }
STATE_INLINE void _mm_storeu_si128(__m128i* p, __m128i x) { std::memcpy(static_cast<void*>(p), &x, sizeof x); }
// lanes that are left out are not touched
STATE_INLINE __m256 _mm256_maskload_ps(const float* p, __m256i mask) {
  alignas(16) float all[8] = {};
  const int some = signs(mask.a) | signs(mask.b) << 4;
  for (int i = 0; i < 8; ++i) {
    if (some >> i & 1) all[i] = p[i];
  }
  return load_bytes<__m256>(all);
}
STATE_INLINE void _mm256_maskstore_ps(float* p, __m256i mask, __m256 x) {
  alignas(16) float all[8];
  _mm256_store_ps(all, x);
  const int some = signs(mask.a) | signs(mask.b) << 4;
  for (int i = 0; i < 8; ++i) {
    if (some >> i & 1) p[i] = all[i];
  }
}

STATE_INLINE __m128 _mm256_castps256_ps128(__m256 x) { return x.a; }
STATE_INLINE __m128i _mm256_castsi256_si128(__m256i x) { return x.a; }
STATE_INLINE __m128 _mm256_extractf128_ps(__m256 x, int half) { return half == 0 ? x.a : x.b; }
STATE_INLINE __m128i _mm256_extracti128_si256(__m256i x, int half) { return half == 0 ? x.a : x.b; }
STATE_INLINE __m256 _mm256_set_m128(__m128 high, __m128 low) { return {low, high}; }
STATE_INLINE __m256i _mm256_set_m128i(__m128i high, __m128i low) { return {low, high}; }

STATE_INLINE __m256i _mm256_cvtepu8_epi32(__m128i x) {
  const B16 bytes = (B16)x, zero = {};
  return {(I4)__builtin_shufflevector(bytes, zero, 0, 16, 16, 16, 1, 16, 16, 16, 2, 16, 16, 16, 3, 16, 16, 16),
          (I4)__builtin_shufflevector(bytes, zero, 4, 16, 16, 16, 5, 16, 16, 16, 6, 16, 16, 16, 7, 16, 16, 16)};
}
STATE_INLINE __m256i _mm256_cvtepu16_epi32(__m128i x) { return {widened_low(x), widened_high(x)}; }
STATE_INLINE __m256i _mm256_cvtepi16_epi32(__m128i x) {
  return _mm256_srai_epi32(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16), 16);
}
STATE_INLINE __m256 _mm256_cvtph_ps(__m128i x) { return {floats_of(widened_low(x)), floats_of(widened_high(x))}; }
STATE_INLINE __m128i _mm256_cvtps_ph(__m256 x, int) { return halves_of(x.a, x.b); }
// numbers of 16 bits to bytes that are as near
STATE_INLINE I4 packed_bytes(I4 x, I4 y, int low, int high) {
  const auto of = [low, high](S8 v) __attribute__((always_inline)) {
    const S8 least = S8{} + int16_t(low), most = S8{} + int16_t(high);
    v = (S8)((v < least) & least) | (S8)(~(v < least) & v);
    return (S8)((v > most) & most) | (S8)(~(v > most) & v);
  };
  return (I4)__builtin_shufflevector((B16)of((S8)x), (B16)of((S8)y), 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
STATE_INLINE __m256i _mm256_packs_epi16(__m256i x, __m256i y) {
  return {packed_bytes(x.a, y.a, INT8_MIN, INT8_MAX), packed_bytes(x.b, y.b, INT8_MIN, INT8_MAX)};
}
STATE_INLINE __m128i _mm_packus_epi16(__m128i x, __m128i y) { return packed_bytes(x, y, 0, UINT8_MAX); }

STATE_INLINE __m256 _mm256_cmp_ps(__m256 p, __m256 q, int how) {
  const auto of = [how](F4 x, F4 y) __attribute__((always_inline)) {
    switch (how) {
      case _CMP_LT_OQ: return (F4)(x < y);
      case _CMP_GT_OQ: return (F4)(x > y);
      case _CMP_GE_OQ: return (F4)(x >= y);
      case _CMP_NLT_UQ: return (F4)(~(I4)(x < y));
      case _CMP_UNORD_Q: return (F4)((I4)(x != x) | (I4)(y != y));
      default: __builtin_trap();
    }
  };
  return {of(p.a, q.a), of(p.b, q.b)};
}
STATE_INLINE int _mm256_movemask_ps(__m256 x) { return signs((I4)x.a) | signs((I4)x.b) << 4; }
STATE_INLINE int _mm256_movemask_epi8(__m256i x) {
  alignas(16) uint8_t all[32];
  std::memcpy(all, &x, sizeof x);
  uint32_t found = 0;
  for (int i = 0; i < 32; ++i) found |= uint32_t(all[i] >> 7) << i;
  return int(found);
}
STATE_INLINE __m256 _mm256_blendv_ps(__m256 x, __m256 y, __m256 second) {
  return {choose((I4)second.a >> 31, y.a, x.a), choose((I4)second.b >> 31, y.b, x.b)};
}

STATE_INLINE __m256 _mm256_permutevar8x32_ps(__m256 x, __m256i at) {
#ifdef __aarch64__
  const uint8x16x2_t table = {{(uint8x16_t)x.a, (uint8x16_t)x.b}};
  const auto of = [&table](I4 lane) __attribute__((always_inline)) {
    const I4 bytes = (lane & four(7)) * four(0x04040404) + four(0x03020100);
    return (F4)vqtbl2q_u8(table, (uint8x16_t)bytes);
  };
  return {of(at.a), of(at.b)};
#else
  alignas(16) float all[8], picked[8];
  alignas(16) int lanes[8];
  _mm256_store_ps(all, x);
  std::memcpy(lanes, &at, sizeof lanes);
  for (int i = 0; i < 8; ++i) picked[i] = all[lanes[i] & 7];
  return load_bytes<__m256>(picked);
#endif
}
STATE_INLINE __m256 _mm256_permute_ps(__m256 x, int how) { return {pick_four(x.a, x.a, how), pick_four(x.b, x.b, how)}; }
STATE_INLINE __m256 _mm256_shuffle_ps(__m256 x, __m256 y, int how) { return {pick_four(x.a, y.a, how), pick_four(x.b, y.b, how)}; }
STATE_INLINE __m256i _mm256_permute4x64_epi64(__m256i x, int how) {
  const L2 low = (L2)x.a, high = (L2)x.b;
  const int64_t all[4] = {low[0], low[1], high[0], high[1]};
  return {(I4)L2{all[how & 3], all[how >> 2 & 3]}, (I4)L2{all[how >> 4 & 3], all[how >> 6 & 3]}};
}

STATE_INLINE __m128 _mm_add_ps(__m128 x, __m128 y) { return x + y; }
STATE_INLINE __m128 _mm_add_ss(__m128 x, __m128 y) { return F4{x[0] + y[0], x[1], x[2], x[3]}; }
STATE_INLINE __m128 _mm_movehl_ps(__m128 x, __m128 y) { return (F4)__builtin_shufflevector(y, x, 2, 3, 6, 7); }
STATE_INLINE __m128 _mm_movehdup_ps(__m128 x) { return (F4)__builtin_shufflevector(x, x, 1, 1, 3, 3); }
STATE_INLINE float _mm_cvtss_f32(__m128 x) { return x[0]; }
STATE_INLINE __m128i _mm_cvtsi32_si128(int x) { return I4{x, 0, 0, 0}; }
STATE_INLINE __m128 _mm_cvtph_ps(__m128i x) { return floats_of(widened_low(x)); }
STATE_INLINE __m128i _mm_srli_si128(__m128i x, int) {  // by eight bytes, the one number that is used
  return (I4)__builtin_shufflevector(x, I4{}, 2, 3, 4, 5);
}

STATE_INLINE void _mm_prefetch(const char* p, int) { __builtin_prefetch(p); }
STATE_INLINE void _mm_pause() {
#ifdef __aarch64__
  asm volatile("yield");
#endif
}

}  // namespace state
