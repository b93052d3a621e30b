// A prompt, or a part of one, through a whole Mamba-2 model, with the functions of prompt.h.
//
// Threads work in teams, of one thread each where there are tokens enough. A team takes a segment of the prompt through all
// layers, then the next that is its own; segments go round. What a layer passes from one segment to the next, its state
// and the last inputs of its convolution, lies in memory that all share, and changes hands unit by unit: `left` counts the
// segments that are done with a unit, and a team waits until all before its own are. So teams run as far behind each
// other as one unit takes, nothing else of one core's is read by another, and no barrier makes them wait.
//
// A layer goes unit by unit as well, 64 channels of one head where heads have them: its rows of the projection, convolution,
// scan, the rows of its gate, and the gate, 32 KB that stay near while a unit lasts. Of all that a projection yields only
// what is scanned and gated remains. Written as a whole it would be 1.7 MB for 128 tokens of 3,352 rows, more than the
// second-level cache of a Zen 4; there a prompt of 168 M parameters took a tenth more time.
//
// Within a team the members share tokens where rows are rounded and units or rows where they are multiplied.
#include "engine.h"
#include "prompt.h"

#pragma GCC push_options
STATE_TARGET

namespace state {
namespace {

constexpr int64_t kTaps = 4, kBefore = kTaps - 1;
constexpr int64_t kEight = 8;        // tokens that are rounded together
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
  return e.lanes < kNarrow && e.inner() / e.m.groups % kNarrow == 0 ? kNarrow : e.lanes;
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

class PromptWorker : public Worker {
 public:
  PromptWorker(Engine& engine, const MixerStates& states, const MixerPrompt& prompt, Barrier& all, int thread, int64_t teams)
      : PromptWorker(engine, states, prompt, all, thread, teams, all.threads() / teams) {}

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

 private:
  static_assert(kSegment == 2 * kStretch);

  PromptWorker(Engine& engine, const MixerStates& states, const MixerPrompt& prompt, Barrier& all, int thread, int64_t teams,
               int64_t members)
      : Worker(engine, engine.threads[size_t(thread)], engine.teams[size_t(thread / members)].barrier, int(thread % members),
               thread == 0 ? prompt.seconds : nullptr),
        held_(states), p_(prompt), all_(all), everyone_(thread), teams_(teams), members_(members), member_of_(thread / members),
        team_(engine.teams[size_t(member_of_)]), inner_(engine.inner()), width_(engine.width()), both_(engine.both()),
        lanes_(engine.lanes), unit_(unit_channels(engine)), units_(inner_ / unit_) {}

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

  // Counters of a layer: its units, and the inputs of B's and C's convolution, which every thread of a team leaves for itself.
  std::atomic<int>& left(int layer, int64_t unit) const { return e_.left[size_t(layer * (units_ + 1) + unit)]; }
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

  void layer(int index, int64_t at, int64_t count) {
    const LayerOperands& o = e_.layers[size_t(index)];
    const MixerLayer& l = o.l;
    const Mixer m{o.taps.data(), l.conv_bias, l.dt_bias, l.a, l.d, l.gain, m_.heads, m_.groups, m_.channels, m_.states,
                  m_.low, m_.high, m_.gate_epsilon};
    const Segment s{team_.bc.get(count * 2 * both_), team_.steps.get(count * m_.heads), team_.decay.get(count * m_.heads), count};
    const Activations in = round_inputs(o, m, s);
    wait(kInput);
    states_of_tokens(o, m, s, in, index, at);
    wait(kMix);
    const Range units = share(units_);
    for (int64_t i = units.first; i < units.last; ++i) unit(o, m, s, in, index, at, i);
    wait(kGate);
    const Activations out = round_gated(o, m, count);
    wait(kGate);
    add_outputs(o.out, out, count);
    wait(kOutProj);
  }

