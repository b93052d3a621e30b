// A block's activations in shared memory, in the forms that its products take.
#pragma once

#include "shape.cuh"

namespace llmcompress::gpu {

template <class S> struct Activations {
    const TreeCall& call;
    unsigned char* memory;
    int warp, lane, first, groups; // groups of the slab from `first` on

    __device__ Activations(const TreeCall& c, unsigned char* m) : call(c), memory(m) {
        warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
        first = int(blockIdx.y) * SLAB;
        groups = call.groups - first < SLAB ? call.groups - first : SLAB;
    }

    __device__ __forceinline__ unsigned char* record(int token, int group) const {
        return memory + S::RECORDS + (token * SLAB + group) * RECORD;
    }
    __device__ __forceinline__ unsigned char* wide(int bits) const { return memory + S::wide(call.tokens, call.forms, bits); }
    __device__ __forceinline__ float* sums(int bits, int group) const { return reinterpret_cast<float*>(wide(bits) + group * S::SUMS); }
    __device__ __forceinline__ Words* operands(int bits, int group) const {
        return reinterpret_cast<Words*>(wide(bits) + SLAB * S::SUMS + group * S::OPERANDS);
    }

    // The numbers of 32 columns, as 16 pairs of neighbours, in the pairs of a width.
    template <int BITS> static __device__ __forceinline__ void order(const uint32_t (&x)[16], Words* to) {
        constexpr int PAIRS = 16 / BITS; // of a word
        uint32_t found[16];
#pragma unroll
        for (int q = 0; q < 16; ++q) {
            const int column = q / PAIRS * 2 * PAIRS + q % PAIRS;
            found[q] = permute(x[column / 2], x[(column + PAIRS) / 2], column % 2 ? 0x7632 : 0x5410);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) to[32 * i] = {found[4 * i], found[4 * i + 1], found[4 * i + 2], found[4 * i + 3]};
    }

    // What products of a width take, if any: the numbers, and what the sums of a group begin with.
    template <int BITS> __device__ __forceinline__ void give(const uint32_t (&x)[16], int token, int group, int t, float sum) const {
        if (!(call.forms & BITS)) return;
        order<BITS>(x, operands(BITS, group) + token / TILE * 128 + token % TILE * 4 + t);
        if (t == 0) sums(BITS, group)[token] = -offset_of<BITS>() * sum;
    }

    // Word i holds numbers i and 16 + i of 16 bits; afterwards word i holds bit i of all 32.
    template <int BY> static __device__ __forceinline__ void exchange(uint32_t (&v)[16]) {
        constexpr uint32_t LOW = (BY == 8 ? 0xFFu : BY == 4 ? 0x0F0Fu : BY == 2 ? 0x3333u : 0x5555u) * 0x10001u;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            if (i & BY) continue;
            const uint32_t a = v[i], b = v[i + BY];
            v[i] = (a & LOW) | (b << BY & ~LOW);
            v[i + BY] = (a >> BY & LOW) | (b & ~LOW);
        }
        if constexpr (BY > 1) exchange<BY / 2>(v);
    }

    // A quarter of a group as bits of fixed-point numbers: what is largest in the group takes all 15 bits beside the sign.
    __device__ __forceinline__ void fix(const uint32_t (&x)[16], int token, int group, int t) const {
        uint32_t most = 0;
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const uint32_t size = bits_of(widen<S::BF16>(uint16_t(x[i / 2] >> 16 * (i % 2)))) & 0x7FFFFFFFu;
            most = size > most ? size : most;
        }
#pragma unroll
        for (int with = 1; with < 4; with *= 2) {
            const uint32_t other = bits_of(swap(float_of(most), with));
            most = other > most ? other : most;
        }
        uint32_t power = most >> 23;
        const bool finite = power < 255;
        power = power < 15 ? 15 : power;
        const float up = float_of((268 - power) << 23), down = finite ? float_of((power - 14) << 23) : float_of(0x7FC00000u);
        uint32_t bits[16], sum = 0;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            // the sum's last place is worth 1
            uint32_t fixed[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                fixed[h] = bits_of(fused(widen<S::BF16>(uint16_t(x[i / 2 + 8 * h] >> 16 * (i % 2))), up, 12582912.0f));
                sum += fixed[h];
            }
            bits[i] = permute(fixed[0], fixed[1], 0x5410);
        }
        int total = int(sum - 32u * 0x4B400000u);
#pragma unroll
        for (int with = 1; with < 4; with *= 2) total += int(bits_of(swap(float_of(uint32_t(total)), with)));
        exchange<8>(bits);
        unsigned char* to = record(token, group);
        // column c of the first matrix is bit 4 (c / 2) + c % 2, of the second one two more
#pragma unroll
        for (int i = 0; i < 8; ++i)
            reinterpret_cast<Pair*>(to)[4 * i + t] = {bits[i / 2 * 4 + i % 2], bits[i / 2 * 4 + i % 2 + 2]};
        // a count is a whole number above or below 1.5 2^23; half of all activations is the middle of the grid
        reinterpret_cast<Two*>(to + 256)[t] = {down, -(12582912.0f + (t == 0 ? float(total >> 1) : 0.0f)) * down};
    }

    __device__ __forceinline__ void prepare() const {
        const int group = lane / 4, t = lane % 4;
        for (int token = warp; token < S::NT * TILE; token += S::WARPS) {
            uint32_t x[16] = {};
            if (token < call.tokens && group < groups) {
                const auto* from = reinterpret_cast<const Words*>(static_cast<const uint16_t*>(call.x) + int64_t(token) * call.columns +
                                                                  (first + group) * GROUP + t * 32);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const Words words = from[j];
#pragma unroll
                    for (int k = 0; k < 4; ++k) x[4 * j + k] = words.at[k];
                }
            }
            if (call.forms & 7) {
                float sum = 0;
#pragma unroll
                for (int i = 0; i < 32; ++i) sum += widen<S::BF16>(uint16_t(x[i / 2] >> 16 * (i % 2)));
                sum += swap(sum, 1);
                sum += swap(sum, 2);
                give<1>(x, token, group, t, sum);
                give<2>(x, token, group, t, sum);
                give<4>(x, token, group, t, sum);
            }
            if (call.forms & COUNTS && token < call.tokens) fix(x, token, group, t);
        }
    }
};

} // namespace llmcompress::gpu
