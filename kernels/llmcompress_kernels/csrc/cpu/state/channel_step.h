// The mixers of Mamba-1 in a step: convolution, the projections of time steps, B and C, state, skip and gate.
#pragma once

#include "channel_mixer.h"
#include "step.h"

namespace state {

class ChannelStep : public StepWorker {
 public:
  ChannelStep(Engine& engine, const MixerStates& states, const MixerStep& step, Barrier& barrier, int thread)
      : StepWorker(engine, states, step, barrier, thread), raw_(engine.steps.get(batch_ * engine.step_row())),
        steps_(raw_ + batch_ * engine.x_row()) {}

 private:
  Range mixer(const LayerOperands& o, int index, const Activations& a, float* out, int64_t stride) override {
    const Range rows = share(o.in.blocks());
    e_.multiply(o.in, a, normed_, batch_, rows.first, rows.last, own_.row.get(m_.hidden), projected_, row_);
    wait(kInProj);
    convolve(o.l, index, 0);
    wait(kMix);
    const Activations inputs = e_.place(o.x, batch_, activations_);
    if (o.x.packed()) {
      round_rows(o.x, mixed_, inputs);
      wait(kMix);
    }
    const Range part = share(o.x.blocks());
    e_.multiply(o.x, inputs, mixed_, batch_, part.first, part.last, own_.row.get(inner_), raw_, e_.x_row());
    wait(kMix);
    update(o, index);
    wait(kState);
    return project_out(o, out, stride);
  }

  // Some heads of all sequences: their time steps, states and gates.
  void update(const LayerOperands& o, int index) {
    const Range heads = share(m_.heads);
    if (heads.first == heads.last) return;
    const int64_t channels = m_.channels, rank = m_.rank;
    float *times = own_.tile.get(batch_ * (rank + 2 * kChannelStates)), *bc = times + batch_ * rank;
    // each thread needs them all: sooner done than waited for
    for (int64_t b = 0; b < batch_; ++b) {
      split_selection(m_, o.l.gain, raw_ + b * e_.x_row(), times + b * rank, bc + b * 2 * kChannelStates);
    }
    e_.multiply(o.dt, {}, times, batch_, heads.first * channels / LANES, heads.last * channels / LANES, own_.row.get(rank), steps_, inner_);
    const ChannelHeads how = channel_heads(e_, o.l);
    for (int64_t head = heads.first; head < heads.last; ++head) {
      const int64_t from = head * channels;
      for (int64_t b = 0; b < batch_; ++b) {
        float *dt = steps_ + b * inner_ + from, *y = y_ + b * inner_ + from;
        const float *x = mixed_ + b * inner_ + from, *selected = bc + b * 2 * kChannelStates;
        positive_steps(dt, o.l.dt_bias + from, channels);
        const ChannelKept kept = how.kept(held_, index, s_.slots[b], head);
        how.token(head, kept, o.rates.data() + from * kChannelStates, dt, x, selected, selected + kChannelStates, y);
        for (int64_t i = 0; i < channels; i += 16) {
          const __m512 through = _mm512_fmadd_ps(_mm512_loadu_ps(o.l.d + from + i), _mm512_loadu_ps(x + i), _mm512_loadu_ps(y + i));
          const __m512 gate = silu16(_mm512_loadu_ps(projected_ + b * row_ + inner_ + from + i));
          _mm512_storeu_ps(y + i, _mm512_mul_ps(through, gate));
        }
      }
    }
  }

  float *raw_, *steps_;
};

}  // namespace state
