// Which experts a token takes.
#pragma once

#include "vec.h"

namespace LLMCOMPRESS_ISA {

// The largest of n logits, the earliest among equals, without the first j that are chosen already.
inline int best_left(const float* logits, int n, const int* chosen, int j) {
    int best = -1;
    for (int i = 0; i < n; ++i) {
        const bool taken = std::find(chosen, chosen + j, i) != chosen + j;
        if (!taken && (best < 0 || logits[i] > logits[best])) best = i;
    }
    return best;
}

// The k largest of n logits, the earlier expert first among equals, and their shares by softmax over all logits, or over the
// chosen ones with `renormalize`.
inline void softmax_experts(const float* logits, int n, int k, bool renormalize, int* chosen, float* weights) {
    const float top = *std::max_element(logits, logits + n);
    float total = 0, kept = 0;
    for (int i = 0; i < n; ++i) total += std::exp(logits[i] - top);
    for (int j = 0; j < k; ++j) {
        chosen[j] = best_left(logits, n, chosen, j);
        weights[j] = std::exp(logits[chosen[j]] - top) / total;
        kept += weights[j];
    }
    for (int j = 0; renormalize && j < k; ++j) weights[j] /= kept;
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

inline void choose(const Model& m, const float* logits, int n, int* chosen, float* weights) {
    if (m.routing == SPARSEMIXER) sparsemixer_experts(logits, n, m.top_k, m.jitter, chosen, weights);
    else softmax_experts(logits, n, m.top_k, m.routing == SOFTMAX_OF_CHOSEN, chosen, weights);
}

// Put k chosen experts into ascending order, their weights with them.
inline void order(int k, int* chosen, float* weights) {
    for (int j = 1; j < k; ++j)
        for (int i = j; i > 0 && chosen[i - 1] > chosen[i]; --i)
            std::swap(chosen[i - 1], chosen[i]), std::swap(weights[i - 1], weights[i]);
}

}  // namespace LLMCOMPRESS_ISA
