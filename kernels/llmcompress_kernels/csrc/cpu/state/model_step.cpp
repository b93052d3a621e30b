// One token of every sequence through a whole Mamba-2 model. Between its projections a layer does what mixer.cpp does,
// with the same functions, and the state update is that of update.cpp: a step is bit for bit the chain of the operators.
#include "elementwise.h"
#include "engine.h"
#include "window.h"

#pragma GCC push_options
STATE_TARGET

namespace state {
namespace {

class StepWorker : public Worker {
 public:
  StepWorker(Engine& engine, const MixerStates& states, const MixerStep& step, Barrier& barrier, int thread)
      : Worker(engine, engine.threads[size_t(thread)], barrier, thread, thread == 0 ? step.seconds : nullptr), held_(states), s_(step), batch_(step.batch),
        most_(engine.kernels.token_block), inner_(engine.inner()), width_(engine.width()), row_(engine.row()),
        hidden_(engine.hidden.get(batch_ * m_.hidden)), normed_(engine.normed.get(batch_ * m_.hidden)),
        projected_(engine.projected.get(batch_ * row_)), mixed_(engine.mixed.get(batch_ * width_)),
        steps_(engine.steps.get(batch_ * m_.heads)), decay_(engine.decay.get(batch_ * m_.heads)),
        y_(engine.y.get(batch_ * inner_)), delta_(engine.delta.get(batch_ * engine.hidden_row())),
        activations_(engine.activations.get(int64_t(engine.activation_bytes(batch_)))) {}

  void run() {
    for (int i = 0; i <= m_.layer_count; ++i) {
      const bool last = i == m_.layer_count;
      const Operand& next = last ? e_.head : e_.layers[size_t(i)].in;
      const Activations a = e_.place(next, batch_, activations_);
      const Range blocks = share((batch_ + most_ - 1) / most_);
      for (int64_t block = blocks.first; block < blocks.last; ++block) {
        for (int64_t b = block * most_; b < std::min(batch_, (block + 1) * most_); ++b) {
          if (i == 0) embed(s_.tokens[b], hidden_ + b * m_.hidden);
          norm(hidden_ + b * m_.hidden, last ? m_.final_norm : e_.layers[size_t(i)].l.norm, normed_ + b * m_.hidden);
        }
        e_.quantize(next, normed_, a, block);
      }
      wait(kInput);
      if (last) head(a);
      else layer(e_.layers[size_t(i)], i, a);
    }
  }

  // One layer, whose hidden states [B, D] and what it adds to them lie elsewhere.
  void run_layer(int i, const float* hidden, float* delta) {
    const LayerOperands& o = e_.layers[size_t(i)];
    const Activations a = e_.place(o.in, batch_, activations_);
    const Range blocks = share((batch_ + most_ - 1) / most_);
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
      for (int64_t b = block * most_; b < std::min(batch_, (block + 1) * most_); ++b) {
        norm(hidden + b * m_.hidden, o.l.norm, normed_ + b * m_.hidden);
      }
      e_.quantize(o.in, normed_, a, block);
    }
    wait(kInput);
    mixer(o, i, a, delta, m_.hidden);
    wait(kOutProj);
    if (i == m_.layer_count - 1) move_windows();
  }

 private:
  void layer(const LayerOperands& o, int index, const Activations& a) {
    const int64_t stride = e_.hidden_row();
    const Range rows = mixer(o, index, a, delta_, stride);
    for (int64_t b = 0; b < batch_; ++b) {
      for (int64_t r = rows.first; r < rows.last; ++r) hidden_[b * m_.hidden + r] += delta_[b * stride + r];
    }
    wait(kOutProj);
  }

  // out [B, stride] from rounded inputs; returns which of its columns this thread wrote.
  Range mixer(const LayerOperands& o, int index, const Activations& a, float* out, int64_t stride) {
    const Range rows = share(o.in.blocks());
    e_.multiply(o.in, a, normed_, batch_, rows.first, rows.last, own_.row.get(m_.hidden), projected_, row_);
    if (o.dt.present()) {
      const Range heads = share(m_.heads);
      time_rows(o.dt, normed_, batch_, heads.first, heads.last, projected_ + inner_ + width_, row_);
    }
    wait(kInProj);
    mix(o.l, held_.conv + int64_t(index) * held_.slots * width_ * 4);
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
    const Activations inputs = e_.place(o.out, batch_, activations_);
    if (o.out.packed()) {
      const Range blocks = share(inputs.blocks());
      for (int64_t block = blocks.first; block < blocks.last; ++block) e_.quantize(o.out, y_, inputs, block);
      wait(kGate);
    }
    const Range outputs = share(o.out.blocks());
    e_.multiply(o.out, inputs, y_, batch_, outputs.first, outputs.last, own_.row.get(inner_), out, stride);
    return {outputs.first * LANES, std::min(outputs.last * LANES, o.out.m.rows)};
  }

