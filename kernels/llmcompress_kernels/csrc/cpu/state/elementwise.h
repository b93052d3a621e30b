// What a mixer does element by element: exp, silu and softplus of sixteen floats, within a few units in the last place of
// libm's, one token of the convolution, gate and norm.
#pragma once

#include "tile.h"

namespace state {

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

// silu of several vectors side by side: one alone waits for itself, as its operations hang on one another. exp(-x) is 2^n
// from a table of sixteenths, its whole part by scalef, times a cubic of x + n ln2, n the nearest sixteenth to -x / ln2; the
// cubic leaves out 9e-9.
template <int Count>
STATE_INLINE void silu_all(__m512* x) {
  // adding it rounds to sixteenths, whose number modulo sixteen is then in the lowest bits
  const __m512 round = _mm512_set1_ps(786432.0f);
  const __m512 powers = _mm512_setr_ps(1.0f, 1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f, 1.29683955f, 1.35425555f,
                                       1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f, 1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f);
  __m512 n[Count], r[Count], p[Count];
  for (int k = 0; k < Count; ++k) {
    r[k] = _mm512_min_ps(_mm512_max_ps(x[k], _mm512_set1_ps(-88.0f)), _mm512_set1_ps(87.0f));
    n[k] = _mm512_fmadd_ps(r[k], _mm512_set1_ps(-1.44269504f), round);
    p[k] = _mm512_permutexvar_ps(_mm512_castps_si512(n[k]), powers);
    n[k] = _mm512_sub_ps(n[k], round);
  }
  for (int k = 0; k < Count; ++k) r[k] = _mm512_fmadd_ps(n[k], _mm512_set1_ps(0.693359375f), r[k]);
  for (int k = 0; k < Count; ++k) r[k] = _mm512_fmadd_ps(n[k], _mm512_set1_ps(-2.12194440e-4f), r[k]);
  for (int k = 0; k < Count; ++k) {
    const __m512 cubic = _mm512_fmadd_ps(r[k], _mm512_set1_ps(-1.6666667e-1f), _mm512_set1_ps(0.5f));
    r[k] = _mm512_fmsub_ps(_mm512_mul_ps(r[k], r[k]), cubic, r[k]);
  }
  for (int k = 0; k < Count; ++k) p[k] = _mm512_fmadd_ps(p[k], r[k], p[k]);
  for (int k = 0; k < Count; ++k) p[k] = _mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_scalef_ps(p[k], n[k]));
  // a division takes sixteen cycles; 14 bits of the reciprocal and a step of Newton's take four
  for (int k = 0; k < Count; ++k) r[k] = _mm512_rcp14_ps(p[k]);
  for (int k = 0; k < Count; ++k) {
    r[k] = _mm512_fmadd_ps(r[k], _mm512_fnmadd_ps(p[k], r[k], _mm512_set1_ps(1.0f)), r[k]);
    x[k] = _mm512_mul_ps(x[k], r[k]);
  }
}

STATE_INLINE __m512 silu16(__m512 x) {
  silu_all<1>(&x);
  return x;
}

// log(1 + exp(z)) = max(z, 0) + 2 atanh(t / (2 + t)), t = exp(-|z|): no cancellation for small results
STATE_INLINE __m512 softplus16(__m512 z) {
  const __m512 t = exp16(_mm512_or_ps(z, _mm512_set1_ps(-0.0f)));
  const __m512 s = _mm512_div_ps(t, _mm512_add_ps(t, _mm512_set1_ps(2.0f))), q = _mm512_mul_ps(s, s);
  __m512 p = _mm512_set1_ps(2.0f / 17);
  for (int k = 15; k >= 1; k -= 2) p = _mm512_fmadd_ps(p, q, _mm512_set1_ps(2.0f / static_cast<float>(k)));
  return _mm512_fmadd_ps(p, s, _mm512_max_ps(z, _mm512_setzero_ps()));
}

// x / sqrt(mean x^2 + epsilon), times `gain` where there is one; `count` is a multiple of sixteen.
STATE_INLINE void rms_norm(const float* x, int64_t count, float epsilon, const float* gain, float* to) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    squares = _mm512_add_ps(squares, _mm512_mul_ps(v, v));
  }
  const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(count);
  const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + epsilon));
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(x + i), factor);
    _mm512_storeu_ps(to + i, gain == nullptr ? value : _mm512_mul_ps(value, _mm512_loadu_ps(gain + i)));
  }
}

