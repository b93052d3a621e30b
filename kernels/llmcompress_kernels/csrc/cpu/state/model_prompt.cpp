// A prompt, or a part of one, through a whole Mamba-2 model: every layer takes it segment by segment, as prefill.cpp does
// and with the same functions. Products are cut by tokens, since int8 products of many tokens are bound by arithmetic and
// every thread then rounds and normalizes for itself; few tokens are cut by rows as well.
#include "engine.h"
#include "prompt.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,bmi2")

namespace state {
namespace {

constexpr int64_t kTaps = 4;

int64_t segment_tokens(int64_t count) { return std::min(count, kSegment); }

class PromptWorker : public Worker {
 public:
  PromptWorker(Engine& engine, const MixerStates& states, const MixerPrompt& prompt, Barrier& barrier, int thread)
      : Worker(engine, barrier, thread, prompt.seconds), held_(states), p_(prompt), inner_(engine.inner()),
        width_(engine.width()), row_(engine.row()), lanes_(walked_lanes(m_.channels, m_.heads, p_.threads)),
        hidden_(engine.hidden.get(p_.count * m_.hidden)), projected_(engine.projected.get(segment_tokens(p_.count) * row_)),
        delta_(engine.delta.get(segment_tokens(p_.count) * engine.hidden_row())), weight_(engine.mixed_weight.get(kTaps * width_)),
        old_(engine.old.get(kTaps * width_)) {}

  void run() {
    const Range mine = share(p_.count);
    for (int64_t t = mine.first; t < mine.last; ++t) embed(p_.tokens[t], hidden_ + t * m_.hidden);
    wait(kInput);
    for (int i = 0; i < m_.layer_count; ++i) layer(e_.layers[size_t(i)], i);
    if (p_.last != 0) head();
  }

 private:
  // Which tokens of a segment and which part of a product's rows are this thread's.
  struct Part {
    int64_t first, tokens, piece, pieces;
    Range rows(int64_t blocks) const { return {blocks * piece / pieces, blocks * (piece + 1) / pieces}; }
  };
  Part part(int64_t count) const {
    const int64_t most = e_.kernels.token_block, blocks = (count + most - 1) / most, threads = barrier_.threads();
    const int64_t parts = std::min(threads, blocks), pieces = threads / parts, at = thread_ / pieces;
    if (at >= parts) return {0, 0, 0, 1};
    const int64_t first = blocks * at / parts * most, last = std::min(count, blocks * (at + 1) / parts * most);
    return {first, last - first, thread_ % pieces, pieces};
  }

  // This thread's part of a product of `x` [tokens, columns].
  Range product(const Operand& o, const Part& mine, const float* x, float* out, int64_t stride) {
    const int64_t columns = o.m.columns;
    const Activations a = e_.place(o, mine.tokens, own_.activations.get(int64_t(o.bytes(mine.tokens))));
    for (int64_t block = 0; o.packed() && block < a.blocks(); ++block) e_.quantize(o, x, a, block);
    const Range rows = mine.rows(o.blocks());
    e_.multiply(o, a, x, mine.tokens, rows.first, rows.last, own_.row.get(columns), out, stride);
    return {rows.first * LANES, std::min(rows.last * LANES, o.m.rows)};
  }

  void layer(const LayerOperands& o, int index) {
    const MixerLayer& l = o.l;
    const Mixer m{weight_, l.conv_bias, l.dt_bias, l.a, l.d, l.gain, m_.heads, m_.groups, m_.channels, m_.states,
                  m_.low, m_.high, m_.gate_epsilon};
    float* conv = held_.conv + (int64_t(index) * held_.slots + p_.slot) * width_ * kTaps;
    const bool whole = p_.first != 0 && p_.last != 0;
    tiles_ = e_.tiles.get((whole ? 1 : m_.layer_count) * e_.state_size()) + (whole ? 0 : index * e_.state_size());
    const Range columns = share(width_);
    for (int64_t i = columns.first; i < columns.last; ++i) {
      for (int64_t k = 0; k < kTaps; ++k) {
        weight_[k * width_ + i] = l.conv_weight[kTaps * i + k];
        old_[k * width_ + i] = p_.first != 0 ? 0.0f : conv[kTaps * i + k];
      }
    }
    if (p_.first != 0) {
      const Range mine = share(e_.state_size() / 16);
      std::fill(tiles_ + mine.first * 16, tiles_ + mine.last * 16, 0.0f);
    }
    wait(kInput);
    for (int64_t from = 0; from < p_.count; from += kSegment) segment(o, m, from, std::min(kSegment, p_.count - from));
    for (int64_t i = columns.first; i < columns.last; ++i) {
      for (int64_t k = 0; k < kTaps; ++k) conv[kTaps * i + k] = old_[k * width_ + i];
    }
    if (p_.last != 0) store(l, index);
    wait(kState);
  }

