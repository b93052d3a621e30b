// What a step of codes gives: counts of bits for codes of 1 bit, products of numbers for 2 and 4.
#pragma once

#include "activations.cuh"

namespace llmcompress::gpu {

template <class S> struct Sums {
    const Activations<S>& x;
    int lane, g, t; // g: row of a fragment, t: place in its four lanes
    float place;    // what the lowest of this lane's four bits of an activation is worth
    int top;        // and the highest, in the lowest
    int matrices;   // where a lane's row of four matrices of codes of 1 bit lies
    unsigned char* ring; // of this warp
    SharedAddress base;
    // [16 rows][8 tokens]: rows g, g, g + 8, g + 8 and tokens 2 t, 2 t + 1, 2 t, 2 t + 1
    float total[S::MT][S::NT][4] = {};

    __device__ Sums(const Activations<S>& a, SharedAddress b) : x(a), base(b) {
        ring = a.memory + a.warp * S::RING;
        lane = a.lane, g = lane / 4, t = lane % 4;
        place = float(1 << 4 * t), top = t == 3 ? -8 : 8;
        matrices = lane % 16 * STEP_BYTES + (lane / 16 ^ turned(lane % 8)) * 16;
    }

    // A token's activation of 16 bits is 16 columns of a product of bits, so one leaf's token fills two of them. A lane has four
    // neighbouring bits' counts of two rows; their sum becomes a float without a conversion.
    __device__ __forceinline__ void pair(SharedAddress codes, int number, const unsigned char* records, const uint32_t (&scale)[S::MT][2],
                                         float (&sum)[S::MT][2]) const {
        Words a[S::MT];
#pragma unroll
        for (int m = 0; m < S::MT; ++m) a[m] = load_matrices(codes + m * 16 * STEP_BYTES + (matrices ^ 32 * number));
#pragma unroll
        for (int u = 0; u < 2; ++u) {
            const unsigned char* record = records + (2 * number + u) * RECORD;
            const Pair b = reinterpret_cast<const Pair*>(record)[lane];
            const Two worth = reinterpret_cast<const Two*>(record + 256)[t];
#pragma unroll
            for (int m = 0; m < S::MT; ++m) {
                int low[4], high[4];
                count_common(low, a[m].at[2 * u], a[m].at[2 * u + 1], b.x);
                count_common(high, a[m].at[2 * u], a[m].at[2 * u + 1], b.y);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int counts = high[2 * r + 1] * top + 0x4B400000 + low[2 * r] + 2 * low[2 * r + 1] + 4 * high[2 * r];
                    const float value = fused(float_of(uint32_t(counts)), worth.x, worth.y);
                    sum[m][r] = fused(widen<false>(uint16_t(scale[m][r] >> 16 * u)), value, sum[m][r]);
                }
            }
        }
    }

