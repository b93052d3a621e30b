// One token of every sequence through a whole model: all but what stands between the projections of a mixer.
#pragma once

#include "elementwise.h"
#include "engine.h"

namespace state {

class StepWorker : public Worker {
 public:
  StepWorker(Engine& engine, const MixerStates& states, const MixerStep& step, Barrier& barrier, int thread)
      : Worker(engine, engine.threads[size_t(thread)], barrier, thread, thread == 0 ? step.seconds : nullptr), held_(states), s_(step), batch_(step.batch),
        most_(engine.kernels.token_block), inner_(engine.inner()), width_(engine.width()), row_(engine.row()),
        hidden_(engine.hidden.get(batch_ * m_.hidden)), normed_(engine.normed.get(batch_ * m_.hidden)),
        projected_(engine.projected.get(batch_ * row_)), mixed_(engine.mixed.get(batch_ * width_)),
        y_(engine.y.get(batch_ * inner_)), delta_(engine.delta.get(batch_ * engine.hidden_row())),
        activations_(engine.activations.get(int64_t(engine.activation_bytes(batch_)))) {}

  virtual ~StepWorker() = default;

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

 protected:
  void layer(const LayerOperands& o, int index, const Activations& a) {
    const int64_t stride = e_.hidden_row();
    const Range rows = mixer(o, index, a, delta_, stride);
    for (int64_t b = 0; b < batch_; ++b) {
      for (int64_t r = rows.first; r < rows.last; ++r) hidden_[b * m_.hidden + r] += delta_[b * stride + r];
    }
    wait(kOutProj);
  }

  // out [B, stride] from rounded inputs; returns which of its columns this thread wrote.
  virtual Range mixer(const LayerOperands& o, int index, const Activations& a, float* out, int64_t stride) = 0;

  // Convolution and silu of all channels, whose inputs begin at column `first` of what in_proj yields.
  void convolve(const MixerLayer& l, int index, int64_t first) {
    float* const conv = held_.conv + int64_t(index) * held_.slots * width_ * 4;
    const int64_t vectors = width_ / 16;
    const Range tasks = share(batch_ * vectors);
    for (int64_t task = tasks.first; task < tasks.last; ++task) {
      const int64_t b = task / vectors, i = task % vectors * 16;
      const __m512 input = _mm512_loadu_ps(projected_ + b * row_ + first + i);
      __m512 value = convolve16(conv + (s_.slots[b] * width_ + i) * 4, l.conv_weight + 4 * i, input);
      if (l.conv_bias != nullptr) value = _mm512_add_ps(value, _mm512_loadu_ps(l.conv_bias + i));
      _mm512_storeu_ps(mixed_ + b * width_ + i, silu16(value));
    }
  }

  // The last projection of y [B, I]; returns which columns of out [B, stride] this thread wrote.
  Range project_out(const LayerOperands& o, float* out, int64_t stride) {
    const Activations inputs = e_.place(o.out, batch_, activations_);
    if (o.out.packed()) {
      round_rows(o.out, y_, inputs);
      wait(kGate);
    }
    const Range outputs = share(o.out.blocks());
    e_.multiply(o.out, inputs, y_, batch_, outputs.first, outputs.last, own_.row.get(inner_), out, stride);
    return {outputs.first * LANES, std::min(outputs.last * LANES, o.out.m.rows)};
  }

  // This thread's share of rows as inputs of a packed projection.
  void round_rows(const Operand& o, const float* rows, const Activations& to) {
    const Range blocks = share(to.blocks());
    for (int64_t block = blocks.first; block < blocks.last; ++block) e_.quantize(o, rows, to, block);
  }

  // Whether a sequence stands at the end of its replay window.
  bool rounds(int64_t b) const { return held_.count[s_.slots[b]] == m_.window - 1; }

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
  float *hidden_, *normed_, *projected_, *mixed_, *y_, *delta_;
  char* activations_;
};

}  // namespace state
