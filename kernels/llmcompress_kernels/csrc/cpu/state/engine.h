// A model of mixers made ready: kernels chosen, chunk lists of packed matrices, buffers. And what a step and a prompt share.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <deque>
#include <new>
#include <vector>

#include "channels.h"
#include "heads.h"
#include "llmcompress/barrier.h"
#include "llmcompress/lowbit.h"
#include "llmcompress/types.h"
#include "memory.h"
#include "model.h"

namespace state {

using llmcompress::Activations;
using llmcompress::Barrier;
using llmcompress::LANES;
using llmcompress::Variant;
using llmcompress::Weight;

// A matrix, and how its inputs are rounded where it is packed.
struct Operand {
  Matrix m{};
  Weight weight{};
  std::vector<llmcompress::Chunk> parts;
  int planes = 0;
  bool even = false;  // rounding.h does for blocks of eight tokens

  Operand() = default;
  Operand(const Matrix& matrix, int rounding) : m(matrix), planes(rounding) {
    if (m.kind != llmcompress::decode::PACKED) return;
    weight = {static_cast<const uint32_t*>(m.data), m.scale, m.zero, blocks() * LANES, m.columns, m.group, m.bits};
    parts.resize(static_cast<size_t>(llmcompress::chunk_count(m.group, m.columns, planes)));
    llmcompress::chunks(m.bits, m.group, m.columns, parts.data(), planes);
  }
  bool present() const { return m.kind != llmcompress::decode::ABSENT; }
  bool packed() const { return m.kind == llmcompress::decode::PACKED; }
  int64_t blocks() const { return (m.rows + LANES - 1) / LANES; }
  int64_t count() const { return static_cast<int64_t>(parts.size()); }
  // Whether activations are 64 bytes in natural order to a chunk.
  bool eights() const {
    const auto whole = [](const llmcompress::Chunk& part) { return part.width == llmcompress::INT8_CHUNK; };
    return packed() && planes == 1 && m.bits == 8 && std::all_of(parts.begin(), parts.end(), whole);
  }
  size_t bytes(int64_t tokens) const { return packed() ? llmcompress::activation_bytes(weight, tokens, planes) : 0; }
};

struct LayerOperands {
  MixerLayer l;
  Operand in, x, dt, out;
  std::vector<float> taps;   // weights of the convolution [4, C]
  std::vector<float> rates;  // of Mamba-1: a / ln 2, [I / 16, N, 16]
};

// Memory of cache lines that only grows; what it holds is undefined after that.
template <class T>
class Lines {
 public:
  T* get(int64_t count) {
    if (count > count_) {
      held_.reset();  // first, so that both are never there
      held_.reset(static_cast<T*>(std::aligned_alloc(64, (size_t(count + 64) * sizeof(T) + 63) / 64 * 64)));
      if (held_ == nullptr) throw std::bad_alloc();
      count_ = count;
    }
    return held_.get();
  }
  void drop() { held_.reset(), count_ = 0; }

 private:
  std::unique_ptr<T, Free> held_;
  int64_t count_ = -1;
};

struct ThreadBuffers {
  Lines<float> tile, row, normed;
  Lines<char> activations;
};

// Threads that take the same tokens of a prompt, and what they share.
struct Team {
  Barrier barrier;
  Lines<float> hidden, normed, mixed, bc, steps, decay;
  Lines<char> activations, more;  // `more` of Mamba-1, whose first inputs are needed to the end
  Lines<float> rows;              // likewise where they are dense
};

struct Engine {
  Engine(const MixerModel& model, const Variant& variant) : m(model), kernels(variant), head(model.head, model.head_planes) {
    layers.reserve(static_cast<size_t>(m.layer_count));
    for (int i = 0; i < m.layer_count; ++i) {
      const MixerLayer& l = m.layers[i];
      layers.push_back({l, Operand(l.in_proj, l.in_planes), Operand(l.x_proj, l.x_planes), Operand(l.dt_proj, 0),
                        Operand(l.out_proj, l.out_planes), {}, {}});
      for (Operand* o : {&layers.back().in, &layers.back().x, &layers.back().out}) o->even = o->eights() && kernels.token_block == 8;
      layers.back().taps.resize(static_cast<size_t>(4 * width()));
      for (int64_t at = 0; at < 4 * width(); ++at) {
        layers.back().taps[static_cast<size_t>(at % 4 * width() + at / 4)] = l.conv_weight[at];
      }
      if (per_channel()) layers.back().rates = rates_of(l.a, inner(), m.states);
    }
  }

  int64_t inner() const { return int64_t(m.heads) * m.channels; }
  int64_t both() const { return int64_t(m.groups) * m.states; }
  // Whether every channel has time steps and decays of its own, as in Mamba-1.
  bool per_channel() const { return m.rank > 0; }
  int64_t width() const { return inner() + (per_channel() ? 0 : 2 * both()); }
  // of what in_proj yields
  int64_t row() const { return (inner() + width() + (per_channel() ? 0 : m.heads) + LANES - 1) / LANES * LANES; }
  // of what x_proj yields: the inputs of time steps, B and C
  int64_t x_row() const { return (m.rank + 2 * m.states + LANES - 1) / LANES * LANES; }
  int64_t step_row() const { return per_channel() ? inner() + x_row() : m.heads; }
  int64_t hidden_row() const { return (m.hidden + LANES - 1) / LANES * LANES; }
  int64_t head_row() const { return (m.vocabulary + LANES - 1) / LANES * LANES; }
  int64_t state_size() const { return inner() * m.states; }
  int64_t code_bytes() const { return state_size() * m.bits / 8; }
  Mode mode(const MixerLayer& l) const { return mode_of(l.fixed, m.refit, m.dither); }

