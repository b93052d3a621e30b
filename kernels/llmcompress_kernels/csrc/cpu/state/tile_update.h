// One token of a head whose state is decoded into a tile as the definition says, rounded and encoded again.
#pragma once

#include "tile.h"

#pragma GCC push_options
STATE_TARGET

namespace state {

template <int Bits, int J, Mode mode>
STATE_INLINE void encode_rows(const Scales& now, const float* tile, uint8_t* codes, uint16_t* channel, int p) {
  constexpr int n = 32 * J;
  constexpr float qmax = (1 << (Bits - 1)) - 1;
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

// Earlier(r, v, even, odd) takes in what comes before this token in row r, pair v.
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
  auto load = [&](int r, int j, __m512& even, __m512& odd) __attribute__((always_inline)) {
    decode_pair<Bits>(codes + r * row_bytes + j * pair_bytes<Bits>(), even, odd);
    const __m512 sp = _mm512_set1_ps(old_channel[r]);
    even = _mm512_mul_ps(even, _mm512_mul_ps(sp, _mm512_load_ps(old_step + 32 * j)));
    odd = _mm512_mul_ps(odd, _mm512_mul_ps(sp, _mm512_load_ps(old_step + 32 * j + 16)));
    earlier(r, j, even, odd);
  };
  refresh<J, calibrated(mode)>(now, tile, p, decay, x, b, c, y, qmax, channel, scale, load);
  encode_rows<Bits, J, mode>(now, tile, codes, channel, p);
}

}  // namespace state

#pragma GCC pop_options
