// One token of a head whose state is decoded into a tile as the definition says, rounded and encoded again.
#pragma once

#include "tile.h"

namespace state {

#if defined(LLMCOMPRESS_AVX2) && !defined(LLMCOMPRESS_NARROW)
template <int J>
constexpr bool has_dithered_nibbles() {
  return J % 2 == 0;
}

// Codes of dithered_codes() of a head none of whose scales was clamped or is subnormal, so that values are near what codes hold:
// narrowed first and clamped as bytes, 64 codes at a time, half of the operations. A number that is none becomes the least, too.
template <int J>
STATE_INLINE void dithered_nibbles(const Scales& s, const float* tile, uint8_t* codes, int p) {
  constexpr int n = 32 * J;
  const __m256i most = _mm256_set1_epi8(7), least = _mm256_set1_epi8(-7), low = _mm256_set1_epi8(15);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int r = 0; r < p; ++r) {
    const __m256 inverse = _mm256_set1_ps(s.inverse[r]);
    for (int i = 0; i < n; i += 64) {
      // of eight states
      const auto code = [&](int at) __attribute__((always_inline)) {
        const __m256 part = _mm256_mul_ps(_mm256_load_ps(tile + r * n + at), inverse);
        return _mm256_cvtps_epi32(_mm256_fmadd_ps(part, _mm256_load_ps(s.unstep + at), _mm256_load_ps(s.dither + at)));
      };
      const auto clamped = [&](int at) __attribute__((always_inline)) {
        const __m256i first = _mm256_packs_epi32(code(at), code(at + 8)), second = _mm256_packs_epi32(code(at + 32), code(at + 40));
        return _mm256_and_si256(_mm256_max_epi8(_mm256_min_epi8(_mm256_packs_epi16(first, second), most), least), low);
      };
      const __m256i both = _mm256_or_si256(clamped(i), _mm256_slli_epi32(clamped(i + 16), 4));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + (r * n + i) / 2), _mm256_permutevar8x32_epi32(both, order));
    }
  }
}
#else
template <int J>
constexpr bool has_dithered_nibbles() {
  return false;
}
template <int J>
STATE_INLINE void dithered_nibbles(const Scales&, const float*, uint8_t*, int) {}
#endif

template <int Bits, int J, Mode mode>
STATE_INLINE void encode_rows(const Scales& now, const float* tile, uint8_t* codes, uint16_t* channel, int p) {
  constexpr int n = 32 * J;
  constexpr float qmax = (1 << (Bits - 1)) - 1;
  if constexpr (Bits == 4 && dithered(mode) && has_dithered_nibbles<J>()) {
    if (!now.wide) return dithered_nibbles<J>(now, tile, codes, p);
  }
  Refit refit;
  for (int base = 0; base < p; base += kRows) {
    for (int i = 0; i < kRows; ++i) {
      const int r = base + i;
      __m512 q[2 * J];
      codes_of_row<J, mode>(now, tile + r * n, r, qmax, q);
      for (int j = 0; j < J; ++j) {
        encode_pair<Bits>(codes + r * (n * Bits / 8) + j * pair_bytes<Bits>(), q[2 * j], q[2 * j + 1]);
      }
      if constexpr (mode == kRefitted) refit.add<J>(now, tile + r * n, r, i, q);
    }
    if constexpr (mode == kRefitted) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(channel + base), refit.scales(now, base));
    }
  }
}

// earlier(r, pairs, old) takes in what comes before this token in some pairs of row r.
template <int Bits, int J, Mode mode, class Earlier>
STATE_INLINE void update_tile(uint8_t* codes, uint16_t* channel, uint16_t* scale, const uint16_t* fixed, float decay, const float* x,
                              const float* b, const float* c, float* y, float* tile, int p, Earlier earlier) {
  constexpr int n = 32 * J;
  constexpr float qmax = (1 << (Bits - 1)) - 1;
  constexpr int row_bytes = Bits == 4 ? n / 2 : n;
  Scales now;
  alignas(64) float old_channel[kMaxChannels], old_step[n], natural[n];
  for (int r = 0; r < p; r += kRows) _mm512_store_ps(old_channel + r, half_to_float((calibrated(mode) ? fixed : channel) + r));
  for (int i = 0; i < n; i += 16) {
    _mm512_store_ps(natural + i, _mm512_div_ps(half_to_float(scale + i), _mm512_set1_ps(qmax)));
  }
  split_pairs(natural, old_step, n);
  if constexpr (calibrated(mode)) fixed_channels(now, fixed, p);
  auto load = [&]<int Count>(int r, const int (&pairs)[Count], __m512* old) __attribute__((always_inline)) {
    const __m512 sp = _mm512_set1_ps(old_channel[r]);
    for (int i = 0; i < Count; ++i) {
      const int j = pairs[i];
      __m512 *const even = old + 2 * i, *const odd = even + 1;
      decode_pair<Bits>(codes + r * row_bytes + j * pair_bytes<Bits>(), *even, *odd);
      *even = _mm512_mul_ps(*even, _mm512_mul_ps(sp, _mm512_load_ps(old_step + 32 * j)));
      *odd = _mm512_mul_ps(*odd, _mm512_mul_ps(sp, _mm512_load_ps(old_step + 32 * j + 16)));
    }
    earlier(r, pairs, old);
  };
  refresh<J, calibrated(mode)>(now, tile, p, decay, x, b, c, y, qmax, channel, scale, load);
  encode_rows<Bits, J, mode>(now, tile, codes, channel, p);
}

}  // namespace state
