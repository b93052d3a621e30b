// One token of every sequence through a whole model. Between its projections a layer of Mamba-2 does what mixer.cpp does,
// with the same functions, and the state update is that of update.cpp: a step is bit for bit the chain of the operators.
#include "channel_step.h"
#include "elementwise.h"
#include "step.h"
#include "window.h"

namespace state {
namespace {

class HeadStep : public StepWorker {
 public:
  HeadStep(Engine& engine, const MixerStates& states, const MixerStep& step, Barrier& barrier, int thread)
      : StepWorker(engine, states, step, barrier, thread), steps_(engine.steps.get(batch_ * m_.heads)),
        decay_(engine.decay.get(batch_ * m_.heads)) {}

 private:
  Range mixer(const LayerOperands& o, int index, const Activations& a, float* out, int64_t stride) override {
    const Range rows = share(o.in.blocks());
    e_.multiply(o.in, a, normed_, batch_, rows.first, rows.last, own_.row.get(m_.hidden), projected_, row_);
    if (o.dt.present()) {
      const Range heads = share(m_.heads);
      time_rows(o.dt, normed_, batch_, heads.first, heads.last, projected_ + inner_ + width_, row_);
    }
    wait(kInProj);
    mix(o.l, index);
    wait(kMix);
    if (held_.recent != nullptr) update_windows(o.l, index);
    else update(o.l, index);
    wait(kState);
    const Range mine = share(batch_);
    for (int64_t b = mine.first; b < mine.last; ++b) {
      float* y = y_ + b * inner_;
      gated_norm(y, projected_ + b * row_, o.l.gain, y, inner_, m_.groups, m_.gate_epsilon);
    }
    wait(kGate);
    return project_out(o, out, stride);
  }

  // Convolution, silu and time steps.
  void mix(const MixerLayer& l, int index) {
    convolve(l, index, inner_);
    const Range mine = share(batch_);
    for (int64_t b = mine.first; b < mine.last; ++b) {
      const int64_t at = b * m_.heads;
      time_steps(projected_ + b * row_ + inner_ + width_, l.dt_bias, l.a, 0.0f, 3.0e38f, m_.heads, steps_ + at, decay_ + at);
    }
  }

  void update(const MixerLayer& l, int layer) {
    const int64_t channels = m_.channels, states = m_.states, share_of_group = m_.heads / m_.groups;
    const Head run = m_.bits == 0 ? nullptr : head_update(e_.mode(l), m_.bits, states);
    float* tile = own_.tile.get(channels * states);
    alignas(64) float bp[kMaxStates], cp[kMaxStates], drive[kMaxChannels];
    int64_t last = -1;
    const Range tasks = share(batch_ * m_.heads);
    for (int64_t task = tasks.first; task < tasks.last; ++task) {
      const int64_t b = task / m_.heads, head = task % m_.heads, group = head / share_of_group;
      const float* x = mixed_ + b * width_ + head * channels;
      const float* bs = mixed_ + b * width_ + inner_ + group * states;
      const float* cs = bs + e_.both();
      const __m512 by = _mm512_set1_ps(steps_[task]);
      for (int64_t p = 0; p < channels; p += 16) _mm512_store_ps(drive + p, _mm512_mul_ps(by, _mm512_loadu_ps(x + p)));
      float* y = y_ + task * channels;
      const int64_t at = (layer * held_.slots + s_.slots[b]) * m_.heads + head;
      if (run == nullptr) {
        float_update(held_.floats + at * channels * states, decay_[task], drive, bs, cs, y, channels, states);
      } else {
        if (b * m_.groups + group != last) {
          split_pairs(bs, bp, int(states));
          split_pairs(cs, cp, int(states));
          last = b * m_.groups + group;
        }
        run(held_.codes + at * channels * states * m_.bits / 8, held_.channel == nullptr ? nullptr : held_.channel + at * channels,
            held_.scale + at * states, l.fixed == nullptr ? nullptr : l.fixed + head * channels, decay_[task], drive, bp, cp, y,
            tile, int(channels));
      }
      skip(l.d[head], x, y);
    }
  }

  // The same within replay windows.
  void update_windows(const MixerLayer& l, int layer) {
    const int64_t channels = m_.channels, states = m_.states, heads = m_.heads, share_of_group = heads / m_.groups;
    WindowHeads run(e_.mode(l), m_.bits, m_.window, heads, m_.groups, channels, states);
    float* tile = own_.tile.get(channels * states);
    alignas(64) float drive[kMaxChannels];
    const auto first = [&](int part) {
      return first_task(part, barrier_.threads(), batch_, heads, [&](int64_t b) { return rounds(b); });
    };
    const int64_t last = first(thread_ + 1);
    for (int64_t task = first(thread_); task < last; ++task) {
      const int64_t b = task / heads, head = task % heads, slot = layer * held_.slots + s_.slots[b], at = slot * heads + head;
      const float* x = mixed_ + b * width_ + head * channels;
      const float* bs = mixed_ + b * width_ + inner_ + head / share_of_group * states;
      const __m512 by = _mm512_set1_ps(steps_[task]);
      for (int64_t p = 0; p < channels; p += 16) _mm512_store_ps(drive + p, _mm512_mul_ps(by, _mm512_loadu_ps(x + p)));
      const Kept kept{held_.codes + at * channels * states * m_.bits / 8,
                      held_.channel == nullptr ? nullptr : held_.channel + at * channels, held_.scale + at * states,
                      l.fixed == nullptr ? nullptr : l.fixed + head * channels, held_.recent + slot * (m_.window - 1) * run.row(),
                      held_.count[s_.slots[b]]};
      float* y = y_ + task * channels;
      run.token(head, kept, decay_[task], drive, bs, bs + e_.both(), y, tile);
      skip(l.d[head], x, y);
    }
  }

  // y += d x of a head.
  void skip(float d, const float* x, float* y) const {
    const __m512 by = _mm512_set1_ps(d);
    for (int64_t p = 0; p < m_.channels; p += 16) {
      _mm512_storeu_ps(y + p, _mm512_fmadd_ps(by, _mm512_loadu_ps(x + p), _mm512_loadu_ps(y + p)));
    }
  }

  float *steps_, *decay_;
};

}  // namespace

void prepare_step(Engine& e, int64_t batch, int64_t threads) {
  // threads find these large enough
  e.hidden.get(batch * e.m.hidden), e.normed.get(batch * e.m.hidden), e.projected.get(batch * e.row());
  e.mixed.get(batch * e.width()), e.steps.get(batch * e.step_row()), e.decay.get(batch * e.m.heads);
  e.y.get(batch * e.inner()), e.delta.get(batch * e.hidden_row());
  e.activations.get(int64_t(e.activation_bytes(batch)));
  e.best.resize(std::max(e.best.size(), size_t(batch * threads)));
}

void run_step(Engine& engine, const MixerStates& states, const MixerStep& step, Barrier& barrier, int thread) {
  if (engine.per_channel()) ChannelStep(engine, states, step, barrier, thread).run();
  else HeadStep(engine, states, step, barrier, thread).run();
}

void run_layer(Engine& engine, const MixerStates& states, int layer, const Mixers::Rows& rows, Barrier& barrier, int thread) {
  const MixerStep step{nullptr, rows.slots, nullptr, nullptr, nullptr, rows.batch, barrier.threads(), 0};
  if (engine.per_channel()) ChannelStep(engine, states, step, barrier, thread).run_layer(layer, rows.hidden, rows.delta);
  else HeadStep(engine, states, step, barrier, thread).run_layer(layer, rows.hidden, rows.delta);
}

}  // namespace state
