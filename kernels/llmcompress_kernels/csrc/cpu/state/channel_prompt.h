// A prompt, or a part of one, through the mixers of Mamba-1.
//
// A layer takes two passes over its channels, unit by unit: projection and convolution; then, once time steps, B and C of all
// tokens are known, the time steps' own projection, the scan, the rows of the gate, and the gate.
#pragma once

#include "channel_mixer.h"
#include "segments.h"

namespace state {
namespace {

class ChannelPrompt : public SegmentWorker {
 public:
  using SegmentWorker::SegmentWorker;

 private:
  // Channels of a unit lie side by side, token by token: [units][T][unit].
  float* unit(int64_t i, int64_t count) const { return team_.mixed.get(0) + i * count * unit_; }

  // Rows [I] of tokens, for round().
  auto whole_rows(int64_t count) const {
    return [this, count](int64_t first, int64_t tokens, float* rows) {
      for (int64_t i = 0; i < units_; ++i) {
        for (int64_t t = 0; t < tokens; ++t) {
          std::memcpy(rows + t * inner_ + i * unit_, unit(i, count) + (first + t) * unit_, size_t(unit_) * 4);
        }
      }
    };
  }

  void layer(int index, int64_t at, int64_t count) override {
    const LayerOperands& o = e_.layers[size_t(index)];
    // no groups: B and C are not convolved
    const Mixer m{o.taps.data(), o.l.conv_bias, nullptr, nullptr, nullptr, nullptr, m_.heads, 0, m_.channels, m_.states, 0, 0, 0};
    const Inputs in = round(o.in, count, team_.activations, team_.normed, [&](int64_t first, int64_t tokens, float* rows) {
      for (int64_t t = 0; t < tokens; ++t) norm(hidden_ + (first + t) * m_.hidden, o.l.norm, rows + t * m_.hidden);
    });
    wait(kInput);
    const Range units = share(units_);
    for (int64_t i = units.first; i < units.last; ++i) convolved(o, m, in, index, at, count, i);
    wait(kMix);
    const Inputs mixed = round(o.x, count, team_.more, team_.rows, whole_rows(count));
    wait(kMix);
    select(o, mixed, count);
    for (int64_t i = units.first; i < units.last; ++i) scanned(o, in, index, at, count, i);
    wait(kGate);
    const Inputs out = round(o.out, count, team_.activations, team_.normed, whole_rows(count));
    wait(kGate);
    add_outputs(o.out, out, count);
    wait(kOutProj);
  }

  void convolved(const LayerOperands& o, const Mixer& m, const Inputs& in, int layer, int64_t at, int64_t count, int64_t i) {
    const int64_t first = i * unit_;
    float* const x = unit(i, count);
    product(o.in, in, first, first + unit_, count, x, unit_);
    took(kInProj);
    std::atomic<int>& counter = left(layer, units_ + i);
    convolve_unit(m, counter, layer, at, first, count, x, own_.tile.get(kTaps * unit_));
    counter.store(int(at) + 1, std::memory_order_release);
  }

  // Inputs of time steps [T, R], B and C [T, 2 N] of all tokens; the whole team has them.
  void select(const LayerOperands& o, const Inputs& mixed, int64_t count) {
    const int64_t stride = e_.x_row();
    float* const raw = team_.decay.get(count * stride);
    const Range blocks = share(o.x.blocks());
    product(o.x, mixed, blocks.first * LANES, blocks.last * LANES, count, raw + blocks.first * LANES, stride);
    wait(kMix);
    const Range mine = share(count);
    float *const times = team_.steps.get(0), *const bc = team_.bc.get(0);
    for (int64_t t = mine.first; t < mine.last; ++t) {
      split_selection(m_, o.l.gain, raw + t * stride, times + t * m_.rank, bc + t * 2 * kChannelStates);
    }
    wait(kMix);
  }

  // A unit from its time steps to its gate, in place.
  void scanned(const LayerOperands& o, const Inputs& in, int layer, int64_t at, int64_t count, int64_t i) {
    const int64_t first = i * unit_, size = count * unit_;
    float *const x = unit(i, count), *const dt = own_.tile.get(2 * size), *const gate = dt + size;
    product(o.dt, {{}, team_.steps.get(0)}, first, first + unit_, count, dt, unit_);
    for (int64_t t = 0; t < count; ++t) positive_steps(dt + t * unit_, o.l.dt_bias + first, unit_);
    await(left(layer, i), at, kMix);
    for (int64_t c = 0; c < unit_; c += LANES) {
      float* const piece = tiles(layer) + (first + c) * kChannelStates;
      if (at == 0 && p_.first != 0) std::fill(piece, piece + kBlockFloats, 0.0f);
      const float* rates = o.rates.data() + (first + c) * kChannelStates;
      scan_channels(piece, rates, count, dt + c, x + c, unit_, team_.bc.get(0), o.l.d + first + c);
    }
    left(layer, i).store(int(at) + 1, std::memory_order_release);
    took(kState);
    product(o.in, in, inner_ + first, inner_ + first + unit_, count, gate, unit_);
    took(kInProj);
    open_gate(x, gate, size, x);
    took(kGate);
  }

  void store(int layer, int64_t head) override {
    const ChannelHeads how = channel_heads(e_, e_.layers[size_t(layer)].l);
    const float* tile = tiles(layer) + head * m_.channels * kChannelStates;
    const ChannelKept kept = how.kept(held_, layer, p_.slot, head);
    if (m_.bits != 0) how.pack(tile, kept);
    else std::memcpy(kept.floats, tile, size_t(m_.channels) * kChannelStates * 4);
  }
};

}  // namespace
}  // namespace state