  // Rows of `columns` floats of this thread's tokens, which write(first, tokens, rows) provides eight at a time, as inputs of `o`.
  template <class Write>
  Activations round(const Operand& o, int64_t count, Write write) {
    const int64_t columns = o.m.columns, most = e_.kernels.token_block;
    const Activations a = e_.place(o, count, team_.activations.get(0));
    const Range blocks = share((count + most - 1) / most);
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
      const int64_t first = block * most, tokens = std::min(most, count - first);
      float* rows = o.packed() ? own_.normed.get(most * columns) : team_.normed.get(0) + first * columns;
      write(first, tokens, rows);
      // by the token's number in the segment
      e_.quantize(o, rows - first * columns, a, block);
    }
    return a;
  }

  Activations round_inputs(const LayerOperands& o, const Mixer& m, const Segment& s) {
    return round(o.in, s.tokens, [&](int64_t first, int64_t tokens, float* rows) {
      for (int64_t t = 0; t < tokens; ++t) norm(hidden_ + (first + t) * m_.hidden, o.l.norm, rows + t * m_.hidden);
      if (!o.dt.present()) return;
      float* raw = own_.row.get(tokens * m_.heads);
      time_rows(o.dt, rows, tokens, 0, m_.heads, raw, m_.heads);
      for (int64_t t = 0; t < tokens; ++t) mix_times(m, s, first + t, raw + t * m_.heads);
    });
  }

  // Rows [first, last) of a product, multiples of sixteen but for the last: to[t * stride + row - first].
  void product(const Operand& o, const Activations& a, int64_t first, int64_t last, int64_t tokens, float* to, int64_t stride) {
    e_.multiply(o, a, team_.normed.get(0), tokens, first / LANES, (last + LANES - 1) / LANES, own_.row.get(o.m.columns), to - first,
                stride);
  }

  // What heads have in common: B and C, and time steps where they are not rows of their own.
  void states_of_tokens(const LayerOperands& o, const Mixer& m, const Segment& s, const Activations& in, int layer, int64_t at) {
    const Range parts = share(2 * both_ / kNarrow);
    const int64_t columns = (parts.last - parts.first) * kNarrow, first = parts.first * kNarrow;
    float* raw = own_.tile.get(s.tokens * columns);
    product(o.in, in, inner_ + inner_ + first, inner_ + inner_ + first + columns, s.tokens, raw, columns);
    took(kInProj);
    const auto mix = [&](int64_t from, int64_t to) {
      for (int64_t c = 0; c < columns; c += LANES) put_states(m, s, layer, first + c, raw + c, columns, from, to);
    };
    mix(kBefore, s.tokens);
    // the others of this team may have left theirs already
    await(left(layer, units_), at * members_, kMix);
    mix(0, std::min(kBefore, s.tokens));
    leave_inputs(layer, inner_ + first, columns, s.tokens, raw + std::max<int64_t>(0, s.tokens - kTaps) * columns, columns);
    left(layer, units_).fetch_add(1, std::memory_order_release);
    if (o.dt.present() || thread_ != members_ - 1) return;
    const int64_t rows = inner_ + width_, stride = (m_.heads + LANES - 1) / LANES * LANES;
    float* times = own_.tile.get(s.tokens * stride);
    product(o.in, in, rows, rows + m_.heads, s.tokens, times, stride);
    for (int64_t t = 0; t < s.tokens; ++t) mix_times(m, s, t, times + t * stride);
  }

  // Input of the convolution of token `t` of a segment; before it what the last one left.
  __m512 input(const float* raw, int64_t stride, int layer, int64_t channel, int64_t t) const {
    return _mm512_loadu_ps(t >= 0 ? raw + t * stride : old(layer) + (t + kTaps) * width_ + channel);
  }

