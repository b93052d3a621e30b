// A prompt, or a part of one, through a whole Mamba-2 model, with the functions of prefill.cpp.
//
// Threads work in teams, of one thread each where there are tokens enough. A team takes a segment of the prompt through all
// layers, then the next that is its own; segments go round. What a layer passes from one segment to the next, its state
// and the last inputs of its convolution, lies in memory that all share, and changes hands piece by piece: `left` counts the
// segments that are done with a piece, and a team waits until all before its own are. So teams run as far behind each
// other as one piece of a scan takes, nothing else of one core's is read by another, and no barrier makes them wait.
// With all threads at one segment, two of them take an eighth more time: half of what either scans, gates and rounds was
// written by the other.
//
// Within a team products are cut by tokens, since int8 products of many tokens are bound by arithmetic and every thread then
// rounds and normalizes for itself; few tokens are cut by rows as well.
#include "engine.h"
#include "prompt.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,bmi2")

namespace state {
namespace {

constexpr int64_t kTaps = 4;

int64_t segment_tokens(int64_t count) { return std::min(count, kSegment); }
int64_t stretches(int64_t count) { return (count + kStretch - 1) / kStretch; }
// As many as have a stretch of tokens each; all are equally large.
int64_t team_count(int64_t threads, int64_t count) {
  int64_t teams = std::min(threads, stretches(count));
  while (threads % teams != 0) --teams;
  return teams;
}

class PromptWorker : public Worker {
 public:
  PromptWorker(Engine& engine, const MixerStates& states, const MixerPrompt& prompt, Barrier& all, int thread, int64_t teams)
      : PromptWorker(engine, states, prompt, all, thread, teams, all.threads() / teams) {}

  void run() {
    if (thread_ == 0) team_.barrier.expect(int(members_));
    all_.wait();
    const int64_t blocks = stretches(p_.count), rounds = (blocks + 2 * teams_ - 1) / (2 * teams_);
    for (int64_t round = 0; round < rounds; ++round) {
      const int64_t at = round * teams_ + member_of_;
      const Range mine = part_of(blocks, at, rounds * teams_);  // one or two
      segment(at, mine.first * kStretch, std::min(p_.count, mine.last * kStretch));
    }
    all_.wait();
    took(kWait);
    finish();
  }

 private:
  static_assert(kSegment == 2 * kStretch);

  PromptWorker(Engine& engine, const MixerStates& states, const MixerPrompt& prompt, Barrier& all, int thread, int64_t teams,
               int64_t members)
      : Worker(engine, engine.threads[size_t(thread)], engine.teams[size_t(thread / members)].barrier, int(thread % members),
               thread == 0 ? prompt.seconds : nullptr),
        held_(states), p_(prompt), all_(all), everyone_(thread), teams_(teams), members_(members), member_of_(thread / members),
        team_(engine.teams[size_t(member_of_)]), inner_(engine.inner()), width_(engine.width()), row_(engine.row()),
        lanes_(engine.lanes), pieces_(inner_ / lanes_), hidden_(team_.hidden.get(segment_tokens(p_.count) * m_.hidden)),
        projected_(team_.projected.get(segment_tokens(p_.count) * row_)),
        delta_(team_.delta.get(segment_tokens(p_.count) * engine.hidden_row())) {}

