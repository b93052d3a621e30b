// A whole sequence, token after token, with the state stored in codes between tokens: what decoding would
// do, for evaluation and for reconstruction; and its straight-through adjoint.
//
//   u_t = a_t h_{t-1} + x_t (x) B_t      y_t = u_t C_t      h_t = Q(u_t)
//   l_t = dy_t (x) C_t + a_{t+1} l_{t+1} dC = dy u   dx = l B   dB = x l   da = <l, h_{t-1}>
//
// One head of one sequence stays in the first cache level from start to end. States are kept in pair order.
#include <cstdlib>

#include "pick.h"
#include "tile.h"

namespace state {
namespace {

struct Sequence {
  const float *x, *decay, *b, *c;  // first token of this sequence and head
  int64_t x_step, decay_step, b_step;
  int64_t tokens;
};

// The state is rounded after `first` tokens and then after every `window`.
STATE_INLINE bool due(int64_t t, int64_t first, int64_t window) { return t + 1 >= first && (t + 1 - first) % window == 0; }

// One token: tile is the stored state before and after.
template <int J, Mode mode>
void step(Scales& s, float* tile, int p, float decay, const float* x, const float* b, const float* c, float* y, int bits,
          bool round) {
  constexpr int n = 32 * J;
  auto load = [&]<int Count>(int r, const int (&pairs)[Count], __m512* old) __attribute__((always_inline)) {
    for (int i = 0; i < 2 * Count; ++i) old[i] = _mm512_load_ps(tile + r * n + 32 * pairs[i / 2] + i % 2 * 16);
  };
  if (!round) {
    const __m512 a = _mm512_set1_ps(decay);
    alignas(64) float out[kRows][16];
    for (int base = 0; base < p; base += kRows) {
      for (int i = 0; i < kRows; ++i) {
        float* row = tile + (base + i) * n;
        const __m512 xr = _mm512_set1_ps(x[base + i]);
        __m512 read = _mm512_setzero_ps();
        for (int v = 0; v < 2 * J; ++v) {
          const __m512 fresh =
              _mm512_add_ps(_mm512_mul_ps(a, _mm512_load_ps(row + 16 * v)), _mm512_mul_ps(xr, _mm512_load_ps(b + 16 * v)));
          _mm512_store_ps(row + 16 * v, fresh);
          read = _mm512_fmadd_ps(fresh, _mm512_load_ps(c + 16 * v), read);
        }
        _mm512_store_ps(out[i], read);
      }
      _mm512_storeu_ps(y + base, sum_rows(out));
    }
    return;
  }
  const float qmax = static_cast<float>((1 << (bits - 1)) - 1);
  alignas(64) uint16_t channel[kMaxChannels];
  refresh<J, calibrated(mode)>(s, tile, p, decay, x, b, c, y, qmax, channel, nullptr, load);
  const __m512 rounder = _mm512_set1_ps(kRound);
  Refit refit;
  for (int base = 0; base < p; base += kRows) {
    alignas(64) float scale[kRows];
    for (int i = 0; i < kRows; ++i) {
      __m512 q[2 * J];
      float* row = tile + (base + i) * n;
      codes_of_row<J, mode>(s, row, base + i, qmax, q);
      if constexpr (mode == kRefitted) refit.add<J>(s, row, base + i, i, q);
      for (int v = 0; v < 2 * J; ++v) _mm512_store_ps(row + 16 * v, _mm512_sub_ps(q[v], rounder));
    }
    _mm512_store_ps(scale, mode == kRefitted ? _mm512_cvtph_ps(refit.scales(s, base)) : _mm512_load_ps(s.channel + base));
    for (int i = 0; i < kRows; ++i) {
      float* row = tile + (base + i) * n;
      const __m512 sp = _mm512_set1_ps(scale[i]);
      for (int v = 0; v < 2 * J; ++v) {
        _mm512_store_ps(row + 16 * v, _mm512_mul_ps(_mm512_load_ps(row + 16 * v), _mm512_mul_ps(sp, _mm512_load_ps(s.step + 16 * v))));
      }
    }
  }
}

// kept: the stored state before every `segment`-th token, [segments, P, N] in pair order, or null.
template <int J, Mode mode>
void forward(Sequence in, float* y, float* tile, float* kept, int64_t segment, int p, int bits, int64_t first,
             int64_t window, const uint16_t* fixed) {
  constexpr int n = 32 * J;
  Scales s;
  if constexpr (calibrated(mode)) fixed_channels(s, fixed, p);
  alignas(64) float b[n], c[n];
  for (int64_t t = 0; t < in.tokens; ++t) {
    if (kept != nullptr && t % segment == 0) std::memcpy(kept + (t / segment) * p * n, tile, sizeof(float) * p * n);
    split_pairs(in.b + t * in.b_step, b, n);
    split_pairs(in.c + t * in.b_step, c, n);
    const bool round = bits < 16 && due(t, first, window);
    step<J, mode>(s, tile, p, in.decay[t * in.decay_step], in.x + t * in.x_step, b, c, y + t * in.x_step, bits, round);
  }
}

struct Gradients {
  const float* dy;                // as x
  float *dx, *da, *db, *dc;       // db and dc are per head: [T, H, N]
  int64_t head_step;              // H * N
};

template <int J, Mode mode>
void backward(Sequence in, Gradients g, const float* kept, int64_t segment, int p, int bits, int64_t first,
              int64_t window, const uint16_t* fixed, float* states, float* adjoint) {
  constexpr int n = 32 * J;
  Scales s;
  if constexpr (calibrated(mode)) fixed_channels(s, fixed, p);
  alignas(64) float b[n], c[n], db[n], dc[n], ignored[kMaxChannels], out[kRows][16];
  std::memset(adjoint, 0, sizeof(float) * p * n);
  for (int64_t index = (in.tokens - 1) / segment; index >= 0; --index) {
    const int64_t start = index * segment, stop = start + segment < in.tokens ? start + segment : in.tokens;
    std::memcpy(states, kept + index * p * n, sizeof(float) * p * n);
    for (int64_t t = start; t + 1 < stop; ++t) {
      float* next = states + (t + 1 - start) * p * n;
      std::memcpy(next, states + (t - start) * p * n, sizeof(float) * p * n);
      split_pairs(in.b + t * in.b_step, b, n);
      split_pairs(in.c + t * in.b_step, c, n);
      const bool round = bits < 16 && due(t, first, window);
      step<J, mode>(s, next, p, in.decay[t * in.decay_step], in.x + t * in.x_step, b, c, ignored, bits, round);
    }
    for (int64_t t = stop - 1; t >= start; --t) {
      const float* before = states + (t - start) * p * n;
      const float *x = in.x + t * in.x_step, *dy = g.dy + t * in.x_step;
      split_pairs(in.b + t * in.b_step, b, n);
      split_pairs(in.c + t * in.b_step, c, n);
      const __m512 a = _mm512_set1_ps(in.decay[t * in.decay_step]);
      __m512 da = _mm512_setzero_ps(), db_sum[2 * J], dc_sum[2 * J];
      for (int v = 0; v < 2 * J; ++v) db_sum[v] = dc_sum[v] = _mm512_setzero_ps();
      for (int base = 0; base < p; base += kRows) {
        for (int i = 0; i < kRows; ++i) {
          const int r = base + i;
          const __m512 xr = _mm512_set1_ps(x[r]), dr = _mm512_set1_ps(dy[r]);
          __m512 dx = _mm512_setzero_ps();
          for (int v = 0; v < 2 * J; ++v) {
            const __m512 old = _mm512_load_ps(before + r * n + 16 * v), bv = _mm512_load_ps(b + 16 * v);
            const __m512 fresh = _mm512_fmadd_ps(a, old, _mm512_mul_ps(xr, bv));
            const __m512 l = _mm512_fmadd_ps(dr, _mm512_load_ps(c + 16 * v), _mm512_load_ps(adjoint + r * n + 16 * v));
            dc_sum[v] = _mm512_fmadd_ps(dr, fresh, dc_sum[v]);
            db_sum[v] = _mm512_fmadd_ps(xr, l, db_sum[v]);
            dx = _mm512_fmadd_ps(l, bv, dx);
            da = _mm512_fmadd_ps(l, old, da);
            _mm512_store_ps(adjoint + r * n + 16 * v, _mm512_mul_ps(a, l));
          }
          _mm512_store_ps(out[i], dx);
        }
        _mm512_storeu_ps(g.dx + t * in.x_step + base, sum_rows(out));
      }
      for (int v = 0; v < 2 * J; ++v) {
        _mm512_store_ps(db + 16 * v, db_sum[v]);
        _mm512_store_ps(dc + 16 * v, dc_sum[v]);
      }
      join_pairs(db, g.db + t * g.head_step, n);
      join_pairs(dc, g.dc + t * g.head_step, n);
      g.da[t * in.decay_step] = _mm512_reduce_add_ps(da);
    }
  }
}

float* memory(int64_t floats) { return static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64)); }

