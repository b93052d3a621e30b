// One token of a head whose state lies in 4-bit codes, for processors with VBMI and VBMI2 (Ice Lake, Zen 4, and later).
// Codes and scales are those of tile.h to the last bit; it serves the rest.
//
// Per vector of sixteen states, two of which can begin in a cycle, this takes some 17 operations (14.5 with a calibrated
// channel scale), where tile.h takes 21:
//
//   old codes     a byte permutation turns a row of codes into eight nibbles a lane: shift, table            2
//   fresh state   code (channel step), decay old + x B, each product and sum rounded by itself               5
//   read-out      one fused product                                                                          1
//   channel       |u|, halves of a row added (0.75), sixteen rows turned (0.7); not if calibrated            2.5
//   read-out      sixteen rows turned                                                                        0.4
//   state scale   u / channel, largest                                                                       2
//   new codes     u / channel times 1 / step, a little less and a little more, must round alike; or, with    3
//                 a dither, one fused product with 1 / step, rounded (2)
//   pack          a funnel shift pushes a nibble into its lane                                               1.1
//
// Without fusing, which the definition forbids, nothing of this can go. So sixteen states take 8.5 cycles at best, where
// fp32 moves 128 bytes: on a machine that gives each core 9 bytes a cycle (two cores, 49 GB/s) that is 14 cycles, less
// than twice as long whatever is done here. Cores that share a bandwidth among more of them gain more.
#pragma once

#include "tile.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,fma,f16c,bmi2")

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

// How far an approximate quotient may be from the definition's: 3e-7, and what the bounds themselves are rounded by.
constexpr float kOff = 6e-7f;

template <int J, Mode mode>
struct Nibbles {
  static constexpr bool Calibrated = calibrated(mode);
  static constexpr int n = 32 * J, vectors = 2 * J, bytes = 16 * J;
  static constexpr float qmax = 7.0f;

  uint8_t* codes;
  const float *x, *b, *c;  // b and c in pairs
  __m512 decay;
  float* tile;  // [P, N] in pairs: u / channel
  Scales now;
  alignas(64) float channel[kMaxChannels], step[n];  // as stored before this token
  alignas(64) float less[n], more[n];                // bounds of 1 / step; with a dither 1 / step and the dither

  // Code vectors 8 q .. 8 q + 7 of the tile; with two pairs a row (N = 64) that is two rows.
  inline __attribute__((always_inline)) __m512i lanes(int q) const {
    return _mm512_permutexvar_epi8(to_lanes(), _mm512_loadu_si512(codes + 64 * q));
  }

  // Vector k of those: code, then the fresh state of row r, vector v.
  inline __attribute__((always_inline)) __m512 fresh(__m512i raw, int k, int r, int v) const {
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    const __m512 code = _mm512_permutexvar_ps(k == 0 ? raw : _mm512_srli_epi32(raw, 4 * k), values);
    const __m512 old = _mm512_mul_ps(code, _mm512_mul_ps(_mm512_set1_ps(channel[r]), _mm512_load_ps(step + 16 * v)));
    return _mm512_add_ps(_mm512_mul_ps(decay, old), _mm512_mul_ps(_mm512_set1_ps(x[r]), _mm512_load_ps(b + 16 * v)));
  }

  // The same for one vector alone, as long as its codes are the old ones.
  __attribute__((noinline)) __m512 again(int r, int v) const {
    const int at = r * vectors + v;
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    const __m512i raw = _mm512_srlv_epi32(lanes(at / 8), _mm512_set1_epi32(at % 8 * 4));
    const __m512 code = _mm512_permutexvar_ps(raw, values);
    const __m512 old = _mm512_mul_ps(code, _mm512_mul_ps(_mm512_set1_ps(channel[r]), _mm512_load_ps(step + 16 * v)));
    return _mm512_add_ps(_mm512_mul_ps(decay, old), _mm512_mul_ps(_mm512_set1_ps(x[r]), _mm512_load_ps(b + 16 * v)));
  }

