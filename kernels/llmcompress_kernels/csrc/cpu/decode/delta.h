// Layers with the gated delta rule (arXiv 2412.06464) as Qwen3-Next has them, between their two projections: short
// convolutions, unit queries and keys, a state that decays and takes what it says wrongly of a value, a gated norm. Kimi-Linear's
// decays differ along a key; lightning attention (MiniMax-01) takes whole values, has neither lengths nor a convolution.
//
// A state passes through tokens one by one, for steps and prompts alike. Sixteen or 32 of its columns do so at a time, which stay
// in a core's first-level cache: forms that take many tokens at once (triangular systems between products) multiply more.
#pragma once

#include "elementwise.h"
#include "engine.h"
#include "vec.h"

namespace LLMCOMPRESS_ISA {

// Columns of a state that pass through tokens together, in vectors.
constexpr int STATE_TILE = LLMCOMPRESS_LEVEL >= 4 ? 2 : 1;

// What a layer's projections have made of some tokens of a sequence, and where the results go.
struct DeltaRows {
    const float *query, *key, *value;  // of each `*_apart`: queries, keys and values, the same where one projection makes all, and
                                       // gates where they are not apart
    const float* gates;  // [tokens, H V]
    const float* steps;  // [tokens, 2 H]: of step sizes, then of decays; [tokens, H] of COLUMN_DELTA
    const float* decays;  // [tokens, H K] of COLUMN_DELTA
    float* out;          // [tokens, H V]
    int64_t query_apart, key_apart, value_apart, tokens;
};

// What is beside queries, keys and values.
struct DeltaBeside {
    const float *gates, *steps, *decays;
};

// Rows of queries, and of keys and values where a layer has projections of these.
inline DeltaRows delta_rows(const LayerOperands& o, const float* queries, const float* keys, const float* values,
                            const DeltaBeside& beside, float* out, int64_t tokens) {
    const bool split = o.conv_key.present();
    const int64_t all = o.conv_in.m.rows;
    return {queries, split ? keys : queries, split ? values : queries, beside.gates, beside.steps, beside.decays, out,
            all, split ? o.conv_key.m.rows : all, split ? o.conv_value.m.rows : all, tokens};
}

// Where what belongs to a key head begins in a token's projections, and its channels among those of the convolution.
struct DeltaPlaces {
    int64_t query, key, value, gate;
    int64_t query_channel, key_channel, value_channel;
};

inline DeltaPlaces places_of(const Delta& d, int64_t head) {
    const int64_t keys = d.key_dim, values = int64_t(d.heads / d.key_heads) * d.value_dim, all = d.key_heads * keys;
    DeltaPlaces p{0, 0, 0, 0, head * keys, all + head * keys, 2 * all + head * values};
    if (d.order == WITH_GATES || d.order == WITHOUT_GATES) {
        p.query = head * (2 * keys + (d.order == WITH_GATES ? 2 : 1) * values);
        p.key = p.query + keys, p.value = p.key + keys, p.gate = d.order == WITH_GATES ? p.value + values : head * values;
        return p;
    }
    p.query = p.query_channel, p.gate = head * values;
    p.key = d.order == SPLIT ? head * keys : p.key_channel, p.value = d.order == SPLIT ? head * values : p.value_channel;
    return p;
}

// A convolution of every channel over the last tokens.
struct Taps {
    const float* weight;  // [taps, C]
    int64_t channels;     // C
    int taps;
};

// silu of the convolution of tokens from `first` on, in `width` channels: out [tokens, width]. Inputs before the first token are
// in `kept` [taps - 1, C], all from channel `channel` on; `rows` are those of all tokens, from that channel on.
inline void convolve_channels(const Taps& c, const float* rows, int64_t apart, const float* kept, int64_t channel, int width,
                              int64_t first, int64_t tokens, float* out) {
    const int64_t channels = c.channels;
    for (int64_t t = 0; t < tokens; ++t) {
        const float* from[MAX_TAPS];
        for (int i = 0; i < c.taps; ++i) {
            const int64_t at = first + t + i - (c.taps - 1);
            from[i] = at >= 0 ? rows + at * apart : kept + (at + c.taps - 1) * channels + channel;
        }
        const float* const weight = c.weight + channel;
        int j = 0;
        for (; j + LANES <= width; j += LANES) {
            F16 total{};
            for (int i = 0; i < c.taps; ++i) total += load_float(from[i] + j) * load_float(weight + i * channels + j);
            store(out + t * width + j, activated(total, SILU));
        }
        for (; j < width; ++j) {
            float total = 0;
            for (int i = 0; i < c.taps; ++i) total += from[i][j] * weight[i * channels + j];
            out[t * width + j] = activated(spread(total), SILU)[0];
        }
    }
}

// Keep the last inputs of `width` channels for the tokens to come.
inline void keep_inputs(const Taps& c, const float* rows, int64_t apart, int64_t tokens, int64_t channel, int width, float* kept) {
    for (int i = 0; i + 1 < c.taps; ++i) {
        const int64_t at = tokens + i - (c.taps - 1);
        const float* from = at >= 0 ? rows + at * apart : kept + (at + c.taps - 1) * c.channels + channel;
        std::copy_n(from, width, kept + i * c.channels + channel);
    }
}

// x of length `by`
inline void to_length(float* x, int n, float by) {
    scale_all(x, n, inverse_size(x, n, 1e-6f / float(n)) * by / std::sqrt(float(n)));
}

inline float dot(const float* a, const float* b, int n) {
    F16 total{};
    float rest = 0;
    int i = 0;
    for (; i + 16 <= n; i += 16) total += load_float(a + i) * load_float(b + i);
    for (; i < n; ++i) rest += a[i] * b[i];
    return sum(total) + rest;
}

// What queries, keys and values of some tokens a state meets. All value heads of a group share the first two.
struct DeltaTokens {
    const float *query, *key;  // [tokens, K]; of COLUMN_DELTA queries times decays
    const float* overlap;      // [tokens], of the two
    const float *decay, *step; // [tokens] of a value head
    const float *columns, *decayed;  // [tokens, K] of COLUMN_DELTA: decays, and keys times these
    int64_t tokens;
};

// TILE * 16 columns of a state [V / 16, K, 16] through all tokens: S = g S + k d with d = step (v - g k S), or d = v of LIGHTNING;
// out = q S.
template <int RULE, int TILE>
inline void pass_columns(const DeltaTokens& x, int keys, float* state, const float* value, int64_t value_apart, float* out,
                         int64_t out_apart) {
    for (int64_t t = 0; t < x.tokens; ++t) {
        const float *q = x.query + t * keys, *k = x.key + t * keys;
        const float* const asks = RULE == COLUMN_DELTA ? x.decayed + t * keys : k;
        // two rows at a time: sums that wait for each other would be too few
        F16 told[2][TILE] = {}, read[2][TILE] = {};
        const auto meet = [&](int i, int r) {
            for (int c = 0; c < TILE; ++c) {
                const F16 s = load_float(state + (int64_t(c) * keys + i) * LANES);
                if (RULE != LIGHTNING) told[r][c] += s * asks[i];
                read[r][c] += s * q[i];
            }
        };
        for (int i = 0; i + 2 <= keys; i += 2) meet(i, 0), meet(i + 1, 1);
        if (keys % 2 != 0) meet(keys - 1, 0);
        const float g = RULE == COLUMN_DELTA ? 1.f : x.decay[t];
        F16 change[TILE];
        for (int c = 0; c < TILE; ++c) {
            const F16 v = load_float(value + t * value_apart + c * LANES);
            change[c] = RULE == LIGHTNING ? v : (v - (told[0][c] + told[1][c]) * g) * x.step[t];
            store(out + t * out_apart + c * LANES, (read[0][c] + read[1][c]) * g + change[c] * x.overlap[t]);
        }
        for (int i = 0; i < keys; ++i)
            for (int c = 0; c < TILE; ++c) {
                float* s = state + (int64_t(c) * keys + i) * LANES;
                store(s, load_float(s) * (RULE == COLUMN_DELTA ? x.columns[t * keys + i] : g) + change[c] * k[i]);
            }
    }
}

// All columns of a state.
template <int RULE>
inline void pass_state(const DeltaTokens& x, int keys, int values, float* state, const float* value, int64_t value_apart, float* out,
                       int64_t out_apart) {
    int c = 0;
    for (; c + STATE_TILE * LANES <= values; c += STATE_TILE * LANES)
        pass_columns<RULE, STATE_TILE>(x, keys, state + int64_t(c) * keys, value + c, value_apart, out + c, out_apart);
    for (; c < values; c += LANES)
        pass_columns<RULE, 1>(x, keys, state + int64_t(c) * keys, value + c, value_apart, out + c, out_apart);
}

// Decay and step size of a token, whose row of those of all heads is `given`, for a value head.
inline void rates(const Delta& d, const float* given, int64_t which, float& decay, float& step) {
    step = d.most * sigmoid(given[which]);
    if (d.rule == COLUMN_DELTA) return;
    const float x = given[d.heads + which] + d.dt_bias[which];
    decay = std::exp(d.decay[which] * (x > 20.f ? x : std::log1p(std::exp(x))));
}

// Decays of a head's columns at a token: keys times these, and queries in their place.
inline void decay_columns(const Delta& d, int64_t head, const float* given, const float* key, float* query, float* columns,
                          float* decayed) {
    const float* const bias = d.dt_bias + head * d.key_dim;
    const auto put = [&](int i, F16 x, int count) {
        const F16 g = exponential(softplus(x) * d.decay[head]);
        for (int j = 0; j < count; ++j) {
            columns[i + j] = g[j];
            decayed[i + j] = g[j] * key[i + j];
            query[i + j] *= g[j];
        }
    };
    int i = 0;
    for (; i + LANES <= d.key_dim; i += LANES) put(i, load_float(given + i) + load_float(bias + i), LANES);
    for (; i < d.key_dim; ++i) put(i, spread(given[i] + bias[i]), 1);
}

// Results of a value head after its norm, times their gates; `gate` as far from token to token as `apart` says.
inline void open_gates(const Delta& d, const float* gate, int64_t apart, int64_t tokens, float* out) {
    const int values = d.value_dim;
    for (int64_t t = 0; t < tokens; ++t) {
        float* to = out + t * d.values();
        const float factor = inverse_size(to, values, d.epsilon);
        for (int i = 0; i < values; i += LANES) {
            const F16 normed = load_float(d.gain + i) * (load_float(to + i) * factor), x = load_float(gate + t * apart + i);
            store(to + i, d.sigmoid != 0 ? normed * (1.f / (exponential(-x) + 1.f)) : normed * activated(x, SILU));
        }
    }
}

// Likewise of all heads together, of a token.
__attribute__((noinline, noclone)) inline void open_all(const Delta& d, const float* gates, float* out) {
    const int64_t all = d.values();
    norm(out, d.gain, nullptr, int(all), d.epsilon, out);
    for (int64_t i = 0; i < all; i += LANES)
        store(out + i, load_float(out + i) * (1.f / (exponential(-load_float(gates + i)) + 1.f)));
}

// Where the states of a key head's value heads are: `floats` [heads / key_heads, V / 16, K, 16], or for a single token `low`.
struct GroupStates {
    float* floats;
    const BoundLowStates* low;
    int32_t layer, slot;
};

// Tokens of a sequence through the value heads of one key head. Their states and `kept` [taps - 1, C] are the sequence's,
// replaced; with `begins` they count as zero. One body for steps and prompts, whose bits are the same.
__attribute__((noinline, noclone)) inline void pass_group(const Delta& d, const Taps& taps, const DeltaRows& r, int64_t head,
                                                          bool begins, const GroupStates& states, float* kept,
                                                          float* room) {
    const int keys = d.key_dim, values = d.value_dim, group = d.heads / d.key_heads, wide = group * values;
    const DeltaPlaces p = places_of(d, head);
    const struct {
        const float* rows;
        int64_t apart, channel;
        int width;
        float* to;
    } parts[] = {{r.query + p.query, r.query_apart, p.query_channel, keys, room},
                 {r.key + p.key, r.key_apart, p.key_channel, keys, room + DELTA_TOKENS * keys},
                 {r.value + p.value, r.value_apart, p.value_channel, wide, room + 2 * DELTA_TOKENS * keys}};
    float* const numbers = room + DELTA_TOKENS * (2 * keys + wide);
    float *overlap = numbers, *decay = numbers + DELTA_TOKENS, *step = numbers + 2 * DELTA_TOKENS;
    float *columns = numbers + 3 * DELTA_TOKENS, *decayed = columns + (d.rule == COLUMN_DELTA ? DELTA_TOKENS * keys : 0);
    const int64_t size = int64_t(values) * keys;
    if (begins) {
        std::fill_n(states.floats, group * size, 0.f);
        for (const auto& part : parts)
            for (int i = 0; i + 1 < taps.taps; ++i) std::fill_n(kept + i * taps.channels + part.channel, part.width, 0.f);
    }
    const int64_t all = d.values();
    for (int64_t first = 0; first < r.tokens; first += DELTA_TOKENS) {
        const int64_t tokens = std::min(DELTA_TOKENS, r.tokens - first);
        for (const auto& part : parts)
            convolve_channels(taps, part.rows, part.apart, kept, part.channel, part.width, first, tokens, part.to);
        for (int64_t t = 0; t < tokens; ++t) {
            float *q = parts[0].to + t * keys, *k = parts[1].to + t * keys;
            if (d.rule != LIGHTNING) to_length(q, keys, 1.f / std::sqrt(float(keys))), to_length(k, keys, 1.f);
            overlap[t] = dot(q, k, keys);
            if (d.rule == COLUMN_DELTA)
                decay_columns(d, head, r.decays + ((first + t) * d.heads + head) * keys, k, q, columns + t * keys, decayed + t * keys);
        }
        const bool among = d.order == WITH_GATES;
        const int64_t apart = among ? r.query_apart : all;
        const float* const gates = (among ? r.query : r.gates) + first * apart + p.gate;
        if (states.low != nullptr) {
            // a single token: decays and step sizes of its value heads
            for (int h = 0; h < group; ++h) rates(d, r.steps, head * group + h, decay[h], step[h]);
            float* const out = r.out + head * group * values;
            states.low->run->step(states.low->held, states.layer, states.slot, int32_t(head),
                                  {parts[2].to, parts[1].to, parts[0].to, decay, step}, out);
            for (int h = 0; h < group; ++h) open_gates(d, gates + h * values, apart, 1, out + h * values);
            continue;
        }
        for (int h = 0; h < group; ++h) {
            const int64_t which = head * group + h;
            const int64_t rows = (d.rule == COLUMN_DELTA ? 1 : 2) * d.heads;
            for (int64_t t = 0; t < tokens; ++t) {
                if (d.rule == LIGHTNING) decay[t] = std::exp(d.decay[which]);
                else rates(d, r.steps + (first + t) * rows, which, decay[t], step[t]);
            }
            const DeltaTokens meet{parts[0].to, parts[1].to, overlap, decay, step, columns, decayed, tokens};
            float* const state = states.floats + h * size;
            const float* const value = parts[2].to + h * values;
            float* const out = r.out + first * all + which * values;
            if (d.rule == LIGHTNING) pass_state<LIGHTNING>(meet, keys, values, state, value, wide, out, all);
            else if (d.rule == COLUMN_DELTA) pass_state<COLUMN_DELTA>(meet, keys, values, state, value, wide, out, all);
            else pass_state<GATED_DELTA>(meet, keys, values, state, value, wide, out, all);
            if (d.whole == 0) open_gates(d, gates + h * values, apart, tokens, out);
        }
    }
    for (const auto& part : parts)
        keep_inputs(taps, part.rows, part.apart, r.tokens, part.channel, part.width, kept);
}

// Tokens of a sequence of a cache, from position `start` on: a step's, those of a prompt, or its last ones.
enum Tokens { OF_STEP, OF_PROMPT, LAST_OF_PROMPT };

inline void pass_group(const Model& m, const Cache& c, const Layer& l, int64_t slot, int64_t start, int64_t head,
                       const DeltaRows& r, Tokens what, float* room) {
    const Delta& d = *l.delta;
    const int64_t place = l.place * int64_t(c.slots) + slot, size = int64_t(d.heads / d.key_heads) * d.value_dim * d.key_dim;
    const Taps taps{l.conv_weight, d.channels(), m.taps};
    float* const floats = c.states + ((c.low == nullptr ? place : l.place) * d.key_heads + head) * size;
    const GroupStates states{floats, what == OF_STEP ? c.low : nullptr, l.place, int32_t(slot)};
    pass_group(d, taps, r, head, start == 0, states, c.inputs + place * (taps.taps - 1) * taps.channels, room);
    if (c.low != nullptr && what == LAST_OF_PROMPT) c.low->run->round(c.low->held, l.place, int32_t(slot), int32_t(head), floats);
}

}  // namespace LLMCOMPRESS_ISA