  // Bytes of the largest fixed-point input of `tokens` rows.
  size_t activation_bytes(int64_t tokens) const {
    size_t most = head.bytes(tokens);
    for (const LayerOperands& o : layers) most = std::max({most, o.in.bytes(tokens), o.x.bytes(tokens), o.out.bytes(tokens)});
    return most;
  }
  // Of the widest input of a dense projection, 0 where all are packed.
  int64_t dense_columns() const {
    int64_t most = 0;
    for (const LayerOperands& layer : layers) {
      for (const Operand* o : {&layer.in, &layer.x, &layer.out}) most = std::max<int64_t>(most, o->packed() ? 0 : o->m.columns);
    }
    return most;
  }
  Activations place(const Operand& o, int64_t tokens, char* memory) const {
    return o.packed() ? llmcompress::place_activations(o.weight, tokens, o.planes, memory, kernels.token_block) : Activations{};
  }
  void quantize(const Operand& o, const float* x, const Activations& a, int64_t block) const {
    if (!o.packed() || (o.even && a.tokens - block * 8 >= 8 && rounded(o, x, a, block))) return;
    kernels.quantize(o.weight, o.parts.data(), o.count(), x, llmcompress::FP32, o.m.columns, nullptr, a, block);
  }
  bool rounded(const Operand& o, const float* x, const Activations& a, int64_t block) const;
  // Row blocks [first, last) for all tokens: out[t * stride + row]; x [tokens, columns].
  void multiply(const Operand& o, const Activations& a, const float* x, int64_t tokens, int64_t first, int64_t last,
                float* row, float* out, int64_t stride) const {
    if (first >= last) return;
    const int64_t end = std::min(last * LANES, o.m.rows);
    if (o.packed()) {
      kernels.rows(o.weight, o.parts.data(), o.count(), a, first, last, out, llmcompress::FP32, stride);
    } else {
      const bool wide = o.m.kind == llmcompress::decode::DENSE_FP32;
      kernels.dense_rows(o.m.data, wide ? llmcompress::FP32 : llmcompress::BF16, o.m.columns, x, tokens, first * LANES, end, row,
                         out, stride);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t r = first * LANES; o.m.bias != nullptr && r < end; ++r) out[t * stride + r] += o.m.bias[r];
      for (int64_t r = first * LANES; o.m.factors != nullptr && r < end; ++r) out[t * stride + r] *= o.m.factors[r];
    }
  }

  MixerModel m;
  const Variant& kernels;
  Operand head;
  std::vector<LayerOperands> layers;
  std::vector<ThreadBuffers> threads;
  // shared by the threads of a step
  Lines<float> hidden, normed, projected, mixed, steps, decay, y, delta;
  Lines<char> activations;
  std::vector<int64_t> best;
  // of a prompt: by layer, the state in pieces and the last inputs of the convolution, and how many segments have left them
  std::deque<Team> teams;
  Lines<float> tiles, old;
  std::vector<std::atomic<int>> left;
  int64_t lanes = 0;
};

// One thread of a step or prompt: its shares, the barrier, the clock, and what both do with tokens.
class Worker {
 public:
  // `thread` is its number among those that meet at `barrier`, `seconds` null but for one thread.
  Worker(Engine& engine, ThreadBuffers& own, Barrier& barrier, int thread, double* seconds)
      : e_(engine), m_(engine.m), own_(own), barrier_(barrier), thread_(thread), seconds_(seconds), mark_(now()) {}

 protected:
  struct Range {
    int64_t first, last;
  };
  Range share(int64_t n) const { return part_of(n, thread_, barrier_.threads()); }
  static Range part_of(int64_t n, int64_t part, int64_t parts) { return {n * part / parts, n * (part + 1) / parts}; }
  void took(MixerPhase phase) {
    if (seconds_ == nullptr) return;
    const double t = now();
    seconds_[phase] += t - mark_;
    mark_ = t;
  }
  void wait(MixerPhase before) {
    took(before);
    barrier_.wait();
    took(kWait);
  }

  void embed(int64_t token, float* to) const;                   // [D]
  void norm(const float* x, const float* weight, float* to) const;  // [D]
  // Raw time steps of heads [first, last) of tokens whose `normed` rows [D] are given, where they are dense rows of their own:
  // out[t * stride + head].
  void time_rows(const Operand& dt, const float* normed, int64_t tokens, int64_t first, int64_t last, float* out,
                 int64_t stride) const;

  Engine& e_;
  const MixerModel& m_;
  ThreadBuffers& own_;
  Barrier& barrier_;
  const int thread_;

 private:
  static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }
  double* seconds_;
  double mark_;
};

void run_step(Engine& engine, const MixerStates& states, const MixerStep& step, Barrier& barrier, int thread);
void run_prompt(Engine& engine, const MixerStates& states, const MixerPrompt& prompt, Barrier& barrier, int thread);
// One layer among others that are not of this engine; `layer` counts its own, in the order in which a step runs them.
void run_layer(Engine& engine, const MixerStates& states, int layer, const Mixers::Rows& rows, Barrier& barrier, int thread);
void run_layer(Engine& engine, const MixerStates& states, int layer, const Mixers::Prompt& prompt, Barrier& barrier, int thread);
// Room for steps of `batch` sequences and for parts of prompts of up to `tokens`; called by one thread before. `first`: the
// part is the first of its prompt.
void prepare_step(Engine& engine, int64_t batch, int64_t threads);
void prepare_prompt(Engine& engine, int64_t tokens, bool first, int64_t threads);

}  // namespace state
