// Products of the steps that have come.
#pragma once

#include "pipeline.cuh"

namespace llmcompress::skinny {

template <int BITS, bool BF16, int NT> struct Sums {
    using S = Shape<BITS>;
    float total[2][NT][4]; // [16-row half][8 slots]: rows g, g, g + 8, g + 8 and slots 2 t, 2 t + 1, 2 t, 2 t + 1

    __device__ __forceinline__ void clear() { clear(total); }
    template <int N> static __device__ __forceinline__ void clear(float (&all)[N][NT][4]) {
#pragma unroll
        for (int r = 0; r < N; ++r)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) all[r][n][i] = 0;
    }

    // Step i of the unit's products, columns of two pairs of every lane, for either half of the rows.
    template <int I>
    static __device__ __forceinline__ void multiply(float (&part)[2][NT][4], const uint32_t (&code)[2][2], const uint32_t (&b)[NT][S::PAIRS]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t a[4] = {pair_of<BITS, BF16, 2 * I>(code[r][0]), pair_of<BITS, BF16, 2 * I>(code[r][1]),
                                   pair_of<BITS, BF16, 2 * I + 1>(code[r][0]), pair_of<BITS, BF16, 2 * I + 1>(code[r][1])};
#pragma unroll
            for (int n = 0; n < NT; ++n) mma<BF16>(part[r][n], a, b[n][2 * I], b[n][2 * I + 1]);
        }
    }

    // Add the products of one step. `PER`: units of a span, over which the scales are the same. `x`: this lane's activations
    // of the step, by 8 slots; `prepared`: the sums of its spans.
    template <int PER>
    __device__ __forceinline__ void step(const unsigned char* stage, const unsigned char* const (&x)[NT], const unsigned char* prepared, int g, int t) {
        const unsigned char* words = stage + g * S::STRIDE;
        const Pair* scales = Pipeline<BITS, BF16, NT>::scales_of(const_cast<unsigned char*>(stage)) + g;
        constexpr int AT_ONCE = PER < 4 ? PER : 4; // units whose loads may come early; more do not fit the registers
#pragma unroll 1
        for (int span = 0; span < S::UNITS / PER; ++span) {
            float part[2][NT][4], all[NT][2];
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                const Four four = *reinterpret_cast<const Four*>(prepared + (span * NT + n) * SUMS_BYTES + 16 * t);
                all[n][0] = four.at[0], all[n][1] = four.at[1];
#pragma unroll
                for (int r = 0; r < 2; ++r)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        part[r][n][i] = four.at[2 + i % 2];
            }
#pragma unroll AT_ONCE
            for (int v = 0; v < PER; ++v) {
                const int u = span * PER + v;
                uint32_t b[NT][S::PAIRS], code[2][2];
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int i = 0; i < S::PAIRS / 4; ++i) {
                        const Words w = reinterpret_cast<const Words*>(x[n] + u * 2 * S::UNIT)[i];
#pragma unroll
                        for (int j = 0; j < 4; ++j) b[n][4 * i + j] = w.at[j];
                    }
#pragma unroll
                for (int r = 0; r < 4; ++r) code[r / 2][r % 2] = codes_of<BITS>(words + 8 * r * S::STRIDE + u * S::UNIT_BYTES, t);
                multiply<0>(part, code, b);
                multiply<1>(part, code, b);
                if constexpr (S::PAIRS == 8) {
                    multiply<2>(part, code, b);
                    multiply<3>(part, code, b);
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const Pair low = scales[span * LANES + 16 * r], high = scales[span * LANES + 16 * r + 8];
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const Pair s = i < 2 ? low : high;
                        total[r][n][i] = fmaf(s.x, part[r][n][i], total[r][n][i]);
                        total[r][n][i] = fmaf(s.y, all[n][i % 2], total[r][n][i]);
                    }
            }
        }
    }
};

} // namespace llmcompress::skinny
