// Decode: one token for every sequence and head, the state stored as codes and scales, or as fp32.
#include <cstdlib>

#include "llmcompress/isa.h"
#include "heads.h"
#include "nibbles.h"
#include "pick.h"
#include "tile_update.h"

namespace state {
namespace {

const float* zeros_of_rows() {
  static const float zeros[kMaxChannels] = {};
  return zeros;
}

template <int Bits, int J, Mode mode>
void update_head(uint8_t* codes, uint16_t* channel, uint16_t* scale, const uint16_t* fixed, float decay, const float* x,
                 const float* b, const float* c, float* y, float* tile, int p) {
  const auto none = []<int Count>(int, const int (&)[Count], __m512*) __attribute__((always_inline)) {};
  update_tile<Bits, J, mode>(codes, channel, scale, fixed, decay, x, b, c, y, tile, p, none);
}

// Codes and scales of a tile in pair order.
template <int Bits, int J, Mode mode>
void pack_head(float* tile, uint8_t* codes, uint16_t* channel, uint16_t* scale, const uint16_t* fixed, int p) {
  constexpr int n = 32 * J;
  constexpr float qmax = (1 << (Bits - 1)) - 1;
  Scales now;
  alignas(64) float zeros[n] = {}, ignored[kMaxChannels];
  if constexpr (calibrated(mode)) fixed_channels(now, fixed, p);
  auto load = [&]<int Count>(int r, const int (&pairs)[Count], __m512* old) __attribute__((always_inline)) {
    for (int i = 0; i < 2 * Count; ++i) old[i] = _mm512_load_ps(tile + r * n + 32 * pairs[i / 2] + i % 2 * 16);
  };
  // u = 1 h + 0 (x) 0
  refresh<J, calibrated(mode)>(now, tile, p, 1.0f, zeros_of_rows(), zeros, zeros, ignored, qmax, channel, scale, load);
  encode_rows<Bits, J, mode>(now, tile, codes, channel, p);
}

template <int J, Mode mode>
void update_nibbles_or_tile(uint8_t* codes, uint16_t* channel, uint16_t* scale, const uint16_t* fixed, float decay, const float* x,
                            const float* b, const float* c, float* y, float* tile, int p) {
  Window one;
  one.tokens = 1, one.drive[0] = x, one.decay[0] = decay;
  if (update_nibbles<J, mode, false>(codes, channel, scale, fixed, one, b, c, y, tile, p)) return;
  update_head<4, J, mode>(codes, channel, scale, fixed, decay, x, b, c, y, tile, p);
}

}  // namespace

Head head_update(Mode mode, int bits, int64_t states) {
  static const bool nibbles = llmcompress::has_avx512();
  return for_bits<Head>(bits, mode, states, []<int Bits, int J, Mode M>() -> Head {
    if constexpr (in_nibbles(Bits, J, M)) {
      if (nibbles) return update_nibbles_or_tile<J, M>;
    }
    return update_head<Bits, J, M>;
  });
}

Pack head_pack(Mode mode, int bits, int64_t states) {
  return for_bits<Pack>(bits, mode, states, []<int Bits, int J, Mode M>() -> Pack { return pack_head<Bits, J, M>; });
}

void float_update(float* rows, float decay, const float* x, const float* b, const float* c, float* y, int64_t channels,
                  int64_t states) {
  const __m512 a = _mm512_set1_ps(decay);
  alignas(64) float out[kRows][16];
  for (int64_t base = 0; base < channels; base += kRows) {
    for (int r = 0; r < kRows; ++r) {
      float* row = rows + (base + r) * states;
      const __m512 xr = _mm512_set1_ps(x[base + r]);
      __m512 read = _mm512_setzero_ps();
      for (int64_t n = 0; n < states; n += 16) {
        _mm_prefetch(reinterpret_cast<const char*>(row + n + 512), _MM_HINT_T0);
        const __m512 fresh = _mm512_fmadd_ps(a, _mm512_loadu_ps(row + n), _mm512_mul_ps(xr, _mm512_loadu_ps(b + n)));
        _mm512_storeu_ps(row + n, fresh);
        read = _mm512_fmadd_ps(fresh, _mm512_loadu_ps(c + n), read);
      }
      _mm512_store_ps(out[r], read);
    }
    _mm512_storeu_ps(y + base, sum_rows(out));
  }
}

}  // namespace state

