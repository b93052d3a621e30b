// A prompt through a Mamba-2 mixer between its two projections, with a float state; prompt.h says how.
#include <omp.h>

#include "prompt.h"

namespace state {
namespace {

// Convolution and silu of one token, whose x [I] is written beside its B and C; taps[k] is the input of k - 3 tokens later.
// Apart from mix_times(), so that neighbouring tokens do not wait for each other's long chains.
void mix(const Mixer& m, const Segment& s, int64_t t, const float* const* taps, float* x) {
  const int64_t width = m.width(), inner = m.inner(), both = m.both(), n = m.states;
  const auto sum = [&](int64_t i) __attribute__((always_inline)) {
    __m512 total = m.bias == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(m.bias + i);
    for (int k = 0; k < 4; ++k) {
      total = _mm512_fmadd_ps(_mm512_loadu_ps(m.weight + k * width + i), _mm512_loadu_ps(taps[k] + i), total);
    }
    return total;
  };
  int64_t i = 0;
  for (; i + 64 <= inner; i += 64) {
    __m512 value[4];
    for (int q = 0; q < 4; ++q) value[q] = sum(i + 16 * q);
    silu_all<4>(value);
    for (int q = 0; q < 4; ++q) _mm512_storeu_ps(x + i + 16 * q, value[q]);
  }
  for (; i < width; i += 16) {
    const __m512 value = silu16(sum(i));
    if (i < inner) {
      _mm512_storeu_ps(x + i, value);
      continue;
    }
    const int64_t second = i - inner >= both ? 1 : 0, at = i - inner - second * both;
    float* line = s.bc + ((at / n) * (n / kBlock) + (at % n) / kBlock) * s.tokens * 16 + t * 16 + second * kBlock;
    _mm256_storeu_ps(line, _mm512_castps512_ps256(value));
    _mm256_storeu_ps(line + s.tokens * 16, _mm512_extractf32x8_ps(value, 1));
  }
}

}  // namespace
}  // namespace state

extern "C" {

// projected [S, T, 2I + 2GN] and raw time steps [S, T, H] with rows `row` and `dt_row` floats apart; history [S, C, 4] the inputs before the first token, or null; conv_weight [C, 4];
// io [S, H, P, N] state before and after; out [S, T, I].
__attribute__((visibility("default"))) int llmc_mamba2_prefill(
    const float* projected, const float* raw_dt, const float* history, const float* conv_weight, const float* conv_bias, const float* dt_bias,
    const float* a, const float* d, const float* gain, float* io, float* out, int64_t sequences, int64_t tokens,
    int64_t heads, int64_t groups, int64_t channels, int64_t states, int64_t row, int64_t dt_row,
    const float* limits) {
  using namespace state;
  Mixer m{nullptr, conv_bias, dt_bias, a, d, gain, heads, groups, channels, states, limits[0], limits[1], limits[2]};
  const int64_t inner = m.inner(), width = m.width();
  if (channels % 16 != 0 || states % 16 != 0 || inner / groups % 16 != 0) return 1;
  const int64_t lanes = walked_lanes(channels, heads, omp_get_max_threads()), pieces = channels / lanes, most = tokens < kSegment ? tokens : kSegment;
  const Floats weight = floats(4 * width), old = floats(3 * width), tiles = floats(heads * channels * states);
  const Floats x = floats(most * inner), y = floats(most * inner), bc = floats(most * 2 * m.both());
  const Floats dt = floats(most * heads), decay = floats(most * heads);
  for (int64_t i = 0; i < width; ++i) {
    for (int k = 0; k < 4; ++k) weight.get()[k * width + i] = conv_weight[4 * i + k];
  }
  m.weight = weight.get();
#pragma omp parallel
  for (int64_t s = 0; s < sequences; ++s) {
    const float* in = projected + s * tokens * row;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < width; ++i) {
      for (int k = 0; k < 3; ++k) old.get()[k * width + i] = history == nullptr ? 0.0f : history[(s * width + i) * 4 + k + 1];
    }
    // states turned so that channels lie side by side, a piece of `lanes` channels at a time
#pragma omp for schedule(static)
    for (int64_t i = 0; i < heads * channels; ++i) {
      float* piece = tiles.get() + i / lanes * lanes * states + i % lanes;
      for (int64_t n = 0; n < states; ++n) piece[n * lanes] = io[(s * heads * channels + i) * states + n];
    }
    for (int64_t from = 0; from < tokens; from += kSegment) {
      const int64_t count = tokens - from < kSegment ? tokens - from : kSegment;
      const Segment segment{bc.get(), dt.get(), decay.get(), count};
#pragma omp for schedule(static)
      for (int64_t t = 0; t < count; ++t) {
        const float* taps[4];
        for (int64_t k = 0; k < 4; ++k) {
          const int64_t at = from + t + k - 3;
          taps[k] = at < 0 ? old.get() + (at + 3) * width : in + at * row + inner;
        }
        mix(m, segment, t, taps, x.get() + t * inner);
        mix_times(m, segment, t, raw_dt + (s * tokens + from + t) * dt_row);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < heads * pieces; ++i) {
        float* piece = tiles.get() + i * lanes * states;
        walk(lanes, m, segment, i / pieces, x.get() + i * lanes, y.get() + i * lanes, inner, piece);
      }
#pragma omp for schedule(static)
      for (int64_t t = 0; t < count; ++t) {
        gated_norm(y.get() + t * inner, in + (from + t) * row, gain, out + (s * tokens + from + t) * inner, inner, groups, m.epsilon);
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < heads * channels; ++i) {
      const float* piece = tiles.get() + i / lanes * lanes * states + i % lanes;
      for (int64_t n = 0; n < states; ++n) io[(s * heads * channels + i) * states + n] = piece[n * lanes];
    }
  }
  return 0;
}

}  // extern "C"
