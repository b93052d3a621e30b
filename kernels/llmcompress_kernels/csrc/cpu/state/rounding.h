// Inputs of W8A8 products for eight tokens at a time: what lowbit.inc's quantize_block does for one plane and 8-bit weights,
// byte for byte, in a quarter of the time. Chunks of fewer columns and tokens that are all zero or not finite are left to it.
#pragma once

#include "llmcompress/lowbit.h"
#include "tile.h"

namespace state {

// What `fold` makes of the sixteen lanes of each of eight vectors, a lane to a vector: eight reductions in 24 operations.
template <class Fold>
STATE_INLINE __m256i reduce_eight(const __m512i* of, Fold fold) {
  __m512i two[4], four[2];
  for (int i = 0; i < 4; ++i) {
    two[i] = fold(_mm512_unpacklo_epi32(of[2 * i], of[2 * i + 1]), _mm512_unpackhi_epi32(of[2 * i], of[2 * i + 1]));
  }
  for (int i = 0; i < 2; ++i) {
    four[i] = fold(_mm512_unpacklo_epi64(two[2 * i], two[2 * i + 1]), _mm512_unpackhi_epi64(two[2 * i], two[2 * i + 1]));
  }
  // 128-bit lanes: parts of the first four, then of the others
  const __m512i eight = fold(_mm512_shuffle_i32x4(four[0], four[1], 0x44), _mm512_shuffle_i32x4(four[0], four[1], 0xee));
  return _mm512_castsi512_si256(fold(_mm512_shuffle_i32x4(eight, eight, 0x88), _mm512_shuffle_i32x4(eight, eight, 0xdd)));
}

// 64 columns of eight tokens: sixteen quads of bytes, each xor `bias`, scale and sum of each; false where the general code has
// to do it.
STATE_INLINE bool round_chunk(const float* x, int64_t stride, __m512i bias, __m512i* quads, float* scale, float* sum) {
  constexpr int tokens = 8;
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most[tokens], total[tokens];
  for (int t = 0; t < tokens; ++t) {
    most[t] = _mm512_setzero_si512();
    for (int i = 0; i < 4; ++i) {
      most[t] = _mm512_max_epu32(most[t], _mm512_and_si512(_mm512_loadu_si512(x + t * stride + 16 * i), magnitude));
    }
  }
  const __m256i largest = reduce_eight(most, [](__m512i a, __m512i b) { return _mm512_max_epu32(a, b); });
  const __m256 scales = _mm256_div_ps(_mm256_castsi256_ps(largest), _mm256_set1_ps(127.0f));
  const __m256 factors = _mm256_div_ps(_mm256_set1_ps(1.0f), scales);
  const __mmask8 fits = _mm256_cmplt_epu32_mask(largest, _mm256_set1_epi32(0x7f800000)) &
                        _mm256_cmp_ps_mask(factors, _mm256_set1_ps(3.0e38f), _CMP_LT_OQ);
  if (fits != 0xff) return false;  // zero has an infinite factor
  alignas(32) float by[tokens];
  _mm256_store_ps(by, factors);
  for (int t = 0; t < tokens; ++t) {
    __m512i q[4];
    for (int i = 0; i < 4; ++i) {
      q[i] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + t * stride + 16 * i), _mm512_set1_ps(by[t])));
    }
    total[t] = _mm512_add_epi32(_mm512_add_epi32(q[0], q[1]), _mm512_add_epi32(q[2], q[3]));
    // 16 dwords each of four vectors to bytes: the packs work within 128-bit lanes, the permutation puts quads in order
    const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    quads[t] = _mm512_xor_si512(_mm512_permutexvar_epi32(order, bytes), bias);
  }
  const __m256i sums = reduce_eight(total, [](__m512i a, __m512i b) { return _mm512_add_epi32(a, b); });
  _mm256_storeu_ps(scale, scales);
  _mm256_storeu_ps(sum, _mm256_cvtepi32_ps(sums));
  return true;
}

// Block `block` of eight tokens; false where nothing useful was written.
STATE_INLINE bool round_tokens(const llmcompress::Chunk* parts, int64_t count, const float* x, int64_t stride,
                               const llmcompress::Activations& a, int64_t columns, int64_t block) {
  constexpr int tokens = 8;
  int8_t* to = a.bytes + block * tokens * columns;
  const __m512i bias = _mm512_set1_epi8(a.biased ? static_cast<char>(0x80) : 0);
  for (int64_t c = 0; c < count; ++c, to += 64 * tokens) {
    __m512i rows[tokens];
    const int64_t place = (block * count + c) * tokens;
    const float* from = x + block * tokens * stride + parts[c].first;
    if (!round_chunk(from, stride, bias, rows, a.scale + place, a.sum + place)) return false;
    // [token][quad] to [quad][token]: pairs, fours, then the two halves of each quad's eight tokens
    __m512i two[tokens], four[tokens];
    for (int t = 0; t < tokens; t += 2) {
      two[t] = _mm512_unpacklo_epi32(rows[t], rows[t + 1]);
      two[t + 1] = _mm512_unpackhi_epi32(rows[t], rows[t + 1]);
    }
    for (int t = 0; t < tokens; t += 4) {
      four[t] = _mm512_unpacklo_epi64(two[t], two[t + 2]);
      four[t + 1] = _mm512_unpackhi_epi64(two[t], two[t + 2]);
      four[t + 2] = _mm512_unpacklo_epi64(two[t + 1], two[t + 3]);
      four[t + 3] = _mm512_unpackhi_epi64(two[t + 1], two[t + 3]);
    }
    // 128-bit lane L of four[j] and four[4 + j]: quad 4 L + j, tokens 0-3 and 4-7
    for (int j = 0; j < 4; ++j) {
      const __m512i low = _mm512_shuffle_i64x2(four[j], four[4 + j], 0x44), high = _mm512_shuffle_i64x2(four[j], four[4 + j], 0xee);
      // low: L0 L1 of the first, L0 L1 of the second
      const __m512i first = _mm512_shuffle_i64x2(low, low, 0xd8), second = _mm512_shuffle_i64x2(high, high, 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * j), _mm512_castsi512_si256(first));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * (4 + j)), _mm512_extracti64x4_epi64(first, 1));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * (8 + j)), _mm512_castsi512_si256(second));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * (12 + j)), _mm512_extracti64x4_epi64(second, 1));
    }
  }
  return true;
}

}  // namespace state
