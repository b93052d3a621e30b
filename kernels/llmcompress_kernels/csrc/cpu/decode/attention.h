// Attention over a key-value cache: of a new token for the query heads that share a key-value head, or of some tokens in a row.
//
// The positions are cut into chunks, so that threads share one sequence (flash decoding): a chunk leaves its weighted
// sum of values with its maximum and its sum of exponentials, and combine() merges them.
#pragma once

#include <algorithm>

#include "elementwise.h"
#include "engine.h"
#include "vec.h"

namespace LLMCOMPRESS_ISA {

// What a chunk leaves for one query head (Widths::part): maximum, sum of exponentials, then padded values.
constexpr int PART_HEAD = LANES;

// Query heads or tokens whose sums fill the registers; more go one group after the other.
constexpr int MOST_TOGETHER = LLMCOMPRESS_LEVEL >= 4 ? 8 : 4;

// scores [G] of as many positions as a register has floats; keys [Dp, LANES], queries [heads, Dp]
template <class T, int G>
inline void score_part(const T* keys, const float* queries, int dim, int width, FN* scores) {
    FN acc[G][2] = {};
    int d = 0;
    for (; d + 2 <= dim; d += 2) {
        const FN a = load_native(keys + d * LANES), b = load_native(keys + (d + 1) * LANES);
        LLMCOMPRESS_UNROLL for (int g = 0; g < G; ++g) {
            acc[g][0] += a * queries[g * width + d];
            acc[g][1] += b * queries[g * width + d + 1];
        }
    }
    if (d < dim) {
        const FN a = load_native(keys + d * LANES);
        for (int g = 0; g < G; ++g) acc[g][0] += a * queries[g * width + d];
    }
    for (int g = 0; g < G; ++g) scores[g] = acc[g][0] + acc[g][1];
}

// Of sixteen positions.
template <class T, int G>
inline void score_block(const T* keys, const float* queries, int dim, int width, F16* scores) {
    if constexpr (G > MOST_TOGETHER) {
        score_block<T, MOST_TOGETHER>(keys, queries, dim, width, scores);
        score_block<T, G - MOST_TOGETHER>(keys, queries + MOST_TOGETHER * width, dim, width, scores + MOST_TOGETHER);
    } else {
        FN parts[PARTS][G];
        for (int i = 0; i < PARTS; ++i) score_part<T, G>(keys + i * NATIVE, queries, dim, width, parts[i]);
        for (int g = 0; g < G; ++g) scores[g] = joined<>(parts[0] + g, G);
    }
}

// Of every 32 columns of a query the even ones first, as score_rows() reads it beside rows of bf16.
inline void part_columns(float* query, int width) {
    float odd[LANES];
    for (int d = 0; d + 2 * LANES <= width; d += 2 * LANES) {
        float* const to = query + d;
        for (int i = 0; i < LANES; ++i) to[i] = to[2 * i], odd[i] = to[2 * i + 1];
        std::copy_n(odd, LANES, to + LANES);
    }
}

// Scores of G queries and N rows, lane by lane: acc[g][i] is to be summed up over the lanes of its part and of others.
template <class T, int G, int N>
inline void score_tile(const T* keys, const float* queries, int width, int part, FN (*acc)[N]) {
    int d = 0;
    for (; sizeof(T) == 2 && d + 2 * LANES <= width; d += 2 * LANES) {
        FN even[N], odd[N];
        for (int i = 0; i < N; ++i) {
            const UN both = load<UN>(keys + i * width + d + 2 * part * NATIVE);
            even[i] = even_columns(both), odd[i] = odd_columns(both);
        }
        for (int g = 0; g < G; ++g) {
            const float* const from = queries + g * width + d + part * NATIVE;
            const FN q = load_native(from), r = load_native(from + LANES);
            for (int i = 0; i < N; ++i) acc[g][i] += even[i] * q;
            for (int i = 0; i < N; ++i) acc[g][i] += odd[i] * r;
        }
    }
    for (; d < width; d += LANES) {
        FN k[N];
        for (int i = 0; i < N; ++i) k[i] = load_native(keys + i * width + d + part * NATIVE);
        for (int g = 0; g < G; ++g) {
            const FN q = load_native(queries + g * width + d + part * NATIVE);
            for (int i = 0; i < N; ++i) acc[g][i] += k[i] * q;
        }
    }
}

// As score_block() where a key is a row: keys [LANES, width], queries [heads, width], padded with zeros. Sums stay in registers,
// and few loads make many of them.
template <class T, int G>
inline void score_rows(const T* keys, const float* queries, int width, F16* scores) {
#if LLMCOMPRESS_LEVEL >= 4
    if constexpr (G > 4) {
        score_rows<T, 4>(keys, queries, width, scores);
        return score_rows<T, G - 4>(keys, queries + 4 * width, width, scores + 4);
    } else {
        F16 four[LANES / 4];
        for (int p = 0; p < LANES; p += 4) {
            F16 acc[4][4] = {};
            score_tile<T, G, 4>(keys + p * width, queries, width, 0, acc);
            four[p / 4] = sums(acc);
        }
        fours_of_rows(four);
        for (int g = 0; g < G; ++g) scores[g] = four[g];
    }
#else
    if constexpr (G > 2) {
        score_rows<T, 2>(keys, queries, width, scores);
        score_rows<T, G - 2>(keys, queries + 2 * width, width, scores + 2);
    } else {
        float all[G][LANES];
        for (int p = 0; p < LANES; p += 4) {
            FN acc[PARTS][G][4] = {};
            for (int part = 0; part < PARTS; ++part) score_tile<T, G, 4>(keys + p * width, queries, width, part, acc[part]);
            for (int g = 0; g < G; ++g) {
                F16 rows[4];
                for (int i = 0; i < 4; ++i) rows[i] = joined<>(acc[0][g] + i, 4 * G);
                const F4 four = sums(rows);
                std::memcpy(all[g] + p, &four, sizeof four);
            }
        }
        for (int g = 0; g < G; ++g) scores[g] = load_float(all[g]);
    }
#endif
}

// Which part of the positions a sum is about, so that it goes on where the one before has left it.
struct Part {
    bool first, last;
};

// values [positions, width]; out [G][part stride] becomes weights [G][stride] times values, TILE registers wide
template <class T, int G, int TILE>
inline void value_tile(const T* values, const float* weights, int64_t stride, int count, int width, float* out, int out_stride,
                       Part which) {
    FN acc[G][TILE] = {};
    for (int g = 0; g < G && !which.first; ++g)
        for (int i = 0; i < TILE; ++i) acc[g][i] = load_native(out + g * out_stride + i * NATIVE);
    for (int p = 0; p < count; ++p) {
        FN v[TILE];
        for (int i = 0; i < TILE; ++i) v[i] = load_native(values + (int64_t)p * width + i * NATIVE);
        for (int g = 0; g < G; ++g)
            for (int i = 0; i < TILE; ++i) acc[g][i] += v[i] * weights[g * stride + p];
    }
    for (int g = 0; g < G; ++g)
        for (int i = 0; i < TILE; ++i) store(out + g * out_stride + i * NATIVE, acc[g][i]);
}

// As value_tile() for two registers of columns of bf16.
template <int G>
inline void value_pair(const uint16_t* values, const float* weights, int64_t stride, int count, int width, float* out,
                       int out_stride, Part which) {
    FN acc[G][2] = {};
    for (int g = 0; g < G && !which.first; ++g)
        for (int i = 0; i < 2; ++i) acc[g][i] = load_native(out + g * out_stride + i * NATIVE);
    for (int p = 0; p < count; ++p) {
        const UN both = load<UN>(values + (int64_t)p * width);
        const FN even = even_columns(both), odd = odd_columns(both);
        for (int g = 0; g < G; ++g) {
            acc[g][0] += even * weights[g * stride + p];
            acc[g][1] += odd * weights[g * stride + p];
        }
    }
    for (int g = 0; g < G; ++g) {
        float* to = out + g * out_stride;
        if (which.last) store_woven(to, acc[g][0], acc[g][1]);
        else store(to, acc[g][0]), store(to + NATIVE, acc[g][1]);
    }
}

// Rows of latents that all their columns are read from together: few enough for a core's first-level cache.
constexpr int LATENT_ROWS = 16;

// All columns of value_tile(), as many at once as registers hold sums of.
template <class T, int G>
inline void weigh(const T* values, const float* weights, int64_t stride, int count, int apart, int width, float* out, int part,
                  Part which) {
    if constexpr (G > MOST_TOGETHER) {
        constexpr int MOST = MOST_TOGETHER;
        weigh<T, MOST>(values, weights, stride, count, apart, width, out, part, which);
        weigh<T, G - MOST>(values, weights + MOST * stride, stride, count, apart, width, out + MOST * part, part, which);
        return;
    }
    int d = 0;
    if constexpr (sizeof(T) == 2) {
        for (; d + 2 * NATIVE <= width; d += 2 * NATIVE)
            value_pair<G>(values + d, weights, stride, count, apart, out + d, part, which);
    } else {
        constexpr int TILE = G > MOST_TOGETHER / 2 ? 2 : 4;
        for (; d + TILE * NATIVE <= width; d += TILE * NATIVE)
            value_tile<T, G, TILE>(values + d, weights, stride, count, apart, out + d, part, which);
    }
    for (; d < width; d += NATIVE) value_tile<T, G, 1>(values + d, weights, stride, count, apart, out + d, part, which);
}

// What limits attention, beside what comes later.
struct Limits {
    int64_t window = INT64_MAX;  // positions that a token sees, itself the last of them
    float cap = 0;               // of scores, 0 for none
    bool chunked = false;        // those since the last multiple of `window`

