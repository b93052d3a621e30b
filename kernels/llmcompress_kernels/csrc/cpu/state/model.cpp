// Entry points of the native Mamba-2 model, and what steps and prompts do alike.
#include "elementwise.h"
#include "engine.h"
#include "llmcompress/packed_row.h"
#include "rounding.h"

#include <omp.h>

#include <cmath>

namespace state {
namespace {

// Floats of states that are worth keeping between prompts: new pages cost more than they take.
constexpr int64_t kKept = int64_t(1) << 21;

// Sums of sixteen lanes of several vectors, each vector's halves added until one lane is left.
template <int Rows>
STATE_INLINE void reduce_rows(const __m512* sum, float* out) {
  __m256 eight[Rows];
  __m128 four[Rows];
  for (int r = 0; r < Rows; ++r) eight[r] = _mm256_add_ps(_mm512_castps512_ps256(sum[r]), _mm512_extractf32x8_ps(sum[r], 1));
  for (int r = 0; r < Rows; ++r) four[r] = _mm_add_ps(_mm256_castps256_ps128(eight[r]), _mm256_extractf128_ps(eight[r], 1));
  for (int r = 0; r < Rows; ++r) four[r] = _mm_add_ps(four[r], _mm_movehl_ps(four[r], four[r]));
  for (int r = 0; r < Rows; ++r) out[r] = _mm_cvtss_f32(_mm_add_ss(four[r], _mm_movehdup_ps(four[r])));
}

// [H] rows of `weight` times one row: products and sums are rounded one by one, so that the definition is easy to say.
template <int Rows, class Load>
STATE_INLINE void dots(Load load, const float* x, int64_t columns, float* out) {
  __m512 sum[Rows];
  for (int r = 0; r < Rows; ++r) sum[r] = _mm512_setzero_ps();
  for (int64_t c = 0; c < columns; c += 16) {
    const __m512 v = _mm512_loadu_ps(x + c);
    for (int r = 0; r < Rows; ++r) sum[r] = _mm512_add_ps(sum[r], _mm512_mul_ps(load(r * columns + c), v));
  }
  reduce_rows<Rows>(sum, out);
}

// A row alone waits for its own sums, so as many as there are go together.
template <int Rows, class Load>
STATE_INLINE void dots(Load load, const float* x, int64_t columns, int64_t first, int64_t last, float* out) {
  int64_t r = first;
  for (; r + Rows <= last; r += Rows) {
    dots<Rows>([&](int64_t at) __attribute__((always_inline)) { return load(r * columns + at); }, x, columns, out + r);
  }
  if constexpr (Rows > 1) {
    if (r < last) dots<(Rows > 2 ? Rows - 2 : 1)>(load, x, columns, r, last, out);
  }
}

}  // namespace

bool Engine::rounded(const Operand& o, const float* x, const Activations& a, int64_t block) const {
  return round_tokens(o.parts.data(), o.count(), x, o.m.columns, a, o.m.columns, block);
}

void Worker::embed(int64_t token, float* to) const {
  const Matrix& from = m_.embedding;
  const int64_t columns = m_.hidden;
  if (from.kind == llmcompress::decode::DENSE_FP32) {
    std::memcpy(to, static_cast<const float*>(from.data) + token * columns, size_t(columns) * 4);
    return;
  }
  if (from.kind == llmcompress::decode::DENSE_BF16) {
    const uint16_t* row = static_cast<const uint16_t*>(from.data) + token * columns;
    for (int64_t i = 0; i < columns; ++i) to[i] = llmcompress::bf16_to_float(row[i]);
    return;
  }
  llmcompress::packed_row(static_cast<const uint32_t*>(from.data), from.scale, from.zero, from.bits, from.group, columns, token, to);
}

void Worker::norm(const float* x, const float* weight, float* to) const {
  rms_norm(x, m_.hidden, m_.epsilon, weight, to);
}

void Worker::time_rows(const Operand& dt, const float* normed, int64_t tokens, int64_t first, int64_t last, float* out,
                       int64_t stride) const {
  constexpr int64_t rows = 8;
  const int64_t columns = m_.hidden;
  const auto all = [&](auto load) __attribute__((always_inline)) {
    // a few rows stay in the first-level cache while all tokens pass
    for (int64_t from = first; from < last; from += rows) {
      const int64_t to = std::min(last, from + rows);
      for (int64_t t = 0; t < tokens; ++t) {
        dots<rows>(load, normed + t * columns, columns, from, to, out + t * stride);
        for (int64_t h = from; dt.m.bias != nullptr && h < to; ++h) out[t * stride + h] += dt.m.bias[h];
        for (int64_t h = from; dt.m.factors != nullptr && h < to; ++h) out[t * stride + h] *= dt.m.factors[h];
      }
    }
  };
  if (dt.m.kind == llmcompress::decode::DENSE_FP32) {
    const float* weight = static_cast<const float*>(dt.m.data);
    return all([weight](int64_t i) __attribute__((always_inline)) { return _mm512_loadu_ps(weight + i); });
  }
  const uint16_t* weight = static_cast<const uint16_t*>(dt.m.data);
  all([weight](int64_t i) __attribute__((always_inline)) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight + i));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  });
}

