// Inputs of W8A8 products for eight tokens at a time: what lowbit.inc's quantize_block does for one plane and 8-bit weights,
// byte for byte, in a quarter of the time. Chunks of fewer columns and tokens that are all zero or not finite are left to it.
#pragma once

#include "llmcompress/lowbit.h"
#include "tile.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,bmi2")

namespace state {

// One token's 64 columns: sixteen quads of bytes, scale and sum; false where the general code has to do it.
STATE_INLINE bool round_chunk(const float* x, __m512i& quads, float& scale, float& sum) {
  const __m512 magnitude = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
  __m512 v[4], most = _mm512_setzero_ps();
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_loadu_ps(x + 16 * i);
    most = _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(most), _mm512_castps_si512(_mm512_and_ps(v[i], magnitude))));
  }
  const uint32_t largest = _mm512_reduce_max_epu32(_mm512_castps_si512(most));
  if (largest >= 0x7f800000 || largest == 0) return false;
  float top;
  std::memcpy(&top, &largest, 4);
  scale = top / 127.0f;
  const float factor = 1.0f / scale;
  if (!(factor < 3.0e38f)) return false;
  __m512i q[4], total = _mm512_setzero_si512();
  for (int i = 0; i < 4; ++i) {
    q[i] = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], _mm512_set1_ps(factor)));
    total = _mm512_add_epi32(total, q[i]);
  }
  sum = static_cast<float>(_mm512_reduce_add_epi32(total));
  // 16 dwords each of four vectors to bytes: the packs work within 128-bit lanes, the permutation puts quads in order
  const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
  quads = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
  return true;
}

// Block `block` of eight tokens; false where nothing useful was written.
STATE_INLINE bool round_tokens(const llmcompress::Chunk* parts, int64_t count, const float* x, int64_t stride,
                               const llmcompress::Activations& a, int64_t columns, int64_t block) {
  constexpr int tokens = 8;
  int8_t* to = a.bytes + block * tokens * columns;
  for (int64_t c = 0; c < count; ++c, to += 64 * tokens) {
    __m512i rows[tokens];
    for (int t = 0; t < tokens; ++t) {
      const int64_t place = block * tokens * count + c * tokens + t;
      if (!round_chunk(x + (block * tokens + t) * stride + parts[c].first, rows[t], a.scale[place], a.sum[place])) return false;
    }
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

#pragma GCC pop_options
