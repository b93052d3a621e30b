// Decode with replay windows: what window.h declares, and its operator.
#include "window.h"

#include <omp.h>

#include <cstdlib>

#include "llmcompress/isa.h"
#include "nibbles.h"
#include "pick.h"
#include "tile_update.h"

namespace state {
namespace {

template <int Bits, int J, Mode mode>
void replay_head(uint8_t* codes, uint16_t* channel, uint16_t* scale, const uint16_t* fixed, const Window& window, const float* b,
                 const float* c, float* y, float* tile, int p) {
  constexpr int n = 32 * J;
  const int last = window.tokens - 1;
  const auto earlier = [&]<int Count>(int r, const int (&pairs)[Count], __m512* old) __attribute__((always_inline)) {
    for (int k = 0; k < last; ++k) {
      const __m512 a = _mm512_set1_ps(window.decay[k]), x = _mm512_set1_ps(window.drive[k][r]);
      for (int i = 0; i < 2 * Count; ++i) {
        const float* input = b + k * n + 32 * pairs[i / 2] + i % 2 * 16;
        old[i] = _mm512_add_ps(_mm512_mul_ps(a, old[i]), _mm512_mul_ps(x, _mm512_loadu_ps(input)));
      }
    }
  };
  update_tile<Bits, J, mode>(codes, channel, scale, fixed, window.decay[last], window.drive[last], b + last * n, c, y, tile, p,
                             earlier);
}

template <int J, Mode mode>
void replay_nibbles(uint8_t* codes, uint16_t* channel, uint16_t* scale, const uint16_t* fixed, const Window& window, const float* b,
                    const float* c, float* y, float* tile, int p) {
  const bool few = window.tokens <= kFastWindow;
  if (few && update_nibbles<J, mode, true>(codes, channel, scale, fixed, window, b, c, y, tile, p)) return;
  replay_head<4, J, mode>(codes, channel, scale, fixed, window, b, c, y, tile, p);
}

}  // namespace

Replay head_replay(Mode mode, int bits, int64_t states) {
  static const bool nibbles = llmcompress::has_avx512();
  return for_bits<Replay>(bits, mode, states, []<int Bits, int J, Mode M>() -> Replay {
    if constexpr (in_nibbles(Bits, J, M)) {
      if (nibbles) return replay_nibbles<J, M>;
    }
    return replay_head<Bits, J, M>;
  });
}

WindowHeads::WindowHeads(Mode mode, int bits, int64_t window, int64_t heads, int64_t groups, int64_t channels, int64_t states)
    : replay_(head_replay(mode, bits, states)), read_(head_read(bits, states)), window_(window), heads_(heads), groups_(groups),
      channels_(channels), states_(states), memory_(static_cast<size_t>((window + 1) * states + 16)) {
  const auto at = reinterpret_cast<uintptr_t>(memory_.data());
  b_ = reinterpret_cast<float*>((at + 63) / 64 * 64);
  c_ = b_ + window * states;
}

void WindowHeads::share_group(int64_t head, const Kept& kept, const float* b, const float* c) {
  const int64_t group = head / (heads_ / groups_);
  const float* old = kept.recent + heads_ * channels_ + heads_ + group * states_;
  const bool full = kept.count == window_ - 1;
  if (full) split_pairs(c, c_, static_cast<int>(states_));
  for (int64_t k = 0; k <= kept.count; ++k) {
    const float* input = k == kept.count ? b : old + k * row();
    if (full) {
      split_pairs(input, b_ + k * states_, static_cast<int>(states_));
      continue;
    }
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < states_; i += 16) sum = _mm512_fmadd_ps(_mm512_loadu_ps(input + i), _mm512_loadu_ps(c + i), sum);
    dots_[k] = _mm512_reduce_add_ps(sum);
  }
}

// Lines of the next head that neither kernel asks for.
void WindowHeads::look_ahead(int64_t head, const Kept& kept) const {
  const auto fetch = [](const void* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch(static_cast<const char*>(from) + at, _MM_HINT_T0);
  };
  fetch(kept.scale + states_, states_ * 2);
  if (kept.channel != nullptr) fetch(kept.channel + channels_, channels_ * 2);
  for (int64_t k = 0; k < kept.count; ++k) fetch(kept.recent + k * row() + (head + 1) * channels_, channels_ * 4);
}

