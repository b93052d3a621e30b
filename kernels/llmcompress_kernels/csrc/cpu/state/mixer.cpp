// One decode step of a Mamba-2 mixer between its two projections: convolution, time steps, state update, skip, gate and
// norm. Transcendental functions differ from libm's in the last bits; the state update itself is that of update.cpp.
#include <vector>

#include "tile.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,bmi2")

namespace state {
namespace {

// exp with a relative error below 2e-7: 2^n times a polynomial on [-ln2/2, ln2/2]
STATE_INLINE __m512 exp16(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

STATE_INLINE __m512 silu16(__m512 x) {
  const __m512 e = exp16(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

// Four taps of sixteen channels: the state [C, 4] moves by one, the newest input last.
STATE_INLINE __m512 convolve16(float* held, const float* weight, __m512 input) {
  alignas(64) float fresh[16], out[16];
  _mm512_store_ps(fresh, input);
  for (int i = 0; i < 16; ++i) {
    const __m128 old = _mm_loadu_ps(held + 4 * i);
    const __m128 now = _mm_insert_ps(_mm_shuffle_ps(old, old, _MM_SHUFFLE(3, 3, 2, 1)), _mm_set_ss(fresh[i]), 0x30);
    _mm_storeu_ps(held + 4 * i, now);
    _mm_store_ss(out + i, _mm_dp_ps(now, _mm_loadu_ps(weight + 4 * i), 0xf1));
  }
  return _mm512_load_ps(out);
}

}  // namespace
}  // namespace state

extern "C" {

int llmc_dsq_update(uint8_t*, uint16_t*, uint16_t*, const uint16_t*, const float*, const float*, const float*, const float*,
                    float*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
int llmc_state_update(float*, const float*, const float*, const float*, const float*, float*, int64_t, int64_t, int64_t,
                      int64_t, int64_t);

// projected [S, 2I + 2GN + H], conv [S, C, 4] and the packed state (or floats [S, H, P, N] with codes null) are
// replaced; out [S, I]. `gain` is the norm's weight [I], each of G groups normed by itself. `scratch` holds
// S * (C + H + 2I) floats.
__attribute__((visibility("default"))) int llmc_mamba2_decode(
    const float* projected, float* conv, const float* conv_weight, const float* conv_bias, const float* dt_bias,
    const float* a, const float* d, const float* gain, uint8_t* codes, uint16_t* channel, uint16_t* scale,
    const uint16_t* fixed, float* floats, float* scratch, float* out, int64_t sequences, int64_t heads, int64_t groups,
    int64_t channels, int64_t states, int64_t bits, int64_t epsilon_bits) {
  using namespace state;
  const int64_t inner = heads * channels, both = groups * states, width = inner + 2 * both, row = inner + width + heads;
  if (inner % 16 != 0 || both % 16 != 0 || (inner / groups) % 16 != 0) return 1;
  float epsilon;
  const int32_t raw = static_cast<int32_t>(epsilon_bits);
  std::memcpy(&epsilon, &raw, 4);
  float *mixed = scratch, *decay = mixed + sequences * width, *drive = decay + sequences * heads,
        *y = drive + sequences * inner;
  // B and C of all sequences side by side, as the state update wants them
  std::vector<float> bc(2 * sequences * both);
  float *b = bc.data(), *c = b + sequences * both;
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
    for (int64_t h = 0; h < heads; ++h) {
      const float z = raw_dt[h] + dt_bias[h], dt = z > 20.0f ? z : std::log1p(std::exp(z));
      decay[s * heads + h] = std::exp(dt * a[h]);
      for (int64_t p = 0; p < channels; ++p) drive[s * inner + h * channels + p] = dt * x[h * channels + p];
    }
  }
  const int code = codes != nullptr ? llmc_dsq_update(codes, channel, scale, fixed, drive, decay, b, c, y, sequences, heads,
                                                      groups, channels, states, bits)
                                    : llmc_state_update(floats, drive, decay, b, c, y, sequences, heads, groups, channels, states);
  if (code != 0) return code;
  const int64_t part = inner / groups;
#pragma omp parallel for schedule(static) if (sequences > 1)
  for (int64_t s = 0; s < sequences; ++s) {
    const float *x = mixed + s * width, *gate = projected + s * row;
    float *from = y + s * inner, *to = out + s * inner;
    for (int64_t g = 0; g < groups; ++g) {
      __m512 energy = _mm512_setzero_ps();
      for (int64_t i = g * part; i < (g + 1) * part; i += 16) {
        const __m512 skip = _mm512_set1_ps(d[i / channels]);
        __m512 value = _mm512_fmadd_ps(skip, _mm512_loadu_ps(x + i), _mm512_loadu_ps(from + i));
        value = _mm512_mul_ps(value, silu16(_mm512_loadu_ps(gate + i)));
        energy = _mm512_fmadd_ps(value, value, energy);
        _mm512_storeu_ps(from + i, value);
      }
      const float scale_by = 1.0f / std::sqrt(_mm512_reduce_add_ps(energy) / static_cast<float>(part) + epsilon);
      for (int64_t i = g * part; i < (g + 1) * part; i += 16) {
        const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(from + i), _mm512_set1_ps(scale_by));
        _mm512_storeu_ps(to + i, _mm512_mul_ps(value, _mm512_loadu_ps(gain + i)));
      }
    }
  }
  return 0;
}

}  // extern "C"

#pragma GCC pop_options
