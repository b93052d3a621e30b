// What steps and prompts through the mixers of Mamba-1 do alike.
#pragma once

#include "elementwise.h"
#include "engine.h"

namespace state {
namespace {

// What x_proj yields of a token: inputs of time steps [R], B and C [2 N], normed where the model norms them.
void split_selection(const MixerModel& m, const float* gain, const float* raw, float* times, float* bc) {
  const auto part = [&](int64_t from, int64_t count, float* to) {
    if (m.gate_epsilon < 0.0f) std::memcpy(to, raw + from, sizeof(float) * size_t(count));
    else rms_norm(raw + from, count, m.gate_epsilon, gain == nullptr ? nullptr : gain + from, to);
  };
  part(0, m.rank, times);
  for (int64_t i = 0; i < 2; ++i) part(m.rank + i * kChannelStates, kChannelStates, bc + i * kChannelStates);
}

// Time steps of some channels from what dt_proj yields; `count` is a multiple of sixteen.
void positive_steps(float* dt, const float* bias, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    _mm512_storeu_ps(dt + i, softplus16(_mm512_add_ps(_mm512_loadu_ps(dt + i), _mm512_loadu_ps(bias + i))));
  }
}

ChannelHeads channel_heads(const Engine& e, const MixerLayer& l) {
  return {e.mode(l), e.m.bits, e.m.window, e.inner(), e.m.channels, l.fixed};
}

}  // namespace
}  // namespace state