namespace {

void have_threads(Engine& engine, int threads) {
  if (engine.threads.size() < static_cast<size_t>(threads)) engine.threads.resize(static_cast<size_t>(threads));
}

void drop_tiles(Engine& engine) {
  if (engine.m.layer_count * engine.state_size() > kKept) engine.tiles.drop();
}

template <class Call>
void in_parallel(Engine& engine, int threads, Call call) {
  have_threads(engine, threads);
  Barrier barrier;
  barrier.expect(1);
  if (threads == 1) return call(barrier, 0);
#pragma omp parallel num_threads(threads)
  {
    // the runtime may give fewer threads than asked for
#pragma omp single
    barrier.expect(omp_get_num_threads());
    call(barrier, omp_get_thread_num());
  }
}

}  // namespace
}  // namespace state

#define EXPORT extern "C" __attribute__((visibility("default")))

// The caller keeps everything alive that `model` points to, and the library that `kernels` comes from.
EXPORT void* llmc_mamba2_create(const state::MixerModel* model, const llmcompress::Variant* kernels) {
  return new state::Engine(*model, *kernels);
}

EXPORT void llmc_mamba2_destroy(void* engine) { delete static_cast<state::Engine*>(engine); }

// Sizes of the structures by which Python checks that it declares the same.
EXPORT int llmc_mamba2_size(int which) {
  using namespace state;
  const size_t sizes[] = {sizeof(MixerLayer), sizeof(MixerModel), sizeof(MixerStates), sizeof(MixerStep), sizeof(MixerPrompt)};
  return static_cast<int>(sizes[which]);
}

EXPORT void llmc_mamba2_step(void* handle, const state::MixerStates* states, const state::MixerStep* step) {
  using namespace state;
  Engine& engine = *static_cast<Engine*>(handle);
  prepare_step(engine, step->batch, step->threads);
  in_parallel(engine, step->threads, [&](Barrier& barrier, int thread) { run_step(engine, *states, *step, barrier, thread); });
}

EXPORT void llmc_mamba2_prompt(void* handle, const state::MixerStates* states, const state::MixerPrompt* prompt) {
  using namespace state;
  Engine& engine = *static_cast<Engine*>(handle);
  prepare_prompt(engine, prompt->count, prompt->first != 0, prompt->threads);
  in_parallel(engine, prompt->threads, [&](Barrier& barrier, int thread) { run_prompt(engine, *states, *prompt, barrier, thread); });
  if (prompt->last != 0) drop_tiles(engine);
}

// What the prompt that is being read has left so far: states [L, I N] in pieces of `lanes` channels, and the last inputs of
// convolutions [L, 4, C]. Copied from the engine, or with `back` into it, so that a prompt goes on from there.
EXPORT void llmc_mamba2_carry(void* handle, float* states, float* inputs, int64_t* lanes, int32_t back) {
  using namespace state;
  Engine& engine = *static_cast<Engine*>(handle);
  const int64_t count = engine.m.layer_count * engine.state_size(), taps = engine.m.layer_count * 4 * engine.width();
  const auto move = [&](float* outside, float* own, int64_t floats) {
    std::memcpy(back != 0 ? own : outside, back != 0 ? outside : own, size_t(floats) * sizeof(float));
  };
  move(states, engine.tiles.get(count), count);
  move(inputs, engine.old.get(taps), taps);
  (back != 0 ? engine.lanes : *lanes) = back != 0 ? *lanes : engine.lanes;
}

// Layers of the model among others that the decode step computes (decode.h).
EXPORT const llmcompress::decode::Mixers* llmc_mamba2_mixers() {
  using namespace state;
  static const Mixers mixers = {
      [](void* handle, int64_t tokens, Mixers::Call what, int32_t threads) {
        Engine& engine = *static_cast<Engine*>(handle);
        have_threads(engine, threads);
        if (what == Mixers::STEP) prepare_step(engine, tokens, threads);
        else prepare_prompt(engine, tokens, what == Mixers::PROMPT, threads);
      },
      [](void* handle, const void* states, int32_t layer, const Mixers::Rows& rows, Barrier& barrier, int thread) {
        run_layer(*static_cast<Engine*>(handle), *static_cast<const MixerStates*>(states), layer, rows, barrier, thread);
      },
      [](void* handle, const void* states, int32_t layer, const Mixers::Prompt& prompt, Barrier& barrier, int thread) {
        run_layer(*static_cast<Engine*>(handle), *static_cast<const MixerStates*>(states), layer, prompt, barrier, thread);
      },
      [](void* handle) { drop_tiles(*static_cast<Engine*>(handle)); },
  };
  return &mixers;
}
