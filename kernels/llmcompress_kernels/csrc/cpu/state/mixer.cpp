// One decode step of a Mamba-2 mixer between its two projections: convolution, time steps, state update, skip, gate and
// norm. Transcendental functions differ from libm's in the last bits; the state update itself is that of update.cpp.
#include <vector>

#include "elementwise.h"

namespace state {
extern "C" {

int llmc_dsq_update(uint8_t*, uint16_t*, uint16_t*, const uint16_t*, const float*, const float*, const float*, const float*,
                    float*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
int llmc_dsq_replay_update(uint8_t*, uint16_t*, uint16_t*, const uint16_t*, float*, int32_t*, const float*, const float*,
                           const float*, const float*, float*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                           int64_t, int64_t);
int llmc_state_update(float*, const float*, const float*, const float*, const float*, float*, int64_t, int64_t, int64_t,
                      int64_t, int64_t);

// projected [S, 2I + 2GN + H], conv [S, C, 4] and the packed state (or floats [S, H, P, N] with codes null) are
// replaced; out [S, I]. `gain` is the norm's weight [I], each of G groups normed by itself. `scratch` holds
// S * (C + H + 2I) floats. With `recent` and `count`, which are replaced, a packed state has a replay window.
__attribute__((visibility("default"))) int llmc_mamba2_decode(
    const float* projected, float* conv, const float* conv_weight, const float* conv_bias, const float* dt_bias,
    const float* a, const float* d, const float* gain, uint8_t* codes, uint16_t* channel, uint16_t* scale,
    const uint16_t* fixed, float* floats, float* recent, int32_t* count, float* scratch, float* out, int64_t window,
    int64_t sequences, int64_t heads, int64_t groups, int64_t channels, int64_t states, int64_t bits, int64_t epsilon_bits,
    int64_t refit, int64_t dither) {
  const int64_t inner = heads * channels, both = groups * states, width = inner + 2 * both, row = inner + width + heads;
  if (inner % 16 != 0 || both % 16 != 0 || (inner / groups) % 16 != 0) return 1;
  float epsilon;
  const int32_t raw = static_cast<int32_t>(epsilon_bits);
  std::memcpy(&epsilon, &raw, 4);
  float *mixed = scratch, *decay = mixed + sequences * width, *drive = decay + sequences * heads,
        *y = drive + sequences * inner;
  // B and C of all sequences side by side, as the state update wants them, and the time steps
  std::vector<float> bc(2 * sequences * both + sequences * heads);
  float *b = bc.data(), *c = b + sequences * both, *dt = c + sequences * both;
#pragma omp parallel for schedule(static) if (sequences > 1)
  for (int64_t s = 0; s < sequences; ++s) {
    const float *in = projected + s * row + inner, *raw_dt = in + width;
    float* x = mixed + s * width;
    for (int64_t i = 0; i < width; i += 16) {
      __m512 value = convolve16(conv + (s * width + i) * 4, conv_weight + 4 * i, _mm512_loadu_ps(in + i));
      if (conv_bias != nullptr) value = _mm512_add_ps(value, _mm512_loadu_ps(conv_bias + i));
      _mm512_storeu_ps(x + i, silu16(value));
    }
    std::memcpy(b + s * both, x + inner, sizeof(float) * both);
    std::memcpy(c + s * both, x + inner + both, sizeof(float) * both);
    float* steps = dt + s * heads;
    time_steps(raw_dt, dt_bias, a, 0.0f, 3.0e38f, heads, steps, decay + s * heads);
    for (int64_t h = 0; h < heads; ++h) {
      const __m512 by = _mm512_set1_ps(steps[h]);
      for (int64_t p = h * channels; p < (h + 1) * channels; p += 16) {
        _mm512_storeu_ps(drive + s * inner + p, _mm512_mul_ps(by, _mm512_loadu_ps(x + p)));
      }
    }
  }
  int code;
  if (codes == nullptr) {
    code = llmc_state_update(floats, drive, decay, b, c, y, sequences, heads, groups, channels, states);
  } else if (recent == nullptr) {
    code = llmc_dsq_update(codes, channel, scale, fixed, drive, decay, b, c, y, sequences, heads, groups, channels, states, bits,
                           refit, dither);
  } else {
    code = llmc_dsq_replay_update(codes, channel, scale, fixed, recent, count, drive, decay, b, c, y, window, sequences, heads,
                                  groups, channels, states, bits, refit, dither);
  }
  if (code != 0) return code;
#pragma omp parallel for schedule(static) if (sequences > 1)
  for (int64_t s = 0; s < sequences; ++s) {
    const float* x = mixed + s * width;
    float* from = y + s * inner;
    for (int64_t i = 0; i < inner; i += 16) {
      const __m512 skip = _mm512_set1_ps(d[i / channels]);
      _mm512_storeu_ps(from + i, _mm512_fmadd_ps(skip, _mm512_loadu_ps(x + i), _mm512_loadu_ps(from + i)));
    }
    gated_norm(from, projected + s * row, gain, out + s * inner, inner, groups, epsilon);
  }
  return 0;
}

}  // extern "C"
}  // namespace state
