// Latent attention: what a token leaves in the cache, and how a head's query and result meet the latents (decode.h).
#pragma once

#include "attention.h"
#include "multiply.h"

namespace LLMCOMPRESS_ISA {

// Columns of queries and keys beside the latents: R.
inline int beside_latents(const Model& m) { return m.latent_width - m.latents; }

// The last R columns of a query or of a row of latents, turned to their position where the layer does so.
inline void turn_last(const Model& m, const Layer& l, const float* from, int64_t position, float scale, float* to) {
    const int64_t at = position * (l.turned / 2);
    if (l.turned == 0) {
        for (int i = 0; i < beside_latents(m); ++i) to[i] = from[i] * scale;
        return;
    }
    if (m.neighbours != 0) rotate_pairs(from, l.cosine + at, l.sine + at, l.turned, scale, to);
    else rotate(from, l.cosine + at, l.sine + at, l.turned, l.turned, false, scale, to);
}

// A token's latents and turned numbers, from what their projection left in `row`, into the cache.
template <class T>
inline void put_latent(const float* row, int width, T* to) {
    for (int d = 0; d < width; ++d) store_one(to + d, row[d]);
}
inline void put_latent(const Model& m, const Layer& l, const Cache& c, int64_t layer, int64_t slot, int64_t position,
                       const float* row) {
    float kept[MAX_HEAD_DIM];
    const Widths w = widths(m, l);
    norm(row, l.key_norm, nullptr, m.latents, m.latent_epsilon, kept);
    turn_last(m, l, row + m.latents, position, 1.f, kept + m.latents);
    const int64_t at = (head_base(l, c, layer, slot, 0) + position) * w.row();
    if (c.kind == DENSE_FP32) put_latent(kept, w.key, static_cast<float*>(c.keys) + at);
    else put_latent(kept, w.key, static_cast<uint16_t*>(c.keys) + at);
}

// n numbers of a row, fewer than fill a vector, with zeros behind them.
template <class T>
inline F16 load_part(const T* from, int n) {
    T whole[LANES] = {};
    std::copy_n(from, n, whole);
    return load_float(whole);
}

// Columns [c, c + 16 VECTORS) of x W for TOKENS rows x [D] that are `apart`, W [D, C]: out[t * stride + c]. The sums of a token
// are the same whatever others are at hand.
template <class T, int TOKENS, int VECTORS>
inline void across_tile(const T* w, int64_t columns, const float* x, int64_t apart, int depth, int64_t c, float* out,
                        int64_t stride) {
    const int left = int(std::min<int64_t>(columns - c, VECTORS * LANES));
    F16 acc[TOKENS][VECTORS] = {};
    for (int d = 0; d < depth; ++d) {
        const T* row = w + d * columns + c;
        for (int v = 0; v < VECTORS; ++v) {
            const F16 value = left == VECTORS * LANES ? load_float(row + v * LANES) : load_part(row, left);
            for (int t = 0; t < TOKENS; ++t) acc[t][v] += value * x[t * apart + d];
        }
    }
    for (int t = 0; t < TOKENS; ++t)
        for (int v = 0; v < VECTORS; ++v) {
            float* to = out + t * stride + c + v * LANES;
            if (left == VECTORS * LANES) store(to, acc[t][v]);
            else for (int i = 0; i < left; ++i) to[i] = acc[t][v][i];
        }
}

template <class T, int TOKENS>
inline void across_tokens(const T* w, const Matrix& m, const float* x, int64_t apart, float* out, int64_t stride) {
    constexpr int VECTORS = LLMCOMPRESS_LEVEL >= 4 ? 2 : 1;  // sums stay in registers
    int64_t c = 0;
    for (; c + VECTORS * LANES <= m.columns; c += VECTORS * LANES)
        across_tile<T, TOKENS, VECTORS>(w, m.columns, x, apart, int(m.rows), c, out, stride);
    for (; c < m.columns; c += LANES) across_tile<T, TOKENS, 1>(w, m.columns, x, apart, int(m.rows), c, out, stride);
}

// Rows of x [tokens, D] times a dense W [D, C] of a head, across the rows of W: nothing is summed over lanes.
template <class T>
void across(const T* w, const Matrix& m, const float* x, int64_t apart, int tokens, float* out, int64_t stride) {
    constexpr int MOST = LLMCOMPRESS_LEVEL >= 4 ? 8 : 4;
    int t = 0;
    for (; t + MOST <= tokens; t += MOST) across_tokens<T, MOST>(w, m, x + t * apart, apart, out + t * stride, stride);
    for (; t < tokens; ++t) across_tokens<T, 1>(w, m, x + t * apart, apart, out + t * stride, stride);
}
inline void across(const Operand& o, int64_t head, const float* x, int64_t apart, int tokens, float* out, int64_t stride) {
    const int64_t begin = head * o.m.expert_rows * o.m.columns;
    if (o.m.kind == DENSE_FP32) across(static_cast<const float*>(o.m.data) + begin, o.m, x, apart, tokens, out, stride);
    else across(static_cast<const uint16_t*>(o.m.data) + begin, o.m, x, apart, tokens, out, stride);
}

// Queries of a head as the latents of a cache see them, of the tokens whose projections begin at `rows`: out[t * stride], padded
// with zeros. `position(t)` is where token t stands.
template <class F>
inline void absorb(const Model& m, const LayerOperands& o, const Cache& c, const float* rows, int tokens, int64_t head,
                   F&& position, float* out, int64_t stride) {
    const int64_t apart = int64_t(o.l.heads) * o.l.head_dim;
    const float* first = rows + head * o.l.head_dim;
    across(o.absorb, head, first, apart, tokens, out, stride);
    const Widths w = widths(m, o.l);
    for (int t = 0; t < tokens; ++t) {
        scale_all(out + t * stride, m.latents, m.attention_scale);
        turn_last(m, o.l, first + t * apart + o.l.head_dim - beside_latents(m), position(t), m.attention_scale,
                  out + t * stride + m.latents);
        std::fill(out + t * stride + w.key, out + t * stride + w.row(), 0.f);
        if (c.kind == DENSE_BF16) part_columns(out + t * stride, w.row());
    }
}

// A head's results [tokens, heads, value_dim] from its weighted sums of latents [tokens, C].
inline void expand(const Model& m, const LayerOperands& o, Input& in, const float* sums, int tokens, int64_t head, float* out) {
    in.set(sums, m.latents, tokens);
    multiply(o.expand, in, head, 0, o.expand.blocks(), out + head * o.l.value_dim, int64_t(o.l.heads) * o.l.value_dim);
}

// Norm of what queries are made of, in its place.
inline void norm_low(const Model& m, const LayerOperands& o, float* row) {
    norm(row, o.l.query_down_norm, nullptr, int(o.query_down.m.rows), m.latent_epsilon, row);
}

}  // namespace LLMCOMPRESS_ISA