using Forward = decltype(&forward<1, kDynamic>);
using Backward = decltype(&backward<1, kDynamic>);

}  // namespace
}  // namespace state

extern "C" {

// x [S, T, H, P], decay [S, T, H], b and c [S, T, G, N], y as x, io [S, H, P, N] start and final state,
// bits [H] (16 stores floats), fixed [H, P] or null, kept [S, H, segments, P, N] or null.
__attribute__((visibility("default"))) int llmc_dsq_scan(const float* x, const float* decay, const float* b, const float* c,
                                                         float* y, float* io, const int32_t* bits, const uint16_t* fixed,
                                                         float* kept, int64_t segment, int64_t first, int64_t window, int64_t sequences,
                                                         int64_t tokens, int64_t heads, int64_t groups, int64_t channels,
                                                         int64_t states, int64_t refit, int64_t dither) {
  using namespace state;
  const Forward run = for_mode<Forward>(mode_of(fixed, refit, dither), states, []<int J, Mode M> { return forward<J, M>; });
  if (run == nullptr || channels % kRows != 0 || channels > kMaxChannels) return 1;
  const int64_t share = heads / groups, size = channels * states, segments = (tokens + segment - 1) / segment;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < sequences * heads; ++i) {
    const int64_t sequence = i / heads, head = i % heads, start = sequence * tokens;
    const Sequence in{x + (start * heads + head) * channels, decay + start * heads + head,
                      b + (start * groups + head / share) * states, c + (start * groups + head / share) * states,
                      heads * channels, heads, groups * states, tokens};
    float* tile = memory(size);
    for (int64_t r = 0; r < channels; ++r) split_pairs(io + i * size + r * states, tile + r * states, states);
    float* mine = kept == nullptr ? nullptr : kept + i * segments * size;
    const uint16_t* scale = fixed == nullptr ? nullptr : fixed + head * channels;
    float* out = y + (start * heads + head) * channels;
    run(in, out, tile, mine, segment, static_cast<int>(channels), bits[head], first, window, scale);
    for (int64_t r = 0; r < channels; ++r) join_pairs(tile + r * states, io + i * size + r * states, states);
    std::free(tile);
  }
  return 0;
}