    // the first one that the last of `tokens` sees, maybe below 0
    int64_t from(int64_t tokens) const { return chunked ? (tokens - 1) / window * window : tokens - window; }
};

// Positions [first, last) for G query heads; with LATER those of G tokens in a row, of which each but the last sees one
// position less than the next, and none more than a window. `weights` is scratch [G, stride >= last - first + 32]; `out` takes G parts.
template <class T, int G, int LATER = 0>
void attend(const T* keys, const T* values, const float* queries, const Widths& w, int64_t first, int64_t last, float* weights,
            int64_t stride, const Limits& limits, float* out) {
    const int row = w.row(), width = w.part() - PART_HEAD, apart = w.apart(), part = w.part();
    const int64_t begin = first / LANES * LANES, since = LATER ? std::max(first, limits.from(last)) : first;
    const int count = (int)(last - first), skip = (int)(first - begin);
    const F16 lowest = spread(LOWEST);
    F16 peak[G];
    for (int g = 0; g < G; ++g) peak[g] = lowest;
    for (int64_t p = begin; p < last; p += LANES) {
        F16 scores[G];
        if (w.latent) score_rows<T, G>(keys + p * row, queries, row, scores);
        else score_block<T, G>(keys + p * row, queries, w.key, row, scores);
        if (limits.cap > 0) {
            float raw[G * LANES];
            for (int g = 0; g < G; ++g) store(raw + g * LANES, scores[g]);
            cap_all(raw, G * LANES, limits.cap);
            for (int g = 0; g < G; ++g) scores[g] = load_float(raw + g * LANES);
        }
        if (p < since || p + LANES > last - (G - 1) * LATER)
            for (int g = 0; g < G; ++g) {
                const int64_t end = last - (G - 1 - g) * LATER, start = LATER ? std::max(first, limits.from(end)) : first;
                scores[g] = within(scores[g], start - p, end - p);
            }
        for (int g = 0; g < G; ++g) {
            peak[g] = maximum(peak[g], scores[g]);
            store(weights + g * stride + (p - begin), scores[g]);
        }
    }
    for (int g = 0; g < G; ++g) {
        float* shares = weights + g * stride;
        const float top = largest(peak[g]);
        F16 total{};
        // masked scores underflow to 0
        for (int64_t p = begin; p < last; p += LANES) {
            const F16 e = exponential(load_float(shares + (p - begin)) - top);
            total += e;
            store(shares + (p - begin), e);
        }
        out[g * part] = top;
        out[g * part + 1] = sum(total);
    }
    const int most = w.latent ? LATENT_ROWS : count;
    for (int from = 0; from < count; from += most)
        weigh<T, G>(values + (first + from) * apart, weights + skip + from, stride, std::min(most, count - from), apart, width,
                    out + PART_HEAD, part, {from == 0, from + most >= count});
}

template <class T>
void attend_heads(int heads, const T* keys, const T* values, const float* queries, const Widths& w, int64_t first, int64_t last,
                  float* weights, int64_t stride, const Limits& limits, float* out) {
    constexpr int MOST = TOGETHER_HEADS;
    for (; heads >= MOST; heads -= MOST, queries += MOST * w.row(), out += MOST * w.part())
        attend<T, MOST>(keys, values, queries, w, first, last, weights, stride, limits, out);
    if (heads == 3) attend<T, 3>(keys, values, queries, w, first, last, weights, stride, limits, out);
    if (heads == 2) attend<T, 2>(keys, values, queries, w, first, last, weights, stride, limits, out);
    if (heads == 1) attend<T, 1>(keys, values, queries, w, first, last, weights, stride, limits, out);
}

// Key and value of one position, whose head begins at row `base` of the cache.
template <class T>
inline void put(T* keys, T* values, int64_t base, int64_t position, const Widths& w, const float* k, const float* v) {
    T* column = keys + (base + position / LANES * LANES) * w.row() + position % LANES;
    T* row = values + (base + position) * w.apart();
    for (int d = 0; d < w.key; ++d) store_one(column + d * LANES, k[d]);
    for (int d = 0; d < w.value; ++d) store_one(row + d, v[d]);
}

inline void put(const Cache& c, int64_t base, int64_t position, const Widths& w, const float* k, const float* v) {
    if (c.kind == DENSE_FP32) put(static_cast<float*>(c.keys), static_cast<float*>(c.values), base, position, w, k, v);
    else put(static_cast<uint16_t*>(c.keys), static_cast<uint16_t*>(c.values), base, position, w, k, v);
}

// Merge the parts of one head, `chunks` of them `stride` floats apart, into out [dim]. A sink takes its share of the weights as
// a position with that score would, and adds no value.
inline void combine(const float* parts, int64_t stride, int chunks, int dim, const float* sink, float* out) {
    float top = sink == nullptr ? LOWEST : *sink, total = 0;
    for (int c = 0; c < chunks; ++c) top = std::max(top, parts[c * stride]);
    if (sink != nullptr) total = exponential(spread(*sink - top))[0];
    float factors[MAX_CHUNKS];
    for (int c = 0; c < chunks; ++c) {
        const F16 e = exponential(spread(parts[c * stride] - top));
        factors[c] = e[0];
        total += factors[c] * parts[c * stride + 1];
    }
    const float inverse = 1.f / total;
    const int width = int(padded(dim));
    for (int d = 0; d < width; d += LANES) {
        F16 acc{};
        for (int c = 0; c < chunks; ++c) acc += load_float(parts + c * stride + PART_HEAD + d) * (factors[c] * inverse);
        if (d + LANES <= dim) store(out + d, acc);
        else for (int i = 0; d + i < dim; ++i) out[d + i] = acc[i];
    }
}

// Rotate pairs of the first `turned` columns: (a, b) -> (a cos - b sin, b cos + a sin); cosine and sine [turned / 2]. They are
// half of those columns apart, as in llama, or `neighbours`, as in GLM. One body for steps and prompts: inlined, the compiler
// fuses other products with the sums in one than in the other.
__attribute__((noinline, noclone)) inline void rotate(const float* from, const float* cosine, const float* sine, int dim,
                                                      int turned, bool neighbours, float scale, float* to) {
    const int half = turned / 2;
    for (int i = 0; neighbours && i < half; ++i) {
        const float a = from[2 * i], b = from[2 * i + 1];
        to[2 * i] = (a * cosine[i] - b * sine[i]) * scale;
        to[2 * i + 1] = (b * cosine[i] + a * sine[i]) * scale;
    }
    for (int i = 0; !neighbours && i < half; ++i) {
        const float a = from[i], b = from[half + i];
        to[i] = (a * cosine[i] - b * sine[i]) * scale;
        to[half + i] = (b * cosine[i] + a * sine[i]) * scale;
    }
    for (int i = turned; i < dim; ++i) to[i] = from[i] * scale;
}

// Likewise pairs that stand side by side, as DeepSeek does; turned ones are half of the columns apart, which changes no score.
__attribute__((noinline, noclone)) inline void rotate_pairs(const float* from, const float* cosine, const float* sine, int turned,
                                                            float scale, float* to) {
    const int half = turned / 2;
    for (int i = 0; i < half; ++i) {
        const float a = from[2 * i], b = from[2 * i + 1];
        to[i] = (a * cosine[i] - b * sine[i]) * scale;
        to[half + i] = (b * cosine[i] + a * sine[i]) * scale;
    }
}

// Queries or keys of one token as their projection left them.
struct Heads {
    const float* rows;   // [count, D], `apart` from each to the next
    const float* norms;   // [D] of each head alone, [count, D] of all together or one for each, or null
    const float* biases;  // likewise, of LayerNorm
    int64_t count, apart;
    const Layer& layer;
};

// In a family with the norms of `member`.
inline Heads heads_of(const Layer& l, const float* rows, const float* norms, const float* biases, int64_t count, int64_t member) {
    const int64_t at = member * (l.whole_norms != 0 || l.own_norms != 0 ? count : 1) * l.head_dim;
    return {rows, norms == nullptr ? nullptr : norms + at, biases == nullptr ? nullptr : biases + at, count, l.head_dim, l};
}
inline Heads query_heads(const Layer& l, const float* rows, int64_t member) {
    Heads h = heads_of(l, rows, l.query_norm, l.query_norm_bias, l.heads, member);
    if (l.gates != 0) h.apart *= 2;
    return h;
}
inline Heads key_heads(const Layer& l, const float* rows, int64_t member) {
    return heads_of(l, rows, l.key_norm, l.key_norm_bias, l.key_value_heads, member);
}

// One head turned and then normed (Hunyuan), or a head's value; one body as rotate().
__attribute__((noinline, noclone)) inline void norm_in_place(const float* weight, int dim, float epsilon, float scale, float* head) {
    const float factor = inverse_size(head, dim, epsilon) * scale;
    for (int i = 0; i < dim; ++i) head[i] = weight[i] * (head[i] * factor);
}

// LayerNorm of one head (Command R+); likewise.
__attribute__((noinline, noclone)) inline void centre_head(const float* row, const float* weight, const float* bias, int dim,
                                                           float epsilon, float* to) {
    norm(row, weight, bias, dim, epsilon, to);
}

// One of them, normed where the model does so, and turned to its position. What all together are divided by is found again for
// every head: that is little beside the projection, and needs no barrier.
inline void turn(const Model& m, const Heads& h, int64_t head, int64_t position, float scale, float* to) {
    const Layer& l = h.layer;
    const int dim = l.head_dim;
    const float* row = h.rows + head * h.apart;
    float normed[MAX_HEAD_DIM];
    const bool last = l.norms_last != 0, together = l.whole_norms != 0;
    const int64_t own = together || l.own_norms != 0 ? head * dim : 0;
    if (h.biases != nullptr) {
        centre_head(row, h.norms + own, h.biases + own, dim, m.epsilon, normed);
        row = normed;
    } else if (h.norms != nullptr && !last) {
        const float* weight = h.norms + own;
        const float factor = together ? inverse_size(h.rows, int(h.count * dim), m.epsilon) : inverse_size(row, dim, m.epsilon);
        for (int i = 0; i < dim; ++i) normed[i] = weight[i] * (row[i] * factor);
        row = normed;
    }
    const int64_t at = position * (l.turned / 2);
    rotate(row, l.cosine + at, l.sine + at, dim, l.turned, m.neighbours != 0, last ? 1.f : scale, to);
    if (last) norm_in_place(h.norms, dim, m.epsilon, scale, to);
}

// Factor of the scores of a query, by where it stands (Llama 4).
inline float scale_of(const Model& m, const Layer& l, int64_t position) {
    return l.query_scales == nullptr ? m.attention_scale : m.attention_scale * l.query_scales[position];
}

// A token's key and value of a head into the cache, from what the projections left in `keys` and `values`; of the head's row
// `base` there.
inline void keep_head(const Model& m, const Layer& l, const Cache& c, const Heads& keys, const float* values, int64_t head,
                      int64_t base, int64_t position) {
    float turned[MAX_HEAD_DIM], normed[MAX_HEAD_DIM];
    turn(m, keys, head, position, 1.f, turned);
    const float* value = values + head * l.value_dim;
    if (l.value_norm != nullptr) {
        std::copy_n(value, l.value_dim, normed);
        norm_in_place(l.value_norm, l.value_dim, m.epsilon, 1.f, normed);
        value = normed;
    }
    put(c, base, position, widths(m, l), turned, value);
}

// Numbers times what their gates open to: all of them, or one for all.
__attribute__((noinline, noclone)) inline void open_by(const float* gates, bool each, bool softly, int count, float* to) {
    const auto factor = [&](F16 x) { return softly ? softplus(x) : 1.f / (exponential(-x) + 1.f); };
    if (!each) {
        const float by = factor(spread(*gates))[0];
        for (int i = 0; i < count; ++i) to[i] *= by;
        return;
    }
    int i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load_float(to + i) * factor(load_float(gates + i)));
    for (; i < count; ++i) to[i] *= factor(spread(gates[i]))[0];
}

