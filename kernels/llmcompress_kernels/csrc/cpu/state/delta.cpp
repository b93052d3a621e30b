// Decode of gated delta rules (arXiv 2412.06464) with packed states: a token asks what the stored state says of its key, and
// from there on is one of update.cpp or replay.cpp, with what is wrong of that in the place of dt x. The answer decides codes,
// so its sums are in halves, as the definition has them.
#include "delta.h"

#include <omp.h>

#include "memory.h"
#include "pick.h"

namespace state {
namespace {

// (scale / qmax) k in pairs.
template <int J, int Bits>
STATE_INLINE void weigh(const uint16_t* scale, const float* key, float* by) {
  alignas(64) float natural[32 * J];
  const __m512 qmax = _mm512_set1_ps((1 << (Bits - 1)) - 1);
  for (int i = 0; i < 32 * J; i += 16) {
    _mm512_store_ps(natural + i, _mm512_mul_ps(_mm512_div_ps(half_to_float(scale + i), qmax), _mm512_loadu_ps(key + i)));
  }
  split_pairs(natural, by, 32 * J);
}

template <int Bits, int J>
void tell_head(const uint8_t* codes, const uint16_t* channel, const uint16_t* scale, const float* key, float* told, int p) {
  constexpr int row_bytes = 4 * J * Bits;
  alignas(64) float by[32 * J], even[kRows][16], odd[kRows][16];
  weigh<J, Bits>(scale, key, by);
  for (int base = 0; base < p; base += kRows) {
    for (int i = 0; i < kRows; ++i) {
      const uint8_t* row = codes + (base + i) * row_bytes;
      __m512 product[2 * J];
      for (int j = 0; j < J; ++j) {
        decode_pair<Bits>(row + j * pair_bytes<Bits>(), product[2 * j], product[2 * j + 1]);
        product[2 * j] = _mm512_mul_ps(product[2 * j], _mm512_load_ps(by + 32 * j));
        product[2 * j + 1] = _mm512_mul_ps(product[2 * j + 1], _mm512_load_ps(by + 32 * j + 16));
      }
      fold_pairs<J>(product, even[i], odd[i]);
    }
    _mm512_storeu_ps(told + base, _mm512_mul_ps(folded_sum_rows(even, odd), half_to_float(channel + base)));
  }
}

Tell head_tell(int bits, int64_t states) {
  if (bits == 4) return for_states<Tell>(states, []<int J>() -> Tell { return tell_head<4, J>; });
  return bits == 8 ? for_states<Tell>(states, []<int J>() -> Tell { return tell_head<8, J>; }) : nullptr;
}

// a b, summed in halves; n a power of two.
float folded_dot(const float* a, const float* b, int64_t n) {
  float part[kMaxStates];
  for (int64_t i = 0; i < n; ++i) part[i] = a[i] * b[i];
  for (int64_t width = n / 2; width >= 1; width /= 2) {
    for (int64_t i = 0; i < width; ++i) part[i] += part[i + width];
  }
  return part[0];
}

// The tokens of a window added to what the stored state says: told [P] becomes E told + sum_j (E_j dots_j) drive_j.
void add_window(const Kept& kept, int64_t row, int64_t head, int64_t heads, int64_t channels, const float* dots, float* told) {
  float factor[kMaxWindow], left = 1.0f;
  for (int64_t j = kept.count - 1; j >= 0; --j) {
    factor[j] = left * dots[j];
    left *= kept.recent[j * row + heads * channels + head];
  }
  for (int64_t i = 0; i < channels; i += 16) {
    __m512 sum = _mm512_mul_ps(_mm512_set1_ps(left), _mm512_loadu_ps(told + i));
    for (int64_t j = 0; j < kept.count; ++j) {
      const float* drive = kept.recent + j * row + head * channels + i;
      sum = _mm512_add_ps(sum, _mm512_mul_ps(_mm512_set1_ps(factor[j]), _mm512_loadu_ps(drive)));
    }
    _mm512_storeu_ps(told + i, sum);
  }
}

}  // namespace

DeltaHeads::DeltaHeads(Mode mode, int bits, int64_t window, int64_t heads, int64_t groups, int64_t channels, int64_t states)
    : update_(head_update(mode, bits, states)), tell_(head_tell(bits, states)),
      windows_(mode, bits, window, heads, groups, channels, states), window_(window), heads_(heads), groups_(groups),
      channels_(channels), states_(states), memory_(static_cast<size_t>(2 * states + 16)) {
  const auto at = reinterpret_cast<uintptr_t>(memory_.data());
  pairs_ = reinterpret_cast<float*>((at + 63) / 64 * 64);
}

void DeltaHeads::share(int64_t head, const Kept& kept, const float* key, const float* query) {
  key_ = key;
  query_ = query;
  if (window_ == 1) {
    split_pairs(key, pairs_, static_cast<int>(states_));
    split_pairs(query, pairs_ + states_, static_cast<int>(states_));
    return;
  }
  windows_.share();
  const float* old = kept.recent + heads_ * channels_ + heads_ + head / (heads_ / groups_) * states_;
  for (int64_t j = 0; j < kept.count; ++j) dots_[j] = folded_dot(old + j * row(), key, states_);
}

void DeltaHeads::token(int64_t head, const Kept& kept, const DeltaToken& token, float* y, float* tile) {
  alignas(64) float change[kMaxChannels];
  const int channels = static_cast<int>(channels_);
  tell_(kept.codes, kept.fixed == nullptr ? kept.channel : kept.fixed, kept.scale, key_, change, channels);
  if (window_ > 1) add_window(kept, row(), head, heads_, channels_, dots_, change);
  const __m512 decay = _mm512_set1_ps(token.decay), step = _mm512_set1_ps(token.step);
  for (int i = 0; i < channels; i += 16) {
    const __m512 known = _mm512_mul_ps(decay, _mm512_load_ps(change + i));
    _mm512_store_ps(change + i, _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(token.value + i), known), step));
  }
  if (window_ > 1) {
    windows_.token(head, kept, token.decay, change, key_, query_, y, tile);
  } else {
    update_(kept.codes, kept.channel, kept.scale, kept.fixed, token.decay, change, pairs_, pairs_ + states_, y, tile, channels);
  }
}

}  // namespace state