  // Sixteen rows: fresh states into the tile, read-outs, channel scales.
  inline __attribute__((always_inline)) void rows(int base, float* y, uint16_t* channel_out) {
    const __m512 magnitude = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
    alignas(64) float even[kRows][16], odd[kRows][16], out[kRows][16];
    // rows whose codes come in one vector go together, so that every shift is a constant
    constexpr int shared = vectors < 8 ? 8 / vectors : 1;
    __m512i raw{};
    for (int first = 0; first < kRows; first += shared) {
      for (int s = 0; s < shared; ++s) {
        const int i = first + s, r = base + i;
        __m512 read = _mm512_setzero_ps(), size[vectors];
        for (int v = 0; v < vectors; ++v) {
          const int k = (s * vectors + v) % 8;
          if (k == 0) raw = lanes((r * vectors + v) / 8);
          const __m512 u = fresh(raw, k, r, v);
          _mm512_store_ps(tile + r * n + 16 * v, u);
          read = _mm512_fmadd_ps(u, _mm512_load_ps(c + 16 * v), read);
          if constexpr (!Calibrated) size[v] = _mm512_and_ps(u, magnitude);
        }
        _mm512_store_ps(out[i], read);
        if constexpr (!Calibrated) {
          fold_pairs<J>(size, even[i], odd[i]);
        }
      }
    }
    if constexpr (!Calibrated) channel_scales(now, base, even, odd, n, channel_out);
    _mm512_storeu_ps(y + base, sum_rows(out));
  }

  // u / channel of sixteen rows in the place of u, and what they add to the largest.
  inline __attribute__((always_inline)) void divide(int base, __m512* largest) {
    for (int r = base; r < base + kRows; ++r) {
      const __m512 inverse = _mm512_set1_ps(now.inverse[r]);
      for (int v = 0; v < vectors; ++v) {
        const __m512 part = _mm512_mul_ps(_mm512_load_ps(tile + r * n + 16 * v), inverse);
        _mm512_store_ps(tile + r * n + 16 * v, part);
        largest[v] = _mm512_range_ps(largest[v], part, 0x0b);
      }
    }
  }

  // The largest |u| / channel of lanes whose scale hangs on the last bits: divided where a row comes near to it.
  __attribute__((noinline)) __m512 exact(int v, __m512 most, __mmask16 unsure, int p) const {
    const __m512 magnitude = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
    const __m512 near = _mm512_mul_ps(most, _mm512_set1_ps(1.0f - 1e-6f));
    __m512 found = _mm512_setzero_ps();
    for (int r = 0; r < p; ++r) {
      const __m512 size = _mm512_and_ps(_mm512_load_ps(tile + r * n + 16 * v), magnitude);
      if (_mm512_mask_cmp_ps_mask(unsure, size, near, _CMP_GE_OQ) == 0) continue;
      const __m512 quotient = _mm512_div_ps(again(r, v), _mm512_set1_ps(now.channel[r]));
      found = _mm512_max_ps(found, _mm512_and_ps(quotient, magnitude));
    }
    return _mm512_mask_mov_ps(most, unsure, found);
  }