// A head's result times what its gates open to, in a layer that has some; `rows` are all queries of the token, `gates` what
// `head_gates` makes of it.
inline void close_gates(const LayerOperands& o, const float* rows, const float* gates, int64_t head, float* mixed) {
    const Layer& l = o.l;
    if (o.head_gates.present()) {
        const bool each = o.head_gates.m.rows > l.heads;
        open_by(gates + head * (each ? l.value_dim : 1), each, l.softplus != 0, l.value_dim, mixed);
    }
    if (l.gates == 0) return;
    const int dim = l.head_dim;
    const float* gate = rows + (2 * head + 1) * dim;
    int i = 0;
    for (; i + LANES <= dim; i += LANES) store(mixed + i, load_float(mixed + i) / (exponential(-load_float(gate + i)) + 1.f));
    for (; i < dim; ++i) mixed[i] *= sigmoid(gate[i]);
}

inline Limits limits_of(const Model& m, const Layer& l) {
    return {l.window > 0 ? int64_t(l.window) : INT64_MAX, m.attention_cap, l.chunked != 0};
}

// The first position that the last of so many tokens sees.
inline int64_t seen_from(const Model& m, const Layer& l, int64_t tokens) {
    return l.window > 0 ? std::max<int64_t>(0, limits_of(m, l).from(tokens)) : 0;
}

inline const float* sink_of(const Layer& l, int64_t head) { return l.sinks == nullptr ? nullptr : l.sinks + head; }

// What keeps the keys and values of a layer.
inline const Cache& cache_of(const Cache& c, const Layer& l) { return l.window > 0 && c.windows != nullptr ? *c.windows : c; }

// The row of the cache where position 0 of a head of a sequence is, or would be.
inline int64_t head_base(const Layer& l, const Cache& c, int64_t layer, int64_t slot, int64_t head) {
    const int64_t rows = ((layer * c.slots + slot) * l.key_value_heads + head) * c.positions;
    return rows - (c.begins == nullptr ? 0 : c.begins[slot]);
}

}  // namespace LLMCOMPRESS_ISA