extern "C" {

// One token of a gated delta rule: states as of llmc_dsq_replay_update (window 1: recent and count are not read); value
// [S, H, P], decay and step [S, H], key and query [S, G, N]. Returns 1 for a shape or width without a kernel, 2 where a count is
// none of 0 .. R - 1; nothing is done then.
__attribute__((visibility("default"))) int llmc_dsq_delta_update(
    uint8_t* codes, uint16_t* channel, uint16_t* scale, const uint16_t* fixed, float* recent, int32_t* count, const float* value,
    const float* decay, const float* step, const float* key, const float* query, float* y, int64_t window, int64_t sequences,
    int64_t heads, int64_t groups, int64_t channels, int64_t states, int64_t bits, int64_t refit, int64_t dither) {
  using namespace state;
  const auto held = [&](int64_t s) -> int64_t { return window > 1 ? count[s] : 0; };
  for (int64_t s = 0; s < sequences; ++s) {
    if (held(s) < 0 || held(s) >= window) return 2;
  }
  const Mode mode = mode_of(fixed, refit, dither);
  const int width = static_cast<int>(bits);
  if (channels % kRows != 0 || channels > kMaxChannels) return 1;
  if (!DeltaHeads(mode, width, window, heads, groups, channels, states).runs()) return 1;
  const int64_t bytes = channels * states * bits / 8, share = heads / groups;
  const auto rounds = [&](int64_t s) { return held(s) == window - 1; };
#pragma omp parallel if (sequences * heads > 8)
  {
    DeltaHeads run(mode, width, window, heads, groups, channels, states);
    const Floats tile = floats(channels * states);
    const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
    const int64_t last = first_task(part + 1, parts, sequences, heads, rounds);
    int64_t shared = -1;
    for (int64_t i = first_task(part, parts, sequences, heads, rounds); i < last; ++i) {
      const int64_t s = i / heads, head = i % heads, group = (s * groups + head / share) * states;
      const Kept kept{codes + i * bytes, channel == nullptr ? nullptr : channel + i * channels, scale + i * states,
                      fixed == nullptr ? nullptr : fixed + head * channels,
                      window > 1 ? recent + s * (window - 1) * run.row() : nullptr, held(s)};
      if (group != shared) run.share(head, kept, key + group, query + group);
      shared = group;
      run.token(head, kept, {value + i * channels, decay[i], step[i]}, y + i * channels, tile.get());
    }
  }
  for (int64_t s = 0; window > 1 && s < sequences; ++s) count[s] = rounds(s) ? 0 : count[s] + 1;
  return 0;
}

}  // extern "C"
