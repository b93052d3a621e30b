// A prompt, or a part of one, through a whole model: all but what stands between the projections of a mixer.
//
// Threads work in teams, of one thread each where there are tokens enough. A team takes a segment of the prompt through all
// layers, then the next that is its own; segments go round. What a layer passes from one segment to the next, its state
// and the last inputs of its convolution, lies in memory that all share, and changes hands unit by unit: `left` counts the
// segments that are done with a unit, and a team waits until all before its own are. So teams run as far behind each
// other as one unit takes, nothing else of one core's is read by another, and no barrier makes them wait.
//
// Within a team the members share tokens where rows are rounded and units or rows where they are multiplied.
#pragma once

#include "engine.h"
#include "prompt.h"

namespace state {
namespace {

constexpr int64_t kTaps = 4, kBefore = kTaps - 1;
constexpr int64_t kNarrow = 2 * LANES;  // rows of a product that are multiplied together

int64_t segment_tokens(int64_t count) { return std::min(count, kSegment); }
int64_t stretches(int64_t count) { return (count + kStretch - 1) / kStretch; }
// As many as have a stretch of tokens each; all are equally large.
int64_t team_count(int64_t threads, int64_t count) {
  int64_t teams = std::min(threads, stretches(count));
  while (threads % teams != 0) --teams;
  return teams;
}
// Channels of a unit: of a piece of the scan, or of two where one alone is a single block of rows.
int64_t unit_channels(const Engine& e) {
  if (e.per_channel()) return e.inner() % 64 == 0 ? 64 : e.inner() % kNarrow == 0 ? kNarrow : LANES;
  return e.lanes < kNarrow && e.inner() / e.m.groups % kNarrow == 0 ? kNarrow : e.lanes;
}

// Of a layer: how far segments are.
int64_t counters(const Engine& e) {
  const int64_t units = e.inner() / unit_channels(e);
  return e.per_channel() ? 2 * units : units + 1;
}

// Convolution and silu of sixteen channels from `channel` on, tokens [first, last) with the newest first, so that results may
// take the place of inputs. input(t) is one token's, from first - 3 on; put(t, value) takes the result.
template <class Input, class Put>
STATE_INLINE void convolve(const Mixer& m, int64_t channel, int64_t first, int64_t last, Input input, Put put) {
  __m512 weight[kTaps];
  for (int64_t k = 0; k < kTaps; ++k) weight[k] = _mm512_loadu_ps(m.weight + k * m.width() + channel);
  const __m512 bias = m.bias == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(m.bias + channel);
  int64_t t = last;
  for (; t - 4 >= first; t -= 4) {
    __m512 in[4 + kBefore], value[4];
    for (int64_t i = 0; i < 4 + kBefore; ++i) in[i] = input(t - 4 - kBefore + i);
    for (int64_t i = 0; i < 4; ++i) {
      value[i] = bias;
      for (int64_t k = 0; k < kTaps; ++k) value[i] = _mm512_fmadd_ps(weight[k], in[i + k], value[i]);
    }
    silu_all<4>(value);
    for (int64_t i = 0; i < 4; ++i) put(t - 4 + i, value[i]);
  }
  while (--t >= first) {
    __m512 value = bias;
    for (int64_t k = 0; k < kTaps; ++k) value = _mm512_fmadd_ps(weight[k], input(t - kBefore + k), value);
    put(t, silu16(value));
  }
}

// y silu(gate); `count` is a multiple of sixteen.
void open_gate(const float* y, const float* gate, int64_t count, float* to) {
  const auto some = [&]<int Count>(int64_t i) __attribute__((always_inline)) {
    __m512 open[Count];
    for (int k = 0; k < Count; ++k) open[k] = _mm512_loadu_ps(gate + i + 16 * k);
    silu_all<Count>(open);
    for (int k = 0; k < Count; ++k) {
      _mm512_storeu_ps(to + i + 16 * k, _mm512_mul_ps(_mm512_loadu_ps(y + i + 16 * k), open[k]));
    }
  };
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) some.template operator()<4>(i);
  for (; i < count; i += 16) some.template operator()<1>(i);
}

class SegmentWorker : public Worker {
 public:
  // The runtime may have given fewer threads than asked for.
  SegmentWorker(Engine& engine, const MixerStates& states, const MixerPrompt& prompt, Barrier& all, int thread)
      : SegmentWorker(engine, states, prompt, all, thread, team_count(all.threads(), prompt.count)) {}

  virtual ~SegmentWorker() = default;

  void run() {
    each_segment([&](int64_t at, int64_t from, int64_t to) { segment(at, from, to); });
    finish(0, m_.layer_count);
    if (p_.last != 0) head();
  }

  // One layer, whose hidden states [T, D] and what it adds to them lie elsewhere.
  void run_layer(int i, const float* hidden, float* delta) {
    each_segment([&](int64_t at, int64_t from, int64_t to) {
      hidden_ = hidden + from * m_.hidden, out_ = delta + from * m_.hidden;
      layer(i, at, to - from);
    });
    finish(i, i + 1);
  }