  // Convolution, silu and time steps; `conv` [S, C, 4].
  void mix(const MixerLayer& l, float* conv) {
    const int64_t vectors = width_ / 16;
    const Range tasks = share(batch_ * vectors);
    for (int64_t task = tasks.first; task < tasks.last; ++task) {
      const int64_t b = task / vectors, i = task % vectors * 16;
      const __m512 input = _mm512_loadu_ps(projected_ + b * row_ + inner_ + i);
      __m512 value = convolve16(conv + (s_.slots[b] * width_ + i) * 4, l.conv_weight + 4 * i, input);
      if (l.conv_bias != nullptr) value = _mm512_add_ps(value, _mm512_loadu_ps(l.conv_bias + i));
      _mm512_storeu_ps(mixed_ + b * width_ + i, silu16(value));
    }
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
  bool rounds(int64_t b) const { return held_.count[s_.slots[b]] == m_.window - 1; }

  // y += d x of a head.
  void skip(float d, const float* x, float* y) const {
    const __m512 by = _mm512_set1_ps(d);
    for (int64_t p = 0; p < m_.channels; p += 16) {
      _mm512_storeu_ps(y + p, _mm512_fmadd_ps(by, _mm512_loadu_ps(x + p), _mm512_loadu_ps(y + p)));
    }
  }

  // Once no thread asks any more where windows stand.
  void move_windows() {
    for (int64_t b = 0; thread_ == 0 && held_.count != nullptr && b < batch_; ++b) {
      held_.count[s_.slots[b]] = rounds(b) ? 0 : held_.count[s_.slots[b]] + 1;
    }
  }

  void head(const Activations& a) {
    move_windows();
    const int64_t stride = e_.head_row();
    const Range rows = share(e_.head.blocks());
    e_.multiply(e_.head, a, normed_, batch_, rows.first, rows.last, own_.row.get(m_.hidden), s_.logits, stride);
    took(kHead);
    if (s_.best == nullptr) return;
    const int64_t first = rows.first * LANES, last = std::min(rows.last * LANES, m_.vocabulary);
    for (int64_t b = 0; b < batch_; ++b) {
      const float* logits = s_.logits + b * stride;
      e_.best[size_t(thread_ * batch_ + b)] = first < last ? std::max_element(logits + first, logits + last) - logits : -1;
    }
    wait(kHead);
    if (thread_ != 0) return;
    for (int64_t b = 0; b < batch_; ++b) {
      const float* logits = s_.logits + b * stride;
      int64_t at = -1;
      for (int t = 0; t < barrier_.threads(); ++t) {
        const int64_t i = e_.best[size_t(t * batch_ + b)];
        if (i >= 0 && (at < 0 || logits[i] > logits[at])) at = i;
      }
      s_.best[b] = at;
    }
  }

  const MixerStates& held_;
  const MixerStep& s_;
  const int64_t batch_, most_, inner_, width_, row_;
  float *hidden_, *normed_, *projected_, *mixed_, *steps_, *decay_, *y_, *delta_;
  char* activations_;
};

}  // namespace

void prepare_step(Engine& e, int64_t batch, int64_t threads) {
  // threads find these large enough
  e.hidden.get(batch * e.m.hidden), e.normed.get(batch * e.m.hidden), e.projected.get(batch * e.row());
  e.mixed.get(batch * e.width()), e.steps.get(batch * e.m.heads), e.decay.get(batch * e.m.heads);
  e.y.get(batch * e.inner()), e.delta.get(batch * e.hidden_row());
  e.activations.get(int64_t(e.activation_bytes(batch)));
  e.best.resize(std::max(e.best.size(), size_t(batch * threads)));
}

void run_step(Engine& engine, const MixerStates& states, const MixerStep& step, Barrier& barrier, int thread) {
  StepWorker(engine, states, step, barrier, thread).run();
}

void run_layer(Engine& engine, const MixerStates& states, int layer, const Mixers::Rows& rows, Barrier& barrier, int thread) {
  const MixerStep step{nullptr, rows.slots, nullptr, nullptr, nullptr, rows.batch, barrier.threads(), 0};
  StepWorker(engine, states, step, barrier, thread).run_layer(layer, rows.hidden, rows.delta);
}

}  // namespace state

#pragma GCC pop_options