  // Sixteen of the channels of B and C, as the scan wants them: eight states of B, then of C to a line.
  void put_states(const Mixer& m, const Segment& s, int layer, int64_t at, const float* raw, int64_t stride, int64_t from,
                  int64_t to) const {
    const int64_t second = at >= both_ ? 1 : 0, state = at - second * both_;
    float* const lines = s.bc + state / kBlock * s.tokens * 16 + second * kBlock;
    convolve(
        m, inner_ + at, from, to,
        [&](int64_t t) __attribute__((always_inline)) { return input(raw, stride, layer, inner_ + at, t); },
        [&](int64_t t, __m512 value) __attribute__((always_inline)) {
          _mm256_storeu_ps(lines + t * 16, _mm512_castps512_ps256(value));
          _mm256_storeu_ps(lines + (s.tokens + t) * 16, _mm512_extractf32x8_ps(value, 1));
        });
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

  // One unit from projection to gate; mixed [units][T][unit] is what it leaves.
  void unit(const LayerOperands& o, const Mixer& m, const Segment& s, const Activations& in, int layer, int64_t at, int64_t i) {
    const int64_t first = i * unit_, size = s.tokens * unit_;
    // memory that stays in the second-level cache: what is written to any other has to be fetched first
    float* const x = own_.tile.get(2 * size + kTaps * unit_);
    float *const gate = x + size, *const last = gate + size;
    product(o.in, in, inner_ + first, inner_ + first + unit_, s.tokens, x, unit_);
    took(kInProj);
    const int64_t kept = std::min(s.tokens, kTaps);
    std::memcpy(last, x + size - kept * unit_, size_t(kept * unit_) * 4);
    const auto mix = [&](int64_t from, int64_t to) {
      for (int64_t c = 0; c < unit_; c += LANES) {
        float* const lane = x + c;
        convolve(
            m, first + c, from, to,
            [&](int64_t t) __attribute__((always_inline)) { return input(lane, unit_, layer, first + c, t); },
            [&](int64_t t, __m512 value) __attribute__((always_inline)) { _mm512_storeu_ps(lane + t * unit_, value); });
      }
    };
    mix(kBefore, s.tokens);
    await(left(layer, i), at, kMix);
    mix(0, std::min(kBefore, s.tokens));
    leave_inputs(layer, first, unit_, s.tokens, last, unit_);
    took(kMix);
    for (int64_t c = 0; c < unit_; c += lanes_) {
      float* piece = tiles(layer) + (first + c) * m_.states;
      if (at == 0 && p_.first != 0) std::fill(piece, piece + lanes_ * m_.states, 0.0f);
      walk(lanes_, m, s, (first + c) / m_.channels, x + c, x + c, unit_, piece);
    }
    left(layer, i).store(int(at) + 1, std::memory_order_release);
    took(kState);
    product(o.in, in, first, first + unit_, s.tokens, gate, unit_);
    took(kInProj);
    open_gate(x, gate, size, team_.mixed.get(0) + i * size);
    took(kGate);
  }

  // The gated norm as gated_norm() takes it, of tokens whose channels lie in units: inputs of the last projection.
  Activations round_gated(const LayerOperands& o, const Mixer& m, int64_t count) {
    const float* const mixed = team_.mixed.get(0);
    return round(o.out, count, [&](int64_t first, int64_t tokens, float* rows) {
      int64_t t = 0;
      for (; t + kEight <= tokens; t += kEight) norm_gated<kEight>(m, mixed, count, first + t, rows + t * inner_);
      for (; t < tokens; ++t) norm_gated<1>(m, mixed, count, first + t, rows + t * inner_);
    });
  }

  template <int64_t Tokens>
  void norm_gated(const Mixer& m, const float* mixed, int64_t count, int64_t first, float* rows) const {
    const int64_t part = inner_ / m_.groups;
    const auto value = [&](int64_t i, int64_t t) __attribute__((always_inline)) {
      return _mm512_loadu_ps(mixed + (i / unit_ * count + first + t) * unit_ + i % unit_);
    };
    for (int64_t from = 0; from < inner_; from += part) {
      __m512 energy[Tokens];
      for (int64_t t = 0; t < Tokens; ++t) energy[t] = _mm512_setzero_ps();
      for (int64_t i = from; i < from + part; i += 16) {
        for (int64_t t = 0; t < Tokens; ++t) energy[t] = _mm512_fmadd_ps(value(i, t), value(i, t), energy[t]);
      }
      __m512 by[Tokens];
      for (int64_t t = 0; t < Tokens; ++t) {
        by[t] = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(energy[t]) / static_cast<float>(part) + m.epsilon));
      }
      for (int64_t i = from; i < from + part; i += 16) {
        const __m512 gain = _mm512_loadu_ps(m.gain + i);
        for (int64_t t = 0; t < Tokens; ++t) {
          _mm512_storeu_ps(rows + t * inner_ + i, _mm512_mul_ps(_mm512_mul_ps(value(i, t), by[t]), gain));
        }
      }
    }
  }

