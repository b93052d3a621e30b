// Sixteen lanes of what nibbles.h works with: codes of 4 bits as floats and back, and quotients that are as near as it needs.
#pragma once

#include "tile.h"

LLMCOMPRESS_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,fma,f16c,bmi2")

namespace state {

// Eight vectors in pairs come from 64 bytes of codes: lane i, byte j is byte 16 j + i. The permutation and its inverse.
STATE_INLINE __m512i to_lanes() {
  alignas(64) static constexpr uint8_t index[64] = {
      0, 16, 32, 48, 1, 17, 33, 49, 2,  18, 34, 50, 3,  19, 35, 51, 4,  20, 36, 52, 5,  21, 37, 53, 6,  22, 38, 54, 7,  23, 39, 55,
      8, 24, 40, 56, 9, 25, 41, 57, 10, 26, 42, 58, 11, 27, 43, 59, 12, 28, 44, 60, 13, 29, 45, 61, 14, 30, 46, 62, 15, 31, 47, 63};
  return _mm512_load_si512(index);
}

STATE_INLINE __m512i to_bytes() {
  alignas(64) static constexpr uint8_t index[64] = {
      0, 4, 8,  12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 1, 5, 9,  13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61,
      2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62, 3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47, 51, 55, 59, 63};
  return _mm512_load_si512(index);
}

// Code K of every lane as a float. The upper half of a float's bits tells a code, so codes 4 to 7, which lie in the upper
// half of their lane, are looked up there, by five bits of which the highest does not count.
template <int K>
STATE_INLINE __m512 code_of(__m512i raw) {
  const __m512i at = K % 4 == 0 ? raw : _mm512_srli_epi32(raw, 4 * (K % 4));
  if constexpr (K < 4) {
    return _mm512_permutexvar_ps(at, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
  } else {
    alignas(64) static constexpr uint16_t halves[32] = {
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, at, _mm512_load_si512(halves)));
  }
}

// 1 / v of normal numbers, within 1.1 2^-24.
STATE_INLINE __m512 reciprocal(__m512 v) {
  const __m512 found = _mm512_rcp14_ps(v);
  return _mm512_fmadd_ps(found, _mm512_fnmadd_ps(v, found, _mm512_set1_ps(1.0f)), found);
}

// fp16 numbers over 7, rounded as the quotient is.
STATE_INLINE __m512 over_seven(__m512 v) {
  const __m512 part = _mm512_set1_ps(1.0f / 7.0f), found = _mm512_mul_ps(v, part);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(found, _mm512_set1_ps(7.0f), v), part, found);
}

STATE_INLINE __m512 size_of(__m512 v) { return _mm512_and_ps(v, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff))); }

// The sum of one row, in the order of folded_sum_rows.
STATE_INLINE float folded_sum(__m512 even, __m512 odd) {
  __m512 both[2] = {even, odd};
  float sum[2];
  for (int h = 0; h < 2; ++h) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(both[h]), _mm512_extractf32x8_ps(both[h], 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    sum[h] = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  return sum[0] + sum[1];
}

}  // namespace state

LLMCOMPRESS_TARGET_END
