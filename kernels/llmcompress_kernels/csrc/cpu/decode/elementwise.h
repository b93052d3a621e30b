// What surrounds the products: a token's embedding, norms and the gate of an MLP.
#pragma once

#include "vec.h"

namespace LLMCOMPRESS_ISA {

// A row of an embedding of `size` columns.
inline void embedding_row(const Matrix& from, int64_t token, int64_t size, float scale, float* to) {
    if (from.kind == PACKED) {
        packed_row(static_cast<const uint32_t*>(from.data), from.scale, from.zero, from.bits, from.group, size, token, to);
        for (int64_t i = 0; i < size; ++i) to[i] *= scale;
        return;
    }
    for (int64_t i = token * size; i < (token + 1) * size; ++i)
        *to++ = scale * (from.kind == DENSE_FP32 ? static_cast<const float*>(from.data)[i]
                                                 : widen(static_cast<const uint16_t*>(from.data)[i]));
}

// One by the root mean square of n numbers.
inline float inverse_size(const float* x, int n, float epsilon) {
    F16 squares{};
    float rest = 0;
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        const F16 v = load_float(x + i);
        squares += v * v;
    }
    for (; i < n; ++i) rest += x[i] * x[i];
    return 1.f / std::sqrt((sum(squares) + rest) / float(n) + epsilon);
}

// RMSNorm of n numbers, or with a bias LayerNorm.
inline void norm(const float* x, const float* weight, const float* bias, int n, float epsilon, float* out) {
    if (bias == nullptr) {
        const float factor = inverse_size(x, n, epsilon);
        for (int i = 0; i < n; ++i) out[i] = weight[i] * (x[i] * factor);
        return;
    }
    F16 total{};
    float rest = 0;
    int i = 0;
    for (; i + 16 <= n; i += 16) total += load_float(x + i);
    for (; i < n; ++i) rest += x[i];
    const float mean = (sum(total) + rest) / float(n);
    for (i = 0; i < n; ++i) out[i] = x[i] - mean;
    const float factor = inverse_size(out, n, epsilon);
    for (i = 0; i < n; ++i) out[i] = weight[i] * (out[i] * factor) + bias[i];
}

// A token's embedding with its factor, what belongs to its position, and its norm where it has one.
inline void embedding_row(const Model& m, const Matrix& from, int64_t token, int64_t position, float* to) {
    embedding_row(from, token, m.hidden, m.embedding_scale, to);
    if (m.position_rows != nullptr)
        for (int64_t i = 0; i < m.hidden; ++i) to[i] += m.position_rows[position * m.hidden + i];
    if (m.embedding_norm != nullptr) norm(to, m.embedding_norm, nullptr, m.hidden, m.epsilon, to);
}

// Of a row of hidden states, with the weights of `member` in a family; without weights the row itself.
inline void norm(const Model& m, const float* x, const float* weight, const float* bias, int64_t member, float* out) {
    const int64_t at = member * m.hidden;
    if (weight == nullptr) {
        std::copy_n(x, m.hidden, out);
        return;
    }
    norm(x, weight + at, bias == nullptr ? nullptr : bias + at, m.hidden, m.epsilon, out);
}

// Add what a sublayer says to a row of hidden states, normed before where `after` has weights; `delta` may be changed.
inline void add_to(const Model& m, float* delta, const float* after, int64_t member, float* hidden) {
    if (after != nullptr) norm(m, delta, after, nullptr, member, delta);
    for (int i = 0; i < m.hidden; ++i) hidden[i] += m.residual_scale * delta[i];
}

// What experts say through its norm, plus what the MLP beside them says through its own; both are changed.
__attribute__((noinline, noclone)) inline void join_norms(const Model& m, const LayerOperands& o, float* routed, float* beside) {
    norm(routed, o.l.routed_after, nullptr, m.hidden, m.epsilon, routed);
    if (!o.shared_down.present()) return;
    if (o.l.shared_after != nullptr) norm(beside, o.l.shared_after, nullptr, m.hidden, m.epsilon, beside);
    for (int i = 0; i < m.hidden; ++i) routed[i] += beside[i];
}

inline float sigmoid(float x) { return 1.f / (std::exp(-x) + 1.f); }

// Products with a gate and with what it opens, if there is one, times the weight of an expert.
inline void scale_both(float* gate, float* up, int64_t count, float by) {
    for (int64_t i = 0; i < count; ++i) gate[i] *= by;
    for (int64_t i = 0; up != nullptr && i < count; ++i) up[i] *= by;
}