 protected:
  static_assert(kSegment == 2 * kStretch);

  // What the `at`-th segment's hidden states become by a layer.
  virtual void layer(int index, int64_t at, int64_t count) = 0;
  // The last state of a head, from pieces of `lanes` channels side by side to what is kept.
  virtual void store(int layer, int64_t head) = 0;

  // work(at, from, to) for those segments that are this team's; returns when all teams are done.
  template <class Work>
  void each_segment(Work work) {
    if (thread_ == 0) team_.barrier.expect(int(members_));
    all_.wait();
    const int64_t blocks = stretches(p_.count), rounds = (blocks + 2 * teams_ - 1) / (2 * teams_);
    for (int64_t round = 0; round < rounds; ++round) {
      const int64_t at = round * teams_ + member_of_;
      const Range mine = part_of(blocks, at, rounds * teams_);  // one or two
      work(at, mine.first * kStretch, std::min(p_.count, mine.last * kStretch));
    }
    all_.wait();
    took(kWait);
  }

  // Counters of a layer: its units; then of Mamba-2 the inputs of B's and C's convolution, which every thread of a team leaves
  // for itself, of Mamba-1 the units' inputs of theirs.
  std::atomic<int>& left(int layer, int64_t unit) const { return e_.left[size_t(layer * counters(e_) + unit)]; }
  void await(const std::atomic<int>& left, int64_t count, MixerPhase before) {
    took(before);
    for (int spins = 0; left.load(std::memory_order_acquire) < count; ++spins) {
      if (spins < 4000) _mm_pause();
      else sched_yield();
    }
    took(kWait);
  }
  // The last inputs of the convolution [4][C].
  float* old(int layer) const { return e_.old.get(m_.layer_count * kTaps * width_) + layer * kTaps * width_; }
  float* tiles(int layer) const { return e_.tiles.get(m_.layer_count * e_.state_size()) + layer * e_.state_size(); }

  // Tokens [from, to), the `at`-th segment, through all layers.
  void segment(int64_t at, int64_t from, int64_t to) {
    const Range mine = share(to - from);
    float* const hidden = team_.hidden.get(segment_tokens(p_.count) * m_.hidden);
    hidden_ = out_ = hidden;
    for (int64_t t = mine.first; t < mine.last; ++t) embed(p_.tokens[from + t], hidden + t * m_.hidden);
    wait(kInput);
    for (int i = 0; i < m_.layer_count; ++i) layer(i, at, to - from);
  }

  // Inputs of a product: rounded, and the rows themselves where it is dense.
  struct Inputs {
    Activations a;
    const float* rows;
  };

  // Rows of `columns` floats of this thread's tokens, which write(first, tokens, rows) provides eight at a time, as inputs of `o`,
  // in memory of the team's.
  template <class Write>
  Inputs round(const Operand& o, int64_t count, Lines<char>& rounded, Lines<float>& dense, Write write) {
    const int64_t columns = o.m.columns, most = e_.kernels.token_block;
    const Activations a = e_.place(o, count, rounded.get(0));
    const Range blocks = share((count + most - 1) / most);
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
      const int64_t first = block * most, tokens = std::min(most, count - first);
      float* rows = o.packed() ? own_.normed.get(most * columns) : dense.get(0) + first * columns;
      write(first, tokens, rows);
      // by the token's number in the segment
      e_.quantize(o, rows - first * columns, a, block);
    }
    return {a, dense.get(0)};
  }

  // Rows [first, last) of a product, multiples of sixteen but for the last: to[t * stride + row - first].
  void product(const Operand& o, const Inputs& in, int64_t first, int64_t last, int64_t tokens, float* to, int64_t stride) {
    e_.multiply(o, in.a, in.rows, tokens, first / LANES, (last + LANES - 1) / LANES, own_.row.get(o.m.columns), to - first, stride);
  }

  // Input of the convolution of token `t` of a segment; before it what the last one left.
  __m512 input(const float* raw, int64_t stride, int layer, int64_t channel, int64_t t) const {
    return _mm512_loadu_ps(t >= 0 ? raw + t * stride : old(layer) + (t + kTaps) * width_ + channel);
  }

  // Some channels' last inputs, for the next segment; `last` are those of this one's last tokens, up to four.
  void leave_inputs(int layer, int64_t channel, int64_t columns, int64_t tokens, const float* last, int64_t stride) const {
    for (int64_t k = 0; k < kTaps; ++k) {
      // ascending: what is read has not been replaced yet
      const int64_t t = k - kTaps + std::min(tokens, kTaps);
      const float* from = t >= 0 ? last + t * stride : old(layer) + (t + kTaps) * width_ + channel;
      std::memmove(old(layer) + k * width_ + channel, from, size_t(columns) * 4);
    }
  }

