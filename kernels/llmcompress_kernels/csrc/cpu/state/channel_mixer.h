// What steps and prompts through the mixers of Mamba-1 do alike.
#pragma once

#include "elementwise.h"
#include "engine.h"

#pragma GCC push_options
STATE_TARGET

namespace state {
namespace {

// gain x / sqrt(mean x^2 + epsilon), without `gain` where it is null; x as it is where `epsilon` is negative. `count` is a
// multiple of sixteen.
void norm_inner(const float* x, int64_t count, float epsilon, const float* gain, float* to) {
  if (epsilon < 0.0f) {
    std::memcpy(to, x, sizeof(float) * size_t(count));
    return;
  }
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) squares = _mm512_fmadd_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(x + i), squares);
  const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(count);
  const __m512 by = _mm512_set1_ps(1.0f / std::sqrt(mean + epsilon));
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(x + i), by);
    _mm512_storeu_ps(to + i, gain == nullptr ? value : _mm512_mul_ps(value, _mm512_loadu_ps(gain + i)));
  }
}

// What x_proj yields of a token: inputs of time steps [R], B and C [2 N], normed where the model norms them.
void split_selection(const MixerModel& m, const float* gain, const float* raw, float* times, float* bc) {
  norm_inner(raw, m.rank, m.gate_epsilon, gain, times);
  for (int64_t i = 0; i < 2; ++i) {
    const int64_t from = m.rank + i * kChannelStates;
    norm_inner(raw + from, kChannelStates, m.gate_epsilon, gain == nullptr ? nullptr : gain + from, bc + i * kChannelStates);
  }
}

// Time steps of some channels from what dt_proj yields; `count` is a multiple of sixteen.
void positive_steps(float* dt, const float* bias, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    _mm512_storeu_ps(dt + i, softplus16(_mm512_add_ps(_mm512_loadu_ps(dt + i), _mm512_loadu_ps(bias + i))));
  }
}

ChannelHeads channel_heads(const Engine& e, const MixerLayer& l) {
  return {e.mode(l), e.m.bits, e.m.window, e.inner(), e.m.channels};
}

// What is kept of one head of a sequence.
ChannelKept channel_kept(const Engine& e, const MixerStates& held, const MixerLayer& l, int64_t layer, int64_t slot, int64_t head) {
  const int64_t place = layer * held.slots + slot, at = place * e.m.heads + head, channels = e.m.channels;
  const int64_t row = 2 * e.inner() + kChannelStates;
  return {held.codes == nullptr ? nullptr : held.codes + at * channels * kChannelStates * e.m.bits / 8,
          held.channel == nullptr ? nullptr : held.channel + at * channels,
          held.scale == nullptr ? nullptr : held.scale + at * kChannelStates,
          l.fixed == nullptr ? nullptr : l.fixed + head * channels,
          held.floats == nullptr ? nullptr : held.floats + at * channels * kChannelStates,
          held.recent == nullptr ? nullptr : held.recent + place * (e.m.window - 1) * row,
          held.recent == nullptr ? 0 : held.count[slot]};
}

}  // namespace
}  // namespace state

#pragma GCC pop_options