  void segment(const LayerOperands& o, const Mixer& m, int64_t from, int64_t count) {
    const Segment s{e_.mixed.get(count * inner_), e_.bc.get(count * 2 * e_.both()), e_.steps.get(count * m_.heads),
                    e_.decay.get(count * m_.heads), e_.y.get(count * inner_), count};
    const Part mine = part(count);
    if (mine.tokens > 0) {
      float* normed = own_.normed.get(mine.tokens * m_.hidden);
      for (int64_t t = 0; t < mine.tokens; ++t) {
        norm(hidden_ + (from + mine.first + t) * m_.hidden, o.l.norm, normed + t * m_.hidden);
      }
      took(kInput);
      product(o.in, mine, normed, projected_ + mine.first * row_, row_);
      if (o.dt.present()) {
        const Range heads = mine.rows(m_.heads);
        time_rows(o.dt, normed, mine.tokens, heads.first, heads.last, projected_ + mine.first * row_);
      }
    }
    wait(kInProj);
    const Range tokens = share(count);
    for (int64_t t = tokens.first; t < tokens.last; ++t) {
      const float* taps[kTaps];
      for (int64_t k = 0; k < kTaps; ++k) taps[k] = input(t + k - kTaps + 1);
      mix(m, s, t, taps);
    }
    for (int64_t t = tokens.first; t < tokens.last; ++t) mix_times(m, s, t, projected_ + t * row_ + inner_ + width_);
    wait(kMix);
    const Range columns = share(width_);
    for (int64_t k = 0; k < kTaps; ++k) {
      // ascending: what is read has not been replaced yet
      const float* last = input(count + k - kTaps);
      std::memmove(old_ + k * width_ + columns.first, last + columns.first, size_t(columns.last - columns.first) * 4);
    }
    const Range pieces = share(inner_ / lanes_);
    for (int64_t i = pieces.first; i < pieces.last; ++i) {
      float* piece = tiles_ + i * lanes_ * m_.states;
      const int64_t head = i * lanes_ / m_.channels, first = i * lanes_ % m_.channels;
      walk(lanes_, m, s, head, first, piece);
    }
    wait(kState);
    for (int64_t t = tokens.first; t < tokens.last; ++t) {
      float* y = s.y + t * inner_;
      gated_norm(y, projected_ + t * row_, m.gain, y, inner_, m_.groups, m.epsilon);
    }
    wait(kGate);
    if (mine.tokens > 0) {
      const int64_t stride = e_.hidden_row();
      const Range rows = product(o.out, mine, s.y + mine.first * inner_, delta_ + mine.first * stride, stride);
      for (int64_t t = mine.first; t < mine.first + mine.tokens; ++t) {
        for (int64_t r = rows.first; r < rows.last; ++r) hidden_[(from + t) * m_.hidden + r] += delta_[t * stride + r];
      }
    }
    wait(kOutProj);
  }

  // Inputs of the convolution of token `t` of the segment; before it what the last one left.
  const float* input(int64_t t) const { return t < 0 ? old_ + (t + kTaps) * width_ : projected_ + t * row_ + inner_; }

  // The last state, from pieces of `lanes` channels side by side to rows.
  void store(const MixerLayer& l, int index) {
    const int64_t channels = m_.channels, states = m_.states;
    const Pack pack = m_.bits == 0 ? nullptr : head_pack(e_.mode(l), m_.bits, states);
    float* tile = own_.tile.get(channels * states);
    alignas(64) float natural[kMaxStates];
    const Range mine = share(m_.heads);
    for (int64_t head = mine.first; head < mine.last; ++head) {
      const int64_t at = (int64_t(index) * held_.slots + p_.slot) * m_.heads + head;
      for (int64_t r = 0; r < channels; ++r) {
        const int64_t i = head * channels + r;
        const float* piece = tiles_ + i / lanes_ * lanes_ * states + i % lanes_;
        float* to = pack == nullptr ? held_.floats + (at * channels + r) * states : natural;
        for (int64_t n = 0; n < states; ++n) to[n] = piece[n * lanes_];
        if (pack != nullptr) split_pairs(natural, tile + r * states, int(states));
      }
      if (pack == nullptr) continue;
      pack(tile, held_.codes + at * channels * states * m_.bits / 8,
           held_.channel == nullptr ? nullptr : held_.channel + at * channels, held_.scale + at * states,
           l.fixed == nullptr ? nullptr : l.fixed + head * channels, int(channels));
    }
  }

  // Of the last token; rounded by every thread for itself.
  void head() {
    float* normed = own_.normed.get(m_.hidden);
    norm(hidden_ + (p_.count - 1) * m_.hidden, m_.final_norm, normed);
    const Activations a = e_.place(e_.head, 1, own_.activations.get(int64_t(e_.head.bytes(1))));
    e_.quantize(e_.head, normed, a, 0);
    const Range rows = share(e_.head.blocks());
    e_.multiply(e_.head, a, normed, 1, rows.first, rows.last, own_.row.get(m_.hidden), p_.logits, e_.head_row());
    took(kHead);
  }

  const MixerStates& held_;
  const MixerPrompt& p_;
  const int64_t inner_, width_, row_, lanes_;
  float *hidden_, *projected_, *delta_, *weight_, *old_;
  float* tiles_ = nullptr;
};

}  // namespace

void prepare_prompt(Engine& e, const MixerPrompt& p) {
  const int64_t most = segment_tokens(p.count);
  const bool whole = p.first != 0 && p.last != 0;
  // threads find these large enough
  e.hidden.get(p.count * e.m.hidden), e.projected.get(most * e.row()), e.delta.get(most * e.hidden_row());
  e.mixed_weight.get(kTaps * e.width()), e.old.get(kTaps * e.width());
  e.mixed.get(most * e.inner()), e.bc.get(most * 2 * e.both()), e.y.get(most * e.inner());
  e.steps.get(most * e.m.heads), e.decay.get(most * e.m.heads);
  e.tiles.get((whole ? 1 : e.m.layer_count) * e.state_size());
}

void run_prompt(Engine& engine, const MixerStates& states, const MixerPrompt& prompt, Barrier& barrier, int thread) {
  PromptWorker(engine, states, prompt, barrier, thread).run();
}

}  // namespace state

#pragma GCC pop_options