    __device__ __forceinline__ void count(int stage, const unsigned char* scales, const TreeNode& node) {
        const SharedAddress codes = base + stage * S::CODES;
#pragma unroll 1
        for (int token = node.low; token < node.high; ++token) {
            float sum[S::MT][2] = {};
            const unsigned char* records = x.record(token, 0);
            if (x.groups == SLAB) {
#pragma unroll
                for (int h = 0; h < SLAB; h += 4) {
                    in_order(); // loads of all groups at once would take too many registers
                    Pair scale[S::MT][2];
#pragma unroll
                    for (int m = 0; m < S::MT; ++m)
#pragma unroll
                        for (int r = 0; r < 2; ++r) scale[m][r] = *reinterpret_cast<const Pair*>(scales + (16 * m + 8 * r) * 16 + 2 * h);
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        uint32_t both[S::MT][2];
#pragma unroll
                        for (int m = 0; m < S::MT; ++m)
#pragma unroll
                            for (int r = 0; r < 2; ++r) both[m][r] = i == 0 ? scale[m][r].x : scale[m][r].y;
                        pair(codes, h / 2 + i, records, both, sum);
                    }
                }
            } else {
#pragma unroll 1
                for (int i = 0; i < x.groups / 2; ++i) {
                    uint32_t both[S::MT][2];
#pragma unroll
                    for (int m = 0; m < S::MT; ++m)
#pragma unroll
                        for (int r = 0; r < 2; ++r) both[m][r] = *reinterpret_cast<const uint32_t*>(scales + (16 * m + 8 * r) * 16 + 4 * i);
                    pair(codes, i, records, both, sum);
                }
            }
            const float times = node.multiplier * place;
#pragma unroll
            for (int m = 0; m < S::MT; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float all = sum[m][r] * times;
                    all += swap(all, 1);
                    all += swap(all, 2);
#pragma unroll
                    for (int n = 0; n < S::NT; ++n)
#pragma unroll
                        for (int i = 0; i < 2; ++i)
                            if (token == n * TILE + 2 * t + i) total[m][n][2 * r + i] += all;
                }
        }
    }

    // The words of a lane's columns in one row of a group.
    template <int BITS> __device__ __forceinline__ void codes(const unsigned char* stage, int row, int group, uint32_t (&to)[BITS]) const {
        const int piece = BITS == 1 ? group : BITS == 2 ? 2 * group + t / 2 : 4 * group + t;
        const int skip = BITS == 1 ? 4 * t : BITS == 2 ? t % 2 * 8 : 0;
        const unsigned char* from = stage + row * STEP_BYTES + (piece ^ turned(row)) * 16 + skip;
        if constexpr (BITS == 1) {
            to[0] = *reinterpret_cast<const uint32_t*>(from);
        } else if constexpr (BITS == 2) {
            const Pair both = *reinterpret_cast<const Pair*>(from);
            to[0] = both.x, to[1] = both.y;
        } else {
            const Words words = *reinterpret_cast<const Words*>(from);
            to[0] = words.at[0], to[1] = words.at[1], to[2] = words.at[2], to[3] = words.at[3];
        }
    }

    template <int BITS> __device__ __forceinline__ void load(uint32_t (&b)[16], int group, int n) const {
        const Words* from = x.operands(BITS, group) + n * 128 + lane;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Words words = from[32 * i];
#pragma unroll
            for (int k = 0; k < 4; ++k) b[4 * i + k] = words.at[k];
        }
    }

    template <int BITS, int Q>
    static __device__ __forceinline__ void products(float (&part)[S::MT][4], const uint32_t (&code)[2 * S::MT][BITS], const uint32_t (&b)[16], const Two& begin) {
        constexpr int PAIRS = 16 / BITS, LOW = 2 * Q % PAIRS, WORD = 2 * Q / PAIRS;
        constexpr int HIGH = (2 * Q + 1) % PAIRS, NEXT = (2 * Q + 1) / PAIRS;
#pragma unroll
        for (int m = 0; m < S::MT; ++m) {
            const uint32_t a[4] = {pair_of<S, BITS, LOW>(code[2 * m][WORD]), pair_of<S, BITS, LOW>(code[2 * m + 1][WORD]),
                                   pair_of<S, BITS, HIGH>(code[2 * m][NEXT]), pair_of<S, BITS, HIGH>(code[2 * m + 1][NEXT])};
            const float start[4] = {begin.x, begin.y, begin.x, begin.y};
            if constexpr (Q == 0) mma<S::BF16>(part[m], a, b[2 * Q], b[2 * Q + 1], start);
            else mma<S::BF16>(part[m], a, b[2 * Q], b[2 * Q + 1], part[m]);
        }
        if constexpr (Q < 7) products<BITS, Q + 1>(part, code, b, begin);
    }

    // Group `in` of a step whose first is `group`.
    template <int BITS> __device__ __forceinline__ void multiply(const unsigned char* stage, const unsigned char* scales, int group, int in, const TreeNode& node) {
        uint32_t code[2 * S::MT][BITS];
        float scale[2 * S::MT];
#pragma unroll
        for (int r = 0; r < 2 * S::MT; ++r) {
            codes<BITS>(stage, g + 8 * r, in, code[r]);
            scale[r] = node.multiplier * widen<false>(*reinterpret_cast<const uint16_t*>(scales + 8 * r * 16 + 2 * (group + in)));
        }
#pragma unroll
        for (int n = 0; n < S::NT; ++n) {
            if (S::NT > 1 && (node.high <= n * TILE || node.low >= (n + 1) * TILE)) continue;
            uint32_t b[16];
            float part[S::MT][4];
            load<BITS>(b, group + in, n);
            products<BITS, 0>(part, code, b, *reinterpret_cast<const Two*>(x.sums(BITS, group + in) + n * TILE + 2 * t));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = n * TILE + 2 * t + i % 2;
                if (token < node.low || token >= node.high) continue;
#pragma unroll
                for (int m = 0; m < S::MT; ++m) total[m][n][i] = fused(scale[2 * m + i / 2], part[m][i], total[m][n][i]);
            }
        }
    }

    // All groups of a step.
    template <int BITS> __device__ __forceinline__ void several(const unsigned char* codes, const unsigned char* scales, int group, const TreeNode& node) {
        const int left = x.groups - group;
#pragma unroll 1
        for (int in = 0; in < SLAB / BITS && in < left; ++in) multiply<BITS>(codes, scales, group, in, node);
    }

    // Step `part` of a node; where its codes and its scales lie.
    __device__ __forceinline__ void step(int stage, int place, const TreeNode& node, int part) {
        const unsigned char* scales = ring + S::STAGES * S::CODES + place * S::SCALES + 16 * g;
        if (node.counts()) return count(stage, scales, node);
        const unsigned char* codes = ring + stage * S::CODES;
        if (node.bits == 4) return several<4>(codes, scales, 2 * part, node);
        if (node.bits == 2) return several<2>(codes, scales, 4 * part, node);
        several<1>(codes, scales, 0, node);
    }
};

} // namespace llmcompress::gpu
