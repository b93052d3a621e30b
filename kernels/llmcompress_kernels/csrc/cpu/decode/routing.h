// Which experts a token takes.
#pragma once

#include "elementwise.h"
#include "vec.h"

namespace LLMCOMPRESS_ISA {

// The largest of n numbers, the earliest among equals, without the first j that are chosen already.
inline int best_left(const float* logits, int n, const int* chosen, int j) {
    int best = -1;
    for (int i = 0; i < n; ++i) {
        const bool taken = std::find(chosen, chosen + j, i) != chosen + j;
        if (!taken && (best < 0 || logits[i] > logits[best])) best = i;
    }
    return best;
}

// What a group of n experts is ranked by: the largest of their scores, or the sum of the two largest.
inline float group_score(const float* scores, int n, int voters) {
    float best = scores[0], second = LOWEST;
    for (int i = 1; i < n; ++i) {
        second = std::max(second, std::min(best, scores[i]));
        best = std::max(best, scores[i]);
    }
    return voters > 1 ? best + second : best;
}

// Leave only the experts of the best groups a chance, the earlier group among equals; `groups` is scratch, one number for each.
inline void keep_groups(const Model& m, float* scores, int n, float* groups) {
    const int size = n / m.groups;
    for (int g = 0; g < m.groups; ++g) groups[g] = group_score(scores + g * size, size, m.voters);
    for (int g = 0; g < m.groups; ++g) {
        int before = 0;
        for (int other = 0; other < m.groups; ++other)
            before += groups[other] > groups[g] || (groups[other] == groups[g] && other < g);
        if (before >= m.top_groups) std::fill_n(scores + g * size, size, LOWEST);
    }
}

// The k experts of the largest scores, the earlier one first among equals, and their weights: shares by softmax over all, or
// sigmoids. Scores are these with a correction, or logits without one; of groups sigmoids in any case.
inline void best_experts(const Model& m, const float* correction, const float* logits, int n, float* scratch, int* chosen,
                         float* weights) {
    const float top = *std::max_element(logits, logits + n);
    float total = 0, kept = 0;
    for (int i = 0; m.routing == SOFTMAX && i < n; ++i) total += std::exp(logits[i] - top);
    const auto weight = [&](float logit) { return m.routing == SIGMOID ? sigmoid(logit) : std::exp(logit - top) / total; };
    const float* scores = logits;
    // large logits have equal sigmoids
    if (correction != nullptr || m.groups > 1) {
        const bool corrected = m.routing == SIGMOID || correction != nullptr;
        for (int i = 0; i < n; ++i)
            scratch[i] = corrected ? weight(logits[i]) + (correction ? correction[i] : 0.f) : logits[i];
        if (m.groups > 1) keep_groups(m, scratch, n, scratch + n);
        scores = scratch;
    }
    for (int j = 0; j < m.top_k; ++j) {
        chosen[j] = best_left(scores, n, chosen, j);
        weights[j] = weight(logits[chosen[j]]);
        kept += weights[j];
    }
    // all may be 0
    for (int j = 0; m.renormalizes != 0 && j < m.top_k; ++j) weights[j] /= kept + m.routed_floor;
    for (int j = 0; j < m.top_k; ++j) weights[j] *= m.routed_scale;
}

// Sparsemixer outside of training (arXiv 2409.12136): the expert with the largest logit, then that with the largest of the others.
// Each weighs what a softmax gives it among the experts not taken before it whose logits are near its own: not further below than
// 2 jitter, relative to the larger of their size and its own.
inline void sparsemixer_experts(const float* logits, int n, int k, float jitter, int* chosen, float* weights) {
    for (int j = 0; j < k; ++j) {
        chosen[j] = best_left(logits, n, chosen, j);
        const float top = logits[chosen[j]];
        float total = 0;
        for (int i = 0; i < n; ++i) {
            const float below = (top - logits[i]) / std::max(std::abs(logits[i]), top);
            const bool taken = std::find(chosen, chosen + j, i) != chosen + j;
            // 0 / 0 is near
            if (!taken && !(below > 2 * jitter)) total += std::exp(logits[i] - top);
        }
        weights[j] = 1 / total;
    }
}

// `scratch` has room for two numbers for each expert.
inline void choose(const Model& m, const Layer& l, const float* logits, int n, float* scratch, int* chosen, float* weights) {
    if (m.routing == SPARSEMIXER) sparsemixer_experts(logits, n, m.top_k, m.jitter, chosen, weights);
    else best_experts(m, l.router_correction, logits, n, scratch, chosen, weights);
    for (int j = 0; l.expert_scales != nullptr && j < m.top_k; ++j) weights[j] *= l.expert_scales[chosen[j]];
}

// Put k chosen experts into ascending order, their weights with them.
inline void order(int k, int* chosen, float* weights) {
    for (int j = 1; j < k; ++j)
        for (int i = j; i > 0 && chosen[i - 1] > chosen[i]; --i)
            std::swap(chosen[i - 1], chosen[i]), std::swap(weights[i - 1], weights[i]);
}

}  // namespace LLMCOMPRESS_ISA
