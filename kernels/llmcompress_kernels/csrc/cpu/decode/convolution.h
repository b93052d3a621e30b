// Short gated convolutions (decode.h): what lies between their two projections.
#pragma once

#include "engine.h"
#include "vec.h"

namespace LLMCOMPRESS_ISA {

// Where the last inputs [L - 1, H] of a sequence are.
inline float* last_inputs(const Model& m, const Cache& c, int layer, int64_t slot) {
    return c.inputs + (int64_t(layer) * c.slots + slot) * (m.taps - 1) * m.hidden;
}

// One token of channels [first, last), multiples of sixteen: `row` [3 H] of the first projection becomes `out` [H], and its inputs
// take their place among the last ones. One body for steps and prompts, so that both round alike.
__attribute__((noinline, noclone)) inline void convolve(const Model& m, const Layer& l, const float* row, int64_t first,
                                                        int64_t last, float* inputs, float* out) {
    const int64_t wide = m.hidden, kept = m.taps - 1;
    for (int64_t i = first; i < last; i += LANES) {
        const F16 newest = load_float(row + i) * load_float(row + 2 * wide + i);
        F16 sum = load_float(l.conv_weight + kept * wide + i) * newest;
        for (int64_t k = 0; k < kept; ++k) {
            const F16 held = load_float(inputs + k * wide + i);
            sum += load_float(l.conv_weight + k * wide + i) * held;
            if (k > 0) store(inputs + (k - 1) * wide + i, held);
        }
        if (kept > 0) store(inputs + (kept - 1) * wide + i, newest);
        if (l.conv_bias != nullptr) sum += load_float(l.conv_bias + i);
        store(out + i, load_float(row + wide + i) * sum);
    }
}

}  // namespace LLMCOMPRESS_ISA