  // Scales of the tile's columns, as state_scales has them.
  inline __attribute__((always_inline)) void columns(const __m512* largest, int p, uint16_t* out) {
    alignas(64) float scale[n], natural[n];
    now.wide = false;
    for (int v = 0; v < vectors; ++v) {
      __m512 most = largest[v];
      const __m256i low = to_half(clamp_scale(_mm512_mul_ps(most, _mm512_set1_ps(1.0f - 4e-7f))));
      const __m256i high = to_half(clamp_scale(_mm512_mul_ps(most, _mm512_set1_ps(1.0f + 4e-7f))));
      const __mmask16 unsure = _mm256_cmpneq_epi16_mask(low, high);
      if (__builtin_expect(unsure != 0, 0)) most = exact(v, most, unsure, p);
      // beyond fp16's normal numbers a scale may be far below the maximum that it stands for
      const __mmask16 tiny = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(most, _mm512_setzero_ps(), _CMP_GT_OQ), most,
                                                     _mm512_set1_ps(kNormal), _CMP_LT_OQ);
      now.wide |= (tiny | _mm512_cmp_ps_mask(most, _mm512_set1_ps(kLargest), _CMP_NLT_UQ)) != 0;
      const __m256i half = to_half(clamp_scale(most));
      const __m512 value = _mm512_cvtph_ps(half);
      const __m512 size = _mm512_div_ps(value, _mm512_set1_ps(qmax)), unstep = _mm512_div_ps(_mm512_set1_ps(1.0f), size);
      _mm512_store_ps(scale + 16 * v, value);
      _mm512_store_ps(now.step + 16 * v, size);
      _mm512_store_ps(less + 16 * v, dithered(mode) ? unstep : _mm512_mul_ps(unstep, _mm512_set1_ps(1.0f - kOff)));
      _mm512_store_ps(more + 16 * v, dithered(mode) ? dither_of(half) : _mm512_mul_ps(unstep, _mm512_set1_ps(1.0f + kOff)));
    }
    join_pairs(scale, natural, n);
    for (int i = 0; i < n; i += 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), to_half(_mm512_load_ps(natural + i)));
    }
  }

  // A code as the definition finds it, in the lowest bits.
  inline __attribute__((always_inline)) __m512i divided(int r, int v) const {
    const __m512 size = _mm512_mul_ps(_mm512_set1_ps(now.channel[r]), _mm512_load_ps(now.step + 16 * v));
    __m512 value = _mm512_div_ps(again(r, v), size);
    if constexpr (dithered(mode)) {
      value = _mm512_fmadd_ps(_mm512_load_ps(tile + r * n + 16 * v), _mm512_load_ps(less + 16 * v), _mm512_load_ps(more + 16 * v));
    }
    value = _mm512_min_ps(_mm512_max_ps(value, _mm512_set1_ps(-qmax)), _mm512_set1_ps(qmax));
    return _mm512_castps_si512(_mm512_add_ps(value, _mm512_set1_ps(kRound)));
  }

  __attribute__((noinline)) __m512i divided(int q) const {
    __m512i packed = _mm512_setzero_si512();
    for (int k = 0; k < 8; ++k) packed = _mm512_shldi_epi32(divided((8 * q + k) / vectors, (8 * q + k) % vectors), packed, 28);
    return packed;
  }

  void encode(int p) {
    const __m512 round = _mm512_set1_ps(kRound);
    for (int q = 0; q < p * vectors / 8; ++q) {
      __m512i packed = _mm512_setzero_si512(), differ = packed;
      for (int k = 0; k < 8; ++k) {
        const int v = vectors < 8 ? k % vectors : (8 * q + k) % vectors;
        const __m512 part = _mm512_load_ps(tile + 128 * q + 16 * k);
        if constexpr (dithered(mode)) {
          // a dither of at most 15/32 keeps what is a little above qmax from the next code
          const __m512 value = _mm512_fmadd_ps(part, _mm512_load_ps(less + 16 * v), _mm512_load_ps(more + 16 * v));
          packed = _mm512_shldi_epi32(_mm512_castps_si512(_mm512_add_ps(value, round)), packed, 28);
          continue;
        }
        const __m512i low = _mm512_castps_si512(_mm512_fmadd_ps(part, _mm512_load_ps(less + 16 * v), round));
        const __m512i high = _mm512_castps_si512(_mm512_fmadd_ps(part, _mm512_load_ps(more + 16 * v), round));
        differ = _mm512_ternarylogic_epi32(differ, low, high, 0xf6);  // differ | (low ^ high)
        packed = _mm512_shldi_epi32(low, packed, 28);
      }
      const bool near = !dithered(mode) && _mm512_test_epi32_mask(differ, differ) != 0;
      if (__builtin_expect(now.wide || near, 0)) packed = divided(q);
      _mm512_storeu_si512(codes + 64 * q, _mm512_permutexvar_epi8(to_bytes(), packed));
      // the next head's codes follow
      _mm_prefetch(reinterpret_cast<const char*>(codes + p * bytes + 64 * q), _MM_HINT_T0);
    }
  }
};

// As Head of heads.h.
template <int J, Mode mode>
void update_nibbles(uint8_t* codes, uint16_t* channel, uint16_t* scale, const uint16_t* fixed, float decay, const float* x,
                    const float* b, const float* c, float* y, float* tile, int p) {
  static_assert(J >= 2);
  Nibbles<J, mode> head;
  head.codes = codes, head.x = x, head.b = b, head.c = c, head.tile = tile;
  head.decay = _mm512_set1_ps(decay);
  alignas(64) float natural[32 * J];
  for (int r = 0; r < p; r += kRows) _mm512_store_ps(head.channel + r, half_to_float((calibrated(mode) ? fixed : channel) + r));
  for (int i = 0; i < 32 * J; i += 16) {
    _mm512_store_ps(natural + i, _mm512_div_ps(half_to_float(scale + i), _mm512_set1_ps(head.qmax)));
  }
  split_pairs(natural, head.step, 32 * J);
  if constexpr (calibrated(mode)) fixed_channels(head.now, fixed, p);
  __m512 largest[2 * J];
  for (int v = 0; v < 2 * J; ++v) largest[v] = _mm512_setzero_ps();
  // channel scales come late (a square root, a division): the next rows do not wait for them
  head.rows(0, y, channel);
  for (int base = kRows; base < p; base += kRows) {
    head.rows(base, y, channel);
    head.divide(base - kRows, largest);
  }
  head.divide(p - kRows, largest);
  head.columns(largest, p, scale);
  head.encode(p);
}

}  // namespace state

#pragma GCC pop_options