  // Convolution and silu of a unit's inputs x [T][unit], in place; `counter` tells that all segments before have left theirs.
  // `last` [4][unit] is scratch.
  void convolve_unit(const Mixer& m, const std::atomic<int>& counter, int layer, int64_t at, int64_t first, int64_t tokens, float* x,
                     float* last) {
    const int64_t kept = std::min(tokens, kTaps);
    std::memcpy(last, x + (tokens - kept) * unit_, size_t(kept * unit_) * 4);
    const auto mix = [&](int64_t from, int64_t to) {
      for (int64_t c = 0; c < unit_; c += LANES) {
        float* const lane = x + c;
        convolve(
            m, first + c, from, to,
            [&](int64_t t) __attribute__((always_inline)) { return input(lane, unit_, layer, first + c, t); },
            [&](int64_t t, __m512 value) __attribute__((always_inline)) { _mm512_storeu_ps(lane + t * unit_, value); });
      }
    };
    mix(kBefore, tokens);
    await(counter, at, kMix);
    mix(0, std::min(kBefore, tokens));
    leave_inputs(layer, first, unit_, tokens, last, unit_);
    took(kMix);
  }

  void add_outputs(const Operand& o, const Inputs& in, int64_t count) {
    const int64_t rows = m_.hidden;
    const Range parts = share((rows + kNarrow - 1) / kNarrow);
    float* const delta = own_.tile.get(count * kNarrow);
    for (int64_t first = parts.first * kNarrow; first < std::min(rows, parts.last * kNarrow); first += kNarrow) {
      const int64_t last = std::min(rows, first + kNarrow);
      product(o, in, first, last, count, delta, kNarrow);
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t r = first; r < last; r += 16) {
          const __m512 more = _mm512_loadu_ps(delta + t * kNarrow + r - first);
          const __m512 before = out_ == hidden_ ? _mm512_loadu_ps(hidden_ + t * rows + r) : _mm512_setzero_ps();
          _mm512_storeu_ps(out_ + t * rows + r, _mm512_add_ps(before, more));
        }
      }
    }
  }

  // What all threads do when every segment is through layers [first, last).
  void finish(int first, int last) {
    const Range layers = part_of(last - first, everyone_, all_.threads());
    for (int64_t i = first + layers.first; i < first + layers.last; ++i) {
      float* conv = held_.conv + (i * held_.slots + p_.slot) * width_ * kTaps;
      for (int64_t at = 0; at < width_ * kTaps; ++at) conv[at] = old(int(i))[at % kTaps * width_ + at / kTaps];
    }
    if (p_.last == 0) return;
    if (everyone_ == 0 && held_.count != nullptr) held_.count[p_.slot] = 0;
    const Range tasks = part_of((last - first) * m_.heads, everyone_, all_.threads());
    for (int64_t task = tasks.first; task < tasks.last; ++task) store(first + int(task / m_.heads), task % m_.heads);
    took(kState);
  }

  // Of the last token; rounded by every thread for itself.
  void head() {
    float* normed = own_.normed.get(m_.hidden);
    norm(last_hidden(), m_.final_norm, normed);
    const Activations a = e_.place(e_.head, 1, own_.activations.get(int64_t(e_.head.bytes(1))));
    e_.quantize(e_.head, normed, a, 0);
    const Range rows = part_of(e_.head.blocks(), everyone_, all_.threads());
    e_.multiply(e_.head, a, normed, 1, rows.first, rows.last, own_.row.get(m_.hidden), p_.logits, e_.head_row());
    took(kHead);
  }
  // It is the last team's.
  const float* last_hidden() const {
    const int64_t blocks = stretches(p_.count), segments = (blocks + 2 * teams_ - 1) / (2 * teams_) * teams_;
    const int64_t first = part_of(blocks, segments - 1, segments).first * kStretch;
    return e_.teams[size_t(teams_ - 1)].hidden.get(0) + (p_.count - 1 - first) * m_.hidden;
  }

  const MixerStates& held_;
  const MixerPrompt& p_;
  Barrier& all_;
  const int64_t everyone_, teams_, members_, member_of_;
  Team& team_;
  const int64_t inner_, width_, both_, lanes_, unit_, units_;
  const float* hidden_ = nullptr;  // rows [T, D] of the segment
  float* out_ = nullptr;           // the same, to which layers add, or others, where a layer puts what it would add

 private:
  SegmentWorker(Engine& engine, const MixerStates& states, const MixerPrompt& prompt, Barrier& all, int thread, int64_t teams)
      : SegmentWorker(engine, states, prompt, all, thread, teams, all.threads() / teams) {}
  SegmentWorker(Engine& engine, const MixerStates& states, const MixerPrompt& prompt, Barrier& all, int thread, int64_t teams,
                int64_t members)
      : Worker(engine, engine.threads[size_t(thread)], engine.teams[size_t(thread / members)].barrier, int(thread % members),
               thread == 0 ? prompt.seconds : nullptr),
        held_(states), p_(prompt), all_(all), everyone_(thread), teams_(teams), members_(members), member_of_(thread / members),
        team_(engine.teams[size_t(member_of_)]), inner_(engine.inner()), width_(engine.width()), both_(engine.both()),
        lanes_(engine.lanes), unit_(unit_channels(engine)), units_(inner_ / unit_) {}
};

}  // namespace
}  // namespace state