  // Which tokens of a segment and which part of a product's rows are this thread's.
  struct Part {
    int64_t first, tokens, piece, pieces;
    Range rows(int64_t blocks) const { return part_of(blocks, piece, pieces); }
  };
  Part part(int64_t count) const {
    const int64_t most = e_.kernels.token_block, blocks = (count + most - 1) / most;
    const int64_t parts = std::min(members_, blocks), pieces = members_ / parts, at = thread_ / pieces;
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

  // Counters of a layer: its pieces, and the inputs of the convolution, which every thread of a team leaves for itself.
  std::atomic<int>& left(int layer, int64_t piece) const { return e_.left[size_t(layer * (pieces_ + 1) + piece)]; }
  static void await(const std::atomic<int>& left, int64_t count) {
    for (int spins = 0; left.load(std::memory_order_acquire) != count; ++spins) {
      if (spins < 4000) _mm_pause();
      else sched_yield();
    }
  }
  float* old(int layer) const { return e_.old.get(m_.layer_count * kTaps * width_) + layer * kTaps * width_; }
  float* tiles(int layer) const { return e_.tiles.get(m_.layer_count * e_.state_size()) + layer * e_.state_size(); }

  // Tokens [from, to), the `at`-th segment, through all layers.
  void segment(int64_t at, int64_t from, int64_t to) {
    const Range mine = share(to - from);
    for (int64_t t = mine.first; t < mine.last; ++t) embed(p_.tokens[from + t], hidden_ + t * m_.hidden);
    wait(kInput);
    for (int i = 0; i < m_.layer_count; ++i) layer(i, at, to - from);
  }

  void layer(int index, int64_t at, int64_t count) {
    const LayerOperands& o = e_.layers[size_t(index)];
    const MixerLayer& l = o.l;
    const Mixer m{o.taps.data(), l.conv_bias, l.dt_bias, l.a, l.d, l.gain, m_.heads, m_.groups, m_.channels, m_.states,
                  m_.low, m_.high, m_.gate_epsilon};
    const Segment s{team_.mixed.get(count * inner_), team_.bc.get(count * 2 * e_.both()), team_.steps.get(count * m_.heads),
                    team_.decay.get(count * m_.heads), team_.y.get(count * inner_), count};
    const Part mine = part(count);
    project(o, mine);
    wait(kInProj);
    mix(m, s, index, at);
    wait(kMix);
    leave_inputs(index, count);
    scan(m, s, index, at);
    wait(kState);
    const Range tokens = share(count);
    for (int64_t t = tokens.first; t < tokens.last; ++t) {
      float* y = s.y + t * inner_;
      gated_norm(y, projected_ + t * row_, m.gain, y, inner_, m_.groups, m.epsilon);
    }
    wait(kGate);
    if (mine.tokens > 0) {
      const int64_t stride = e_.hidden_row();
      const Range rows = product(o.out, mine, s.y + mine.first * inner_, delta_ + mine.first * stride, stride);
      for (int64_t t = mine.first; t < mine.first + mine.tokens; ++t) {
        for (int64_t r = rows.first; r < rows.last; ++r) hidden_[t * m_.hidden + r] += delta_[t * stride + r];
      }
    }
    wait(kOutProj);
  }

  void project(const LayerOperands& o, const Part& mine) {
    if (mine.tokens == 0) return;
    float* normed = own_.normed.get(mine.tokens * m_.hidden);
    for (int64_t t = 0; t < mine.tokens; ++t) norm(hidden_ + (mine.first + t) * m_.hidden, o.l.norm, normed + t * m_.hidden);
    took(kInput);
    product(o.in, mine, normed, projected_ + mine.first * row_, row_);
    if (!o.dt.present()) return;
    const Range heads = mine.rows(m_.heads);
    time_rows(o.dt, normed, mine.tokens, heads.first, heads.last, projected_ + mine.first * row_);
  }

  // Inputs of the convolution of token `t` of a segment; before it what the last one left.
  const float* input(int layer, int64_t t) const {
    if (t >= 0) return projected_ + t * row_ + inner_;
    return old(layer) + (t + kTaps) * width_;
  }

  // The first tokens come last: theirs hang on the segment before.
  void mix(const Mixer& m, const Segment& s, int layer, int64_t at) {
    const Range tokens = share(s.tokens);
    const auto one = [&](int64_t t) {
      const float* taps[kTaps];
      for (int64_t k = 0; k < kTaps; ++k) taps[k] = input(layer, t + k - kTaps + 1);
      state::mix(m, s, t, taps);
    };
    for (int64_t t = std::max(tokens.first, kTaps - 1); t < tokens.last; ++t) one(t);
    for (int64_t t = tokens.first; t < tokens.last; ++t) mix_times(m, s, t, projected_ + t * row_ + inner_ + width_);
    took(kMix);
    // also where none of these tokens is this thread's: it replaces them next
    await(left(layer, pieces_), at * members_);
    took(kWait);
    for (int64_t t = tokens.first; t < std::min(tokens.last, kTaps - 1); ++t) one(t);
  }

  void leave_inputs(int layer, int64_t count) {
    const Range columns = share(width_);
    for (int64_t k = 0; k < kTaps; ++k) {
      // ascending: what is read has not been replaced yet
      const float* last = input(layer, count + k - kTaps);
      std::memmove(old(layer) + k * width_ + columns.first, last + columns.first, size_t(columns.last - columns.first) * 4);
    }
    left(layer, pieces_).fetch_add(1, std::memory_order_release);
  }

  void scan(const Mixer& m, const Segment& s, int layer, int64_t at) {
    const Range pieces = share(pieces_);
    for (int64_t i = pieces.first; i < pieces.last; ++i) {
      float* piece = tiles(layer) + i * lanes_ * m_.states;
      took(kState);
      await(left(layer, i), at);
      took(kWait);
      if (at == 0 && p_.first != 0) std::fill(piece, piece + lanes_ * m_.states, 0.0f);
      walk(lanes_, m, s, i * lanes_ / m_.channels, i * lanes_ % m_.channels, piece);
      left(layer, i).store(int(at) + 1, std::memory_order_release);
    }
  }

  // What all threads do when every segment is through.
  void finish() {
    const Range layers = part_of(m_.layer_count, everyone_, all_.threads());
    for (int64_t i = layers.first; i < layers.last; ++i) {
      float* conv = held_.conv + (i * held_.slots + p_.slot) * width_ * kTaps;
      for (int64_t at = 0; at < width_ * kTaps; ++at) conv[at] = old(int(i))[at % kTaps * width_ + at / kTaps];
    }
    if (p_.last == 0) return;
    if (everyone_ == 0 && held_.count != nullptr) held_.count[p_.slot] = 0;
    const Range tasks = part_of(m_.layer_count * m_.heads, everyone_, all_.threads());
    for (int64_t task = tasks.first; task < tasks.last; ++task) store(int(task / m_.heads), task % m_.heads);
    took(kState);
    head();
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
  const int64_t inner_, width_, row_, lanes_, pieces_;
  float *hidden_, *projected_, *delta_;
};

}  // namespace

void prepare_prompt(Engine& e, const MixerPrompt& p) {
  const int64_t most = segment_tokens(p.count), teams = team_count(p.threads, p.count);
  // pieces of the state lie in this order until the last part
  if (p.first != 0) e.lanes = walked_lanes(e.m.channels, e.m.heads, p.threads / teams);
  e.left = std::vector<std::atomic<int>>(size_t(e.m.layer_count * (e.inner() / e.lanes + 1)));
  // threads find these large enough
  const int64_t bound = std::min(int64_t(p.threads), stretches(p.count));
  while (int64_t(e.teams.size()) < bound) e.teams.emplace_back();
  for (int64_t i = 0; i < bound; ++i) {
    Team& t = e.teams[size_t(i)];
    t.hidden.get(most * e.m.hidden), t.projected.get(most * e.row()), t.delta.get(most * e.hidden_row());
    t.mixed.get(most * e.inner()), t.bc.get(most * 2 * e.both()), t.y.get(most * e.inner());
    t.steps.get(most * e.m.heads), t.decay.get(most * e.m.heads);
  }
  e.tiles.get(e.m.layer_count * e.state_size());
  const int64_t inputs = e.m.layer_count * kTaps * e.width();
  float* old = e.old.get(inputs);
  if (p.first != 0) std::fill(old, old + inputs, 0.0f);
}

void run_prompt(Engine& engine, const MixerStates& states, const MixerPrompt& prompt, Barrier& barrier, int thread) {
  // the runtime may have given fewer threads than asked for
  PromptWorker(engine, states, prompt, barrier, thread, team_count(barrier.threads(), prompt.count)).run();
}

}  // namespace state

#pragma GCC pop_options