extern "C" {

// codes [S, H, P, bytes], channel [S, H, P] or null with fixed [H, P], scale [S, H, N]; all are replaced.
// Returns 0, or 1 for a shape or width that has no kernel.
__attribute__((visibility("default"))) int llmc_dsq_update(
    uint8_t* codes, uint16_t* channel, uint16_t* scale, const uint16_t* fixed, const float* x, const float* decay,
    const float* b, const float* c, float* y, int64_t sequences, int64_t heads, int64_t groups, int64_t channels,
    int64_t states, int64_t bits, int64_t refit, int64_t dither) {
  using namespace state;
  const int width = static_cast<int>(bits);
  const Head run = head_update(mode_of(fixed, refit, dither), width, states);
  if (run == nullptr || channels % kRows != 0 || channels > kMaxChannels) return 1;
  const int64_t bytes = channels * states * bits / 8, share = heads / groups;
#pragma omp parallel if (sequences * heads > 8)
  {
    alignas(64) float bp[kMaxStates], cp[kMaxStates];
    alignas(64) float tile[kMaxChannels * 16];  // a small tile on the stack, a large one on the heap
    float* mine = channels * states <= kMaxChannels * 16
                      ? tile
                      : static_cast<float*>(__builtin_assume_aligned(std::aligned_alloc(64, channels * states * 4), 64));
    int64_t last = -1;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < sequences * heads; ++i) {
      const int64_t sequence = i / heads, head = i % heads, group = sequence * groups + head / share;
      if (group != last) {
        split_pairs(b + group * states, bp, states);
        split_pairs(c + group * states, cp, states);
        last = group;
      }
      run(codes + i * bytes, channel == nullptr ? nullptr : channel + i * channels, scale + i * states,
          fixed == nullptr ? nullptr : fixed + head * channels, decay[i], x + i * channels, bp, cp, y + i * channels, mine,
          channels);
    }
    if (mine != tile) std::free(mine);
  }
  return 0;
}

// A state in fp32 [S, H, P, N] to codes and scales: the end of a prompt.
__attribute__((visibility("default"))) int llmc_dsq_pack(const float* floats, uint8_t* codes, uint16_t* channel,
                                                         uint16_t* scale, const uint16_t* fixed, int64_t sequences,
                                                         int64_t heads, int64_t channels, int64_t states, int64_t bits,
                                                         int64_t refit, int64_t dither) {
  using namespace state;
  const int width = static_cast<int>(bits);
  const Pack run = head_pack(mode_of(fixed, refit, dither), width, states);
  if (run == nullptr || channels % kRows != 0 || channels > kMaxChannels) return 1;
  const int64_t size = channels * states;
#pragma omp parallel for schedule(static) if (sequences * heads > 8)
  for (int64_t i = 0; i < sequences * heads; ++i) {
    float* tile = static_cast<float*>(__builtin_assume_aligned(std::aligned_alloc(64, size * 4), 64));
    for (int64_t r = 0; r < channels; ++r) {
      split_pairs(floats + i * size + r * states, tile + r * states, static_cast<int>(states));
    }
    run(tile, codes + i * size * bits / 8, channel == nullptr ? nullptr : channel + i * channels, scale + i * states,
        fixed == nullptr ? nullptr : fixed + i % heads * channels, static_cast<int>(channels));
    std::free(tile);
  }
  return 0;
}

// The same with a state in fp32 [S, H, P, N], which is replaced.
__attribute__((visibility("default"))) int llmc_state_update(float* states_io, const float* x, const float* decay,
                                                             const float* b, const float* c, float* y, int64_t sequences,
                                                             int64_t heads, int64_t groups, int64_t channels, int64_t states) {
  using namespace state;
  if (states % 16 != 0 || channels % kRows != 0) return 1;
  const int64_t share = heads / groups;
#pragma omp parallel for schedule(static) if (sequences * heads > 8)
  for (int64_t i = 0; i < sequences * heads; ++i) {
    const int64_t sequence = i / heads, head = i % heads, group = sequence * groups + head / share;
    const float *bg = b + group * states, *cg = c + group * states;
    float_update(states_io + i * channels * states, decay[i], x + i * channels, bg, cg, y + i * channels, channels, states);
  }
  return 0;
}

// Counts from now on in `counts` [4] what 4-bit kernels find unsure and compute again: square roots, state scales, codes, and
// heads whose codes all are or that tile.h does; null ends it. Right for one thread only.
__attribute__((visibility("default"))) void llmc_state_count(int64_t* counts) { state::counted = counts; }

}  // extern "C"
