// A prompt, or a part of one, through a whole model, with the functions of prompt.h for Mamba-2.
//
// A layer goes unit by unit as well, 64 channels of one head where heads have them: its rows of the projection, convolution,
// scan, the rows of its gate, and the gate, 32 KB that stay near while a unit lasts. Of all that a projection yields only
// what is scanned and gated remains. Written as a whole it would be 1.7 MB for 128 tokens of 3,352 rows, more than the
// second-level cache of a Zen 4; there a prompt of 168 M parameters took a tenth more time.
#include "channel_prompt.h"
#include "prompt.h"
#include "segments.h"

namespace state {
namespace {

constexpr int64_t kEight = 8;  // tokens that are rounded together

class HeadPrompt : public SegmentWorker {
 public:
  using SegmentWorker::SegmentWorker;

 private:
  void layer(int index, int64_t at, int64_t count) override {
    const LayerOperands& o = e_.layers[size_t(index)];
    const MixerLayer& l = o.l;
    const Mixer m{o.taps.data(), l.conv_bias, l.dt_bias, l.a, l.d, l.gain, m_.heads, m_.groups, m_.channels, m_.states,
                  m_.low, m_.high, m_.gate_epsilon};
    const Segment s{team_.bc.get(count * 2 * both_), team_.steps.get(count * m_.heads), team_.decay.get(count * m_.heads), count};
    const Inputs in = round_inputs(o, m, s);
    wait(kInput);
    states_of_tokens(o, m, s, in, index, at);
    wait(kMix);
    const Range units = share(units_);
    for (int64_t i = units.first; i < units.last; ++i) unit(o, m, s, in, index, at, i);
    wait(kGate);
    const Inputs out = round_gated(o, m, count);
    wait(kGate);
    add_outputs(o.out, out, count);
    wait(kOutProj);
  }

  Inputs round_inputs(const LayerOperands& o, const Mixer& m, const Segment& s) {
    return round(o.in, s.tokens, team_.activations, team_.normed, [&](int64_t first, int64_t tokens, float* rows) {
      for (int64_t t = 0; t < tokens; ++t) norm(hidden_ + (first + t) * m_.hidden, o.l.norm, rows + t * m_.hidden);
      if (!o.dt.present()) return;
      float* raw = own_.row.get(tokens * m_.heads);
      time_rows(o.dt, rows, tokens, 0, m_.heads, raw, m_.heads);
      for (int64_t t = 0; t < tokens; ++t) mix_times(m, s, first + t, raw + t * m_.heads);
    });
  }

  // What heads have in common: B and C, and time steps where they are not rows of their own.
  void states_of_tokens(const LayerOperands& o, const Mixer& m, const Segment& s, const Inputs& in, int layer, int64_t at) {
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

  // One unit from projection to gate; mixed [units][T][unit] is what it leaves.
  void unit(const LayerOperands& o, const Mixer& m, const Segment& s, const Inputs& in, int layer, int64_t at, int64_t i) {
    const int64_t first = i * unit_, size = s.tokens * unit_;
    // memory that stays in the second-level cache: what is written to any other has to be fetched first
    float* const x = own_.tile.get(2 * size + kTaps * unit_);
    float *const gate = x + size, *const last = gate + size;
    product(o.in, in, inner_ + first, inner_ + first + unit_, s.tokens, x, unit_);
    took(kInProj);
    convolve_unit(m, left(layer, i), layer, at, first, s.tokens, x, last);
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
  Inputs round_gated(const LayerOperands& o, const Mixer& m, int64_t count) {
    const float* const mixed = team_.mixed.get(0);
    return round(o.out, count, team_.activations, team_.normed, [&](int64_t first, int64_t tokens, float* rows) {
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
      if (m.gain == nullptr) {
        for (int64_t i = from; i < from + part; i += 16) {
          for (int64_t t = 0; t < Tokens; ++t) _mm512_storeu_ps(rows + t * inner_ + i, value(i, t));
        }
        continue;
      }
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

  void store(int layer, int64_t head) override {
    const MixerLayer& l = e_.layers[size_t(layer)].l;
    const int64_t channels = m_.channels, states = m_.states, at = (int64_t(layer) * held_.slots + p_.slot) * m_.heads + head;
    const Pack pack = m_.bits == 0 ? nullptr : head_pack(e_.mode(l), m_.bits, states);
    float* const tile = own_.tile.get(channels * states);
    float* const to = pack == nullptr ? held_.floats + at * channels * states : tile;
    for (int64_t r = 0; r < channels; r += LANES) {
      const int64_t i = head * channels + r;
      const float* const piece = tiles(layer) + i / lanes_ * lanes_ * states + i % lanes_;
      turn_channels(piece, lanes_, states, pack != nullptr, to + r * states);
    }
    if (pack == nullptr) return;
    pack(tile, held_.codes + at * channels * states * m_.bits / 8,
         held_.channel == nullptr ? nullptr : held_.channel + at * channels, held_.scale + at * states,
         l.fixed == nullptr ? nullptr : l.fixed + head * channels, int(channels));
  }
};

}  // namespace

void prepare_prompt(Engine& e, int64_t tokens, bool first, int64_t threads) {
  const int64_t most = segment_tokens(tokens), teams = team_count(threads, tokens);
  // pieces of the state lie in this order until the last part
  if (first) e.lanes = e.per_channel() ? LANES : walked_lanes(e.m.channels, e.m.heads, threads / teams);
  e.left = std::vector<std::atomic<int>>(size_t(e.m.layer_count * counters(e)));
  // threads find these large enough
  const int64_t bound = std::min(threads, stretches(tokens));
  while (int64_t(e.teams.size()) < bound) e.teams.emplace_back();
  for (int64_t i = 0; i < bound; ++i) {
    Team& t = e.teams[size_t(i)];
    t.hidden.get(most * e.m.hidden), t.mixed.get(most * e.inner()), t.bc.get(most * 2 * e.both());
    if (e.per_channel()) {
      t.steps.get(most * e.m.rank), t.decay.get(most * e.x_row());
      t.more.get(int64_t(e.activation_bytes(most))), t.rows.get(most * e.dense_columns());
    } else {
      t.steps.get(most * e.m.heads), t.decay.get(most * e.m.heads);
    }
    t.normed.get(most * e.dense_columns()), t.activations.get(int64_t(e.activation_bytes(most)));
  }
  e.tiles.get(e.m.layer_count * e.state_size());
  const int64_t inputs = e.m.layer_count * kTaps * e.width();
  float* old = e.old.get(inputs);
  if (first) std::fill(old, old + inputs, 0.0f);
}

void run_prompt(Engine& engine, const MixerStates& states, const MixerPrompt& prompt, Barrier& barrier, int thread) {
  if (engine.per_channel()) ChannelPrompt(engine, states, prompt, barrier, thread).run();
  else HeadPrompt(engine, states, prompt, barrier, thread).run();
}

void run_layer(Engine& engine, const MixerStates& states, int layer, const Mixers::Prompt& all, Barrier& barrier, int thread) {
  const MixerPrompt prompt{nullptr, nullptr, nullptr, all.count, all.slot, all.first, all.last, barrier.threads()};
  if (engine.per_channel()) ChannelPrompt(engine, states, prompt, barrier, thread).run_layer(layer, all.hidden, all.delta);
  else HeadPrompt(engine, states, prompt, barrier, thread).run_layer(layer, all.hidden, all.delta);
}

}  // namespace state