// Gate and norm of one token: `y` [I] becomes y silu(gate), each of `groups` parts normed by itself, times gain, in `out`; without
// gain nothing is normed, and `out` is `y`.
STATE_INLINE void gated_norm(float* y, const float* gate, const float* gain, float* out, int64_t inner, int64_t groups,
                             float epsilon) {
  const int64_t part = inner / groups;
  for (int64_t g = 0; g < groups; ++g) {
    __m512 energy = _mm512_setzero_ps();
    int64_t i = g * part;
    for (; i + 64 <= (g + 1) * part; i += 64) {
      __m512 open[4];
      for (int k = 0; k < 4; ++k) open[k] = _mm512_loadu_ps(gate + i + 16 * k);
      silu_all<4>(open);
      for (int k = 0; k < 4; ++k) {
        const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(y + i + 16 * k), open[k]);
        energy = _mm512_fmadd_ps(value, value, energy);
        _mm512_storeu_ps(y + i + 16 * k, value);
      }
    }
    for (; i < (g + 1) * part; i += 16) {
      const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(y + i), silu16(_mm512_loadu_ps(gate + i)));
      energy = _mm512_fmadd_ps(value, value, energy);
      _mm512_storeu_ps(y + i, value);
    }
    if (gain == nullptr) continue;
    const float by = 1.0f / std::sqrt(_mm512_reduce_add_ps(energy) / static_cast<float>(part) + epsilon);
    for (i = g * part; i < (g + 1) * part; i += 16) {
      const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(y + i), _mm512_set1_ps(by));
      _mm512_storeu_ps(out + i, _mm512_mul_ps(value, _mm512_loadu_ps(gain + i)));
    }
  }
}

// Time steps and decays of one token's heads: dt = clamp(softplus(raw + bias), low, high), decay = exp(dt a).
STATE_INLINE void time_steps(const float* raw, const float* bias, const float* a, float low, float high, int64_t heads,
                             float* dt, float* decay) {
  for (int64_t h = 0; h < heads; h += 16) {
    const __mmask16 some = heads - h >= 16 ? 0xffff : static_cast<__mmask16>((1u << (heads - h)) - 1);
    const __m512 z = _mm512_add_ps(_mm512_maskz_loadu_ps(some, raw + h), _mm512_maskz_loadu_ps(some, bias + h));
    const __m512 step = _mm512_min_ps(_mm512_max_ps(softplus16(z), _mm512_set1_ps(low)), _mm512_set1_ps(high));
    _mm512_mask_storeu_ps(dt + h, some, step);
    _mm512_mask_storeu_ps(decay + h, some, exp16(_mm512_mul_ps(step, _mm512_maskz_loadu_ps(some, a + h))));
  }
}

// Four taps of sixteen channels: the state [C, 4] moves by one, the newest input last.
STATE_INLINE __m512 convolve16(float* held, const float* weight, __m512 input) {
  __m512 sum[4];
  for (int q = 0; q < 4; ++q) {
    const __m512 old = _mm512_loadu_ps(held + 16 * q);
    const __m512i spread = _mm512_add_epi32(_mm512_set1_epi32(4 * q), _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3));
    const __m512 now = _mm512_mask_permutexvar_ps(_mm512_permute_ps(old, _MM_SHUFFLE(3, 3, 2, 1)), 0x8888, spread, input);
    _mm512_storeu_ps(held + 16 * q, now);
    const __m512 product = _mm512_mul_ps(now, _mm512_loadu_ps(weight + 16 * q));
    const __m512 two = _mm512_add_ps(product, _mm512_permute_ps(product, _MM_SHUFFLE(2, 3, 0, 1)));
    sum[q] = _mm512_add_ps(two, _mm512_permute_ps(two, _MM_SHUFFLE(1, 0, 3, 2)));
  }
  // every fourth lane of each
  const __m512i fourth = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  const __m512 low = _mm512_permutex2var_ps(sum[0], fourth, sum[1]), high = _mm512_permutex2var_ps(sum[2], fourth, sum[3]);
  return _mm512_shuffle_f32x4(low, high, 0x44);
}

}  // namespace state