// log(1 + e^x). Of log(1 + u) = 2 atanh(u / (2 + u)) for u up to 1 seven terms are within 1e-8.
inline F16 softplus(F16 x) {
    const F16 u = exponential(-maximum(x, -x)), s = u / (u + 2.f), t = s * s;
    F16 series = t * (1.f / 13) + 1.f / 11;
    series = series * t + 1.f / 9;
    series = series * t + 1.f / 7;
    series = series * t + 1.f / 5;
    series = series * t + 1.f / 3;
    return maximum(x, F16{}) + s * 2.f * (series * t + 1.f);
}

inline void scale_all(float* x, int64_t count, float by) {
    for (int64_t i = 0; i < count; ++i) x[i] *= by;
}

// erf to 1.5e-7 (Abramowitz and Stegun, 7.1.26)
inline F16 erf_of(F16 x) {
    const F16 size = maximum(x, -x), t = 1.f / (size * 0.3275911f + 1.f);
    F16 p = spread(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const F16 far = 1.f - p * t * exponential(-size * size);
    return choose(x < F16{}, -far, far);
}

// What an MLP does with sixteen values of its gate. (1 + tanh(u)) / 2 is the sigmoid of 2 u.
inline F16 activated(F16 v, int32_t activation) {
    if (activation == GELU) return v * 0.5f * (erf_of(v * 0.70710678118654752f) + 1.f);
    if (activation == RELU || activation == RELU2) {
        const F16 positive = maximum(v, F16{});
        return activation == RELU ? positive : positive * positive;
    }
    // 2 sqrt(2 / pi) (v + 0.044715 v^3)
    const F16 u = activation == GELU_TANH ? v * (v * v * 0.0713548162726f + 1.59576912160573f) : v;
    return v / (exponential(-u) + 1.f);
}

// activation(gate) * up of sixteen values. gpt-oss cuts both sides first, and adds one to the second.
inline F16 opened(const Model& m, F16 gate, F16 up) {
    if (m.activation != GPT_OSS) return activated(gate, m.activation) * up;
    const F16 most = spread(m.gate_limit);
    gate = choose(gate < most, gate, most);
    up = maximum(choose(up < most, up, most), -most);
    return gate / (exponential(gate * -m.gate_slope) + 1.f) * (up + 1.f);
}

// xIELU (arXiv 2411.13010): a parabola, and below 0 what an exponential adds to a line; one body for steps and prompts.
__attribute__((noinline, noclone)) inline void xielu_all(const Model& m, const Layer& l, float* x, int64_t count) {
    const F16 most = spread(m.gate_limit);
    const auto bent = [&](F16 v) {
        const F16 below = (exponential(choose(v < most, v, most)) - 1.f - v) * l.negative;
        return v * m.gate_slope + choose(v > F16{}, v * v * l.positive, below);
    };
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) store(x + i, bent(load_float(x + i)));
    for (; i < count; ++i) x[i] = bent(spread(x[i]))[0];
}

// gate = activation(gate) * up, or the first alone where `up` is null
inline void open_gate(const Model& m, const Layer& l, float* gate, const float* up, int64_t count) {
    int64_t i = 0;
    if (m.activation == XIELU) return xielu_all(m, l, gate, count);
    if (up == nullptr) {
        for (; i + 16 <= count; i += 16) store(gate + i, activated(load_float(gate + i), m.activation));
        for (; i < count; ++i) gate[i] = activated(spread(gate[i]), m.activation)[0];
        return;
    }
    for (; i + 16 <= count; i += 16) store(gate + i, opened(m, load_float(gate + i), load_float(up + i)));
    for (; i < count; ++i) gate[i] = opened(m, spread(gate[i]), spread(up[i]))[0];
}

// cap tanh(x / cap) to about 1e-6 of itself
inline F16 capped(F16 x, float cap) {
    const F16 y = x * (1.f / cap), square = y * y;
    const F16 far = 1.f - 2.f / (exponential(y + y) + 1.f);
    const F16 near = y * (((square * (-17.f / 315) + 2.f / 15) * square - 1.f / 3) * square + 1.f);
    return cap * choose(square < spread(0.01f), near, far);
}

// One body: attention is compiled for many numbers of heads, few models cap its scores.
__attribute__((noinline)) inline void cap_all(float* x, int64_t count, float cap) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) store(x + i, capped(load_float(x + i), cap));
    for (; i < count; ++i) x[i] = capped(spread(x[i]), cap)[0];
}

}  // namespace LLMCOMPRESS_ISA
