// Which experts a token takes.
#pragma once

#include "vec.h"

namespace LLMCOMPRESS_ISA {

// The k largest of n logits, the earlier expert first among equals, and their shares by softmax over all logits, or over the
// chosen ones with `renormalize`.
inline void choose(const float* logits, int n, int k, bool renormalize, int* chosen, float* weights) {
    const float top = *std::max_element(logits, logits + n);
    float total = 0, kept = 0;
    for (int i = 0; i < n; ++i) total += std::exp(logits[i] - top);
    for (int j = 0; j < k; ++j) {
        int best = -1;
        for (int i = 0; i < n; ++i) {
            const bool taken = std::find(chosen, chosen + j, i) != chosen + j;
            if (!taken && (best < 0 || logits[i] > logits[best])) best = i;
        }
        chosen[j] = best;
        weights[j] = std::exp(logits[best] - top) / total;
        kept += weights[j];
    }
    for (int j = 0; renormalize && j < k; ++j) weights[j] /= kept;
}

// Put k chosen experts into ascending order, their weights with them.
inline void order(int k, int* chosen, float* weights) {
    for (int j = 1; j < k; ++j)
        for (int i = j; i > 0 && chosen[i - 1] > chosen[i]; --i)
            std::swap(chosen[i - 1], chosen[i]), std::swap(weights[i - 1], weights[i]);
}

}  // namespace LLMCOMPRESS_ISA