  void add_outputs(const Operand& o, const Activations& a, int64_t count) {
    const int64_t rows = m_.hidden;
    const Range parts = share((rows + kNarrow - 1) / kNarrow);
    float* const delta = own_.tile.get(count * kNarrow);
    for (int64_t first = parts.first * kNarrow; first < std::min(rows, parts.last * kNarrow); first += kNarrow) {
      const int64_t last = std::min(rows, first + kNarrow);
      product(o, a, first, last, count, delta, kNarrow);
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

  // The last state of a head, from pieces of `lanes` channels side by side to rows.
  void store(int layer, int64_t head) {
    const MixerLayer& l = e_.layers[size_t(layer)].l;
    const int64_t channels = m_.channels, states = m_.states, at = (int64_t(layer) * held_.slots + p_.slot) * m_.heads + head;
    const Pack pack = m_.bits == 0 ? nullptr : head_pack(e_.mode(l), m_.bits, states);
    float* tile = own_.tile.get(channels * states);
    alignas(64) float natural[kMaxStates];
    for (int64_t r = 0; r < channels; ++r) {
      const int64_t i = head * channels + r;
      const float* piece = tiles(layer) + i / lanes_ * lanes_ * states + i % lanes_;
      float* to = pack == nullptr ? held_.floats + (at * channels + r) * states : natural;
      for (int64_t n = 0; n < states; ++n) to[n] = piece[n * lanes_];
      if (pack != nullptr) split_pairs(natural, tile + r * states, int(states));
    }
    if (pack == nullptr) return;
    pack(tile, held_.codes + at * channels * states * m_.bits / 8,
         held_.channel == nullptr ? nullptr : held_.channel + at * channels, held_.scale + at * states,
         l.fixed == nullptr ? nullptr : l.fixed + head * channels, int(channels));
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
};

}  // namespace

void prepare_prompt(Engine& e, int64_t tokens, bool first, int64_t threads) {
  const int64_t most = segment_tokens(tokens), teams = team_count(threads, tokens);
  // pieces of the state lie in this order until the last part
  if (first) e.lanes = walked_lanes(e.m.channels, e.m.heads, threads / teams);
  e.left = std::vector<std::atomic<int>>(size_t(e.m.layer_count * (e.inner() / unit_channels(e) + 1)));
  // threads find these large enough
  const int64_t bound = std::min(threads, stretches(tokens));
  while (int64_t(e.teams.size()) < bound) e.teams.emplace_back();
  for (int64_t i = 0; i < bound; ++i) {
    Team& t = e.teams[size_t(i)];
    t.hidden.get(most * e.m.hidden), t.mixed.get(most * e.inner()), t.bc.get(most * 2 * e.both());
    t.steps.get(most * e.m.heads), t.decay.get(most * e.m.heads);
    t.normed.get(most * e.dense_columns()), t.activations.get(int64_t(e.activation_bytes(most)));
  }
  e.tiles.get(e.m.layer_count * e.state_size());
  const int64_t inputs = e.m.layer_count * kTaps * e.width();
  float* old = e.old.get(inputs);
  if (first) std::fill(old, old + inputs, 0.0f);
}

void run_prompt(Engine& engine, const MixerStates& states, const MixerPrompt& prompt, Barrier& barrier, int thread) {
  // the runtime may have given fewer threads than asked for
  PromptWorker(engine, states, prompt, barrier, thread, team_count(barrier.threads(), prompt.count)).run();
}

void run_layer(Engine& engine, const MixerStates& states, int layer, const Mixers::Prompt& all, Barrier& barrier, int thread) {
  const MixerPrompt prompt{nullptr, nullptr, nullptr, all.count, all.slot, all.first, all.last, barrier.threads()};
  PromptWorker(engine, states, prompt, barrier, thread, team_count(barrier.threads(), all.count))
      .run_layer(layer, all.hidden, all.delta);
}

}  // namespace state

#pragma GCC pop_options
