// Routed gated experts in one call.
#pragma once

#include <optional>

#include "linear.h"

namespace llmcompress {

// One projection of all experts, packed or dense.
struct Side {
    Operand packed;      // of expert 0; `rows` and `columns` also describe a dense one
    const void* dense;   // [experts, rows, columns], null when packed
    Type dense_type;
    const void* bias;    // [experts, rows] or null
    Type bias_type;

    // Rows [first, first + count) of an expert.
    Operand part(int64_t expert, int64_t first, int64_t count) const {
        return packed.part(expert * packed.rows + first, count);
    }
};

struct Routing {
    const int64_t* index;  // [tokens, slots]; an expert, or `experts` and above to skip
    const void* weight;    // [tokens, slots]
    Type weight_type;
    int64_t tokens, slots, experts;
};

// out[t] = sum over the slots of t of weight * (down(gate(gate_up(x[t])))), added in the order of experts.
// Throws std::out_of_range for a negative index.
void experts(const Side& gate_up, const Side& down, const Routing& routing, const void* x, Type type, int planes,
             Activation activation, float alpha, float limit, void* out);

}  // namespace llmcompress
