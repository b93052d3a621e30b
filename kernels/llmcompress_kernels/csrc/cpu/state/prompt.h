// A prompt through a Mamba-2 mixer between its two projections, with a float state: convolution, scan, skip, gate, norm.
//
// The scan walks the tokens with a piece of the state in registers, sixteen channels to a vector, and divides out the
// decay, so that a token costs two fused multiply-adds per vector of the state:
//
//   s_t = a_1 .. a_t    v_t = u_t / s_t    v_t = v_(t-1) + (dt_t x_t / s_t) B_t    y_t = s_t v_t C_t
//
// That is 4 P N operations per token and head. The matrix form by chunks of L tokens takes 4 P N + L (N + P), which pays
// only where matrix units do the products; here its tiles would have to be loaded besides. A stretch of tokens ends where
// s_t would fall below 2^-30; the next begins from a u, so no decay is too strong. It also ends after every 64th token, so that
// results do not depend on how a prompt is cut at multiples of 64.
//
// B and C lie as [N / 8][tokens][8 + 8]: one cache line per token and step of the inner loop.
#pragma once

#include "elementwise.h"
#include "memory.h"

namespace state {
namespace {

constexpr int64_t kSegment = 128;  // tokens of one pass through the steps; their buffers are to stay in the second-level cache
constexpr int64_t kStretch = 64;   // tokens of the inner loop, at most; it ends at a multiple of it, wherever segments end
constexpr int kBlock = 8;          // states whose B and C lie side by side
constexpr float kFloor = 9.31322574615478515625e-10f;  // 2^-30

struct Mixer {
  const float *weight, *bias;  // convolution: [4][C], [C] or null
  const float *dt_bias, *a, *d, *gain;
  int64_t heads, groups, channels, states;
  float low, high, epsilon;
  int64_t inner() const { return heads * channels; }
  int64_t both() const { return groups * states; }
  int64_t width() const { return inner() + 2 * both(); }
};

// Work of one segment of one sequence. `bc` [G][N / 8][T][16], `dt` and `decay` [T, H].
struct Segment {
  float *bc, *dt, *decay;
  int64_t tokens;
};

// Time steps and decays of one token.
void mix_times(const Mixer& m, const Segment& s, int64_t t, const float* raw_dt) {
  time_steps(raw_dt, m.dt_bias, m.a, m.low, m.high, m.heads, s.dt + t * m.heads, s.decay + t * m.heads);
}

// Channels of a head that are walked together, those of four vectors where a head has them and heads are enough for the
// threads: the broadcasts of B and C then serve four products each.
int64_t walked_lanes(int64_t channels, int64_t heads, int64_t threads) {
  return channels % 64 == 0 && heads % threads == 0 ? 64 : channels % 32 == 0 ? 32 : 16;
}

// `Lanes` channels of one head through a segment; tile [N][Lanes] is the state before and after. Inputs `from` and results `to`,
// which may be the same, have tokens `stride` floats apart. As many channels pass at a time, with `rank` states each, as registers
// hold; sums are taken in one order whatever these are. The first pass over a stretch also scales x, the last writes y: alone,
// either would wait for the second-level cache.
template <int Lanes>
void walk(const Mixer& m, const Segment& s, int64_t head, const float* from, float* to, int64_t stride, float* tile) {
  constexpr int together = kAvx512 ? Lanes : 16, vectors = together / 16, rank = kAvx512 && vectors < 4 ? kBlock : 4;
  alignas(64) float scaled[kStretch][together], read[kStretch][together], level[kStretch], rate[kStretch];
  const int64_t blocks = m.states / kBlock;
  static_assert(kBlock % rank == 0);
  const float* bc = s.bc + head / (m.heads / m.groups) * blocks * s.tokens * 16;
  const __m512 skip = _mm512_set1_ps(m.d[head]);
  for (int64_t start = 0; start < s.tokens;) {
    const __m512 entry = _mm512_set1_ps(s.decay[start * m.heads + head]);
    level[0] = 1.0f;
    int64_t count = 1;
    for (; (start + count) % kStretch != 0 && start + count < s.tokens; ++count) {
      level[count] = level[count - 1] * s.decay[(start + count) * m.heads + head];
      if (!(level[count] >= kFloor)) break;
    }
    for (int64_t t = 0; t < count; ++t) rate[t] = s.dt[(start + t) * m.heads + head] / level[t];
    const __m512 exit = _mm512_set1_ps(level[count - 1]);
    for (int64_t lane = 0; lane < Lanes; lane += together) {
      const float* const xs = from + start * stride + lane;
      float* const ys = to + start * stride + lane;
      const auto pass = [&]<bool Begin, bool End>(int64_t state) __attribute__((always_inline)) {
        __m512 held[rank][vectors];
        float* rows = tile + state * Lanes + lane;
        for (int i = 0; i < rank; ++i) {
          for (int v = 0; v < vectors; ++v) held[i][v] = _mm512_mul_ps(entry, _mm512_load_ps(rows + i * Lanes + 16 * v));
        }
        const float* line = bc + (state / kBlock * s.tokens + start) * 16 + state % kBlock;
        for (int64_t t = 0; t < count; ++t, line += 16) {
          __m512 x[vectors], y[vectors];
          for (int v = 0; v < vectors; ++v) {
            if constexpr (Begin) {
              x[v] = _mm512_mul_ps(_mm512_set1_ps(rate[t]), _mm512_loadu_ps(xs + t * stride + 16 * v));
              _mm512_store_ps(scaled[t] + 16 * v, x[v]);
            } else {
              x[v] = _mm512_load_ps(scaled[t] + 16 * v);
            }
            y[v] = Begin ? _mm512_setzero_ps() : _mm512_load_ps(read[t] + 16 * v);
          }
          for (int i = 0; i < rank; ++i) {
            const __m512 b = _mm512_set1_ps(line[i]), c = _mm512_set1_ps(line[kBlock + i]);
            for (int v = 0; v < vectors; ++v) {
              held[i][v] = _mm512_fmadd_ps(x[v], b, held[i][v]);
              y[v] = _mm512_fmadd_ps(held[i][v], c, y[v]);
            }
          }
          for (int v = 0; v < vectors; ++v) {
            if constexpr (End) {
              const __m512 straight = _mm512_mul_ps(skip, _mm512_loadu_ps(xs + t * stride + 16 * v));
              _mm512_storeu_ps(ys + t * stride + 16 * v, _mm512_fmadd_ps(_mm512_set1_ps(level[t]), y[v], straight));
            } else {
              _mm512_store_ps(read[t] + 16 * v, y[v]);
            }
          }
        }
        for (int i = 0; i < rank; ++i) {
          for (int v = 0; v < vectors; ++v) _mm512_store_ps(rows + i * Lanes + 16 * v, _mm512_mul_ps(exit, held[i][v]));
        }
      };
      // N is at least 16
      pass.template operator()<true, false>(0);
      for (int64_t state = rank; state < m.states - rank; state += rank) pass.template operator()<false, false>(state);
      pass.template operator()<false, true>(m.states - rank);
    }
    start += count;
  }
}

void walk(int64_t lanes, const Mixer& m, const Segment& s, int64_t head, const float* from, float* to, int64_t stride,
          float* tile) {
  if (lanes == 64) return walk<64>(m, s, head, from, to, stride, tile);
  lanes == 32 ? walk<32>(m, s, head, from, to, stride, tile) : walk<16>(m, s, head, from, to, stride, tile);
}

}  // namespace
}  // namespace state
