// From sums to results, in both forms of skinny.cuh: biases, and what gate and up become.
#pragma once

#include "shape.cuh"

namespace llmcompress::skinny {

__device__ inline float activated(const Call& call, float gate, float up) {
    switch (call.activation) {
    case SILU: return gate / (1 + expf(-gate)) * up;
    case GELU: return 0.5f * gate * (1 + erff(gate * 0.7071067811865476f)) * up;
    case GELU_TANH: return 0.5f * gate * (1 + tanhf(0.7978845608028654f * (gate + 0.044715f * gate * gate * gate))) * up;
    default:
        gate = fminf(gate, call.limit), up = fminf(fmaxf(up, -call.limit), call.limit);
        return (up + 1) * gate / (1 + expf(-call.alpha * gate));
    }
}

template <bool BF16> __device__ inline float bias_of(const Call& call, int64_t row) {
    return call.bias == nullptr ? 0.0f : widen<BF16>(read(static_cast<const uint16_t*>(call.bias) + row));
}

} // namespace llmcompress::skinny