// Gradients of the above by x, decay, b and c for `dy`; db and dc are [S, T, H, N], one for every head.
__attribute__((visibility("default"))) int llmc_dsq_scan_backward(
    const float* dy, const float* x, const float* decay, const float* b, const float* c, const float* kept,
    const int32_t* bits, const uint16_t* fixed, float* dx, float* da, float* db, float* dc, int64_t segment, int64_t first, int64_t window,
    int64_t sequences, int64_t tokens, int64_t heads, int64_t groups, int64_t channels, int64_t states, int64_t refit, int64_t dither) {
  using namespace state;
  const Backward run = for_mode<Backward>(mode_of(fixed, refit, dither), states, []<int J, Mode M> { return backward<J, M>; });
  if (run == nullptr || channels % kRows != 0 || channels > kMaxChannels) return 1;
  const int64_t share = heads / groups, size = channels * states, segments = (tokens + segment - 1) / segment;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < sequences * heads; ++i) {
    const int64_t sequence = i / heads, head = i % heads, start = sequence * tokens;
    const Sequence in{x + (start * heads + head) * channels, decay + start * heads + head,
                      b + (start * groups + head / share) * states, c + (start * groups + head / share) * states,
                      heads * channels, heads, groups * states, tokens};
    const Gradients g{dy + (start * heads + head) * channels, dx + (start * heads + head) * channels,
                      da + start * heads + head, db + (start * heads + head) * states, dc + (start * heads + head) * states,
                      heads * states};
    float *held = memory(segment * size), *adjoint = memory(size);
    const uint16_t* scale = fixed == nullptr ? nullptr : fixed + head * channels;
    run(in, g, kept + i * segments * size, segment, static_cast<int>(channels), bits[head], first, window, scale, held, adjoint);
    std::free(held);
    std::free(adjoint);
  }
  return 0;
}

}  // extern "C"