void WindowHeads::token(int64_t head, const Kept& kept, float decay, const float* x, const float* b, const float* c, float* y,
                        float* tile) {
  if (b != last_) share_group(head, kept, b, c);
  last_ = b;
  look_ahead(head, kept);
  Window window;
  const int64_t inner = heads_ * channels_;
  const int count = static_cast<int>(kept.count), channels = static_cast<int>(channels_);
  for (int k = 0; k < count; ++k) {
    const float* old = kept.recent + k * row();
    window.drive[k] = old + head * channels_;
    window.decay[k] = old[inner + head];
  }
  window.drive[count] = x;
  window.decay[count] = decay;
  window.tokens = count + 1;
  if (count == window_ - 1) {
    replay_(kept.codes, kept.channel, kept.scale, kept.fixed, window, b_, c_, y, tile, channels);
    return;
  }
  read_(kept.codes, kept.fixed == nullptr ? kept.channel : kept.fixed, kept.scale, window, dots_, c, y, channels);
  float* now = kept.recent + count * row();
  std::memcpy(now + head * channels_, x, sizeof(float) * static_cast<size_t>(channels_));
  now[inner + head] = decay;
  const int64_t share = heads_ / groups_;
  if (head % share == 0) {
    std::memcpy(now + inner + heads_ + head / share * states_, b, sizeof(float) * static_cast<size_t>(states_));
  }
}

}  // namespace state

extern "C" {

int llmc_dsq_update(uint8_t*, uint16_t*, uint16_t*, const uint16_t*, const float*, const float*, const float*, const float*,
                    float*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);

// As llmc_dsq_update, within windows of R tokens: recent [S, R - 1, row] and count [S] are replaced as well.
// Returns 2 where a count is none of 0 .. R - 1; nothing is done then.
__attribute__((visibility("default"))) int llmc_dsq_replay_update(
    uint8_t* codes, uint16_t* channel, uint16_t* scale, const uint16_t* fixed, float* recent, int32_t* count, const float* x,
    const float* decay, const float* b, const float* c, float* y, int64_t window, int64_t sequences, int64_t heads, int64_t groups,
    int64_t channels, int64_t states, int64_t bits, int64_t refit, int64_t dither) {
  using namespace state;
  for (int64_t s = 0; s < sequences; ++s) {
    if (count[s] < 0 || count[s] >= window) return 2;
  }
  if (window == 1) {
    return llmc_dsq_update(codes, channel, scale, fixed, x, decay, b, c, y, sequences, heads, groups, channels, states, bits, refit,
                           dither);
  }
  const Mode mode = mode_of(fixed, refit, dither);
  const int width = static_cast<int>(bits);
  if (!WindowHeads(mode, width, window, heads, groups, channels, states).runs()) return 1;
  if (channels % kRows != 0 || channels > kMaxChannels) return 1;
  const int64_t bytes = channels * states * bits / 8, share = heads / groups;
  const auto rounds = [&](int64_t s) { return count[s] == window - 1; };
#pragma omp parallel if (sequences * heads > 8)
  {
    WindowHeads run(mode, width, window, heads, groups, channels, states);
    float* tile = static_cast<float*>(__builtin_assume_aligned(std::aligned_alloc(64, channels * states * 4), 64));
    const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
    const int64_t last = first_task(part + 1, parts, sequences, heads, rounds);
    for (int64_t i = first_task(part, parts, sequences, heads, rounds); i < last; ++i) {
      const int64_t s = i / heads, head = i % heads, group = s * groups + head / share;
      const Kept kept{codes + i * bytes, channel == nullptr ? nullptr : channel + i * channels, scale + i * states,
                      fixed == nullptr ? nullptr : fixed + head * channels, recent + s * (window - 1) * run.row(), count[s]};
      run.token(head, kept, decay[i], x + i * channels, b + group * states, c + group * states, y + i * channels, tile);
    }
    std::free(tile);
  }
  for (int64_t s = 0; s < sequences; ++s) count[s] = rounds(s) ? 0 : count[s] + 1;
  return 0;
}

}  // extern "C"
