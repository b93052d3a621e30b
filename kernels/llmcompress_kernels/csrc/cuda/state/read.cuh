// A token within a replay window that rounds nothing: the state is read where it lies, and the token put into the window.
//
//   y = D channel Σ_n code step C  +  Σ_j E_j drive_j (B_j·C),     D, E_j: products of the decays since
//
// What that takes is moving the codes, so a warp has a whole head, asks for everything at once and holds it in registers.
// The first sum is a product of matrices: a code is a subnormal fp16 number where it stands, code + 8 over 2^24, or 16
// times that, so two of them take one LOP3. What they are multiplied by, step C in whatever unit brings the largest to
// 2^14, comes in two fp16 parts, which are columns of one product; 16 times too much is taken back there. Sums and products
// are fp32 within the tensor cores. PTX promises nothing about subnormal operands; the tensor cores since Volta take them as
// they are (Fasi et al. 2021, Numerical behavior of NVIDIA tensor cores), and the GPU tests would show one that does not.
// (B_j·C) is the same for all heads of a group, so the warps of a block share them.
#pragma once

#include "call.h"
#include "window.cuh"

namespace llmcompress::gpu {

// EARLY: scales and decays are asked for with the codes, and the block says at once that it has read the count; else each is
// waited for where it is needed, one after the other, and the block counts itself once its results are written.
template <int N_, int WARPS_, int BLOCKS_, bool EARLY_ = false> struct ReadShape {
    static constexpr int P = 64, N = N_, WARPS = WARPS_, THREADS = 32 * WARPS, BLOCKS = BLOCKS_; // of a multiprocessor
    static constexpr bool EARLY = EARLY_;
    static constexpr int WORDS = N / 32, ROW = N / 2;     // words of a row that a lane has; bytes of a row
    static constexpr int FACTORS = 16 * WORDS + 16;       // bytes of a lane's factors, shifted by four banks
    static constexpr int TOKENS = MOST_ROWS + 1;
    // shared memory: of the block, then of each warp: drives of the tokens, their shares, factors in two parts
    static constexpr int DOTS = 0, OWN = 4 * TOKENS;
    static constexpr int SHARES = 0, SPLIT = SHARES + 4 * TOKENS, X = SPLIT + 8 * FACTORS;
    static __host__ __device__ constexpr int bytes_of_warp(int tokens) { return X + 4 * P * tokens; }
    static __host__ __device__ constexpr int bytes(int tokens) { return OWN + WARPS * bytes_of_warp(tokens); }
    static_assert(N == 64 || N == 128, "");
};

// Up to 16 bytes of codes.
template <int WORDS> struct alignas(4 * WORDS) Codes { uint32_t at[WORDS]; };

template <class S> struct Reader {
    const ReplayCall& call;
    int sequence, group, place, head, unit, shared, filled; // place: in the group
    int warp, lane, g, q;                                   // pair of rows of 8, and quarter of a row
    unsigned char *block, *own;
    float* rows; // of the window, and where this head is in each
    RecentRow at;
    Codes<S::WORDS> codes[8]; // rows 16 t + 2 g and the next one, t = 0 .. 3
    float c[4];               // of columns n, n + 1, n + 4, n + 5
    int n;
    uint32_t pairs[2], channels; // state scales of these columns, channel scales of two rows
    float faded;                 // decay of a token

    __device__ Reader(const ReplayCall& given, unsigned char* memory) : call(given), block(memory) {
        const int thread = int(threadIdx.x), part = int(blockIdx.x);
        warp = thread / 32, lane = thread % 32, g = lane / 4, q = lane % 4;
        sequence = int(blockIdx.y), group = 0, place = part * S::WARPS + warp;
        if (call.groups > 1) {
            const int parts = (call.share + S::WARPS - 1) / S::WARPS;
            group = part / parts, place = part % parts * S::WARPS + warp;
        }
        filled = call.count[sequence];
        head = group * call.share + place;
        unit = sequence * call.heads + head, shared = sequence * call.groups + group;
        rows = recent_rows(call, sequence), at = RecentRow::of<S::P, S::N>(call, head, group);
        own = memory + S::OWN + warp * S::bytes_of_warp(call.rows);
        // half a run of eight codes; with 64 columns half of the lanes have what the others have
        n = lane % (S::N / 4) / 2 * 8 + lane % 2 * 2;
    }

    // The last warps of a group may have none.
    __device__ __forceinline__ bool has_head() const { return place < call.share; }

    __device__ __forceinline__ float* shares() const { return reinterpret_cast<float*>(own + S::SHARES); }
    __device__ __forceinline__ float* dots() const { return reinterpret_cast<float*>(block + S::DOTS); }
    __device__ __forceinline__ float* x(int token) const { return reinterpret_cast<float*>(own + S::X) + token * S::P; }

    static __device__ __forceinline__ void four(float* to, const float* from) {
        const Two low = *reinterpret_cast<const Two*>(from), high = *reinterpret_cast<const Two*>(from + 4);
        to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
    }

    // Ask for the codes and for the drives of all tokens, this one last.
    __device__ __forceinline__ void fetch() {
        if (has_head()) {
            const auto* from = call.codes + (int64_t(unit) * S::P + 2 * g) * S::ROW + 4 * S::WORDS * q;
#pragma unroll
            for (int i = 0; i < 8; ++i) codes[i] = *reinterpret_cast<const Codes<S::WORDS>*>(from + (i / 2 * 16 + i % 2) * S::ROW);
            constexpr int LANES = S::P / 4; // of a token
            const int piece = 4 * (lane % LANES), step = 32 / LANES;
            const float* from_row = rows + lane / LANES * call.width + at.x + piece;
            float* to = x(lane / LANES) + piece;
#pragma unroll 2
            for (int token = lane / LANES; token < filled; token += step) {
                copy_async(to, from_row);
                to += step * S::P, from_row += step * call.width;
            }
            if (lane < LANES) copy_async(x(filled) + piece, call.drive + int64_t(unit) * S::P + piece);
            if constexpr (S::EARLY) ask_scales(), ask_decay();
        }
        commit();
        four(c, call.c + int64_t(shared) * S::N + n);
    }

    // Rows whose results this lane writes: this one and the next.
    __device__ __forceinline__ int row() const { return 16 * q + 2 * g; }

    __device__ __forceinline__ void ask_scales() {
        const auto* scale = reinterpret_cast<const uint32_t*>(call.scale + int64_t(unit) * S::N + n);
        pairs[0] = scale[0], pairs[1] = scale[2];
        const uint16_t* channel = call.fixed ? call.fixed + head * S::P : call.channel + int64_t(unit) * S::P;
        channels = *reinterpret_cast<const uint32_t*>(channel + row());
    }

    __device__ __forceinline__ void ask_decay() {
        const int token = lane % S::TOKENS;
        faded = 1;
        if (token <= filled) faded = token < filled ? rows[token * call.width + at.decay] : call.decay[unit];
    }

    // B·C of every token, which the warps share out.
    __device__ __forceinline__ void multiply_groups() const {
#pragma unroll 1
        for (int token = warp; token <= filled; token += S::WARPS) {
            float b[4], sum = 0;
            four(b, (token < filled ? rows + token * call.width + at.b : call.b + int64_t(shared) * S::N) + n);
#pragma unroll
            for (int k = 0; k < 4; ++k) sum = fused(b[k], c[k], sum);
            dots()[token] = over_lanes(sum);
        }
    }

    // A sum over the lanes that have different columns.
    static __device__ __forceinline__ float over_lanes(float v) {
#pragma unroll
        for (int bit = S::N / 8; bit > 0; bit /= 2) v = add(v, swap(v, bit));
        return v;
    }

    // What tokens are multiplied by; returns what the stored state is: all decays.
    __device__ __forceinline__ float decays() const {
        const int token = lane % S::TOKENS;
        float all = faded, behind = 1;
#pragma unroll
        for (int bit = 1; bit < S::TOKENS; bit *= 2) {
            const float other = swap(all, bit);
            if ((token & bit) == 0) behind = multiply(behind, other);
            all = multiply(all, other);
        }
        if (lane <= filled) shares()[lane] = multiply(behind, dots()[lane]);
        return all;
    }

    // step C in fp16 parts for the lanes; `offset` is what codes without a sign add to a row, and the unit is returned.
    __device__ __forceinline__ float split(float& offset) const {
        float w[4], sum = 0;
        uint32_t most = 0;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const float step = multiply(widen<false>(uint16_t(pairs[k / 2] >> 16 * (k % 2))), 1.0f / 7);
            w[k] = multiply(step, c[k]);
            const uint32_t size = bits_of(size_of(w[k]));
            most = size > most ? size : most;
        }
        const uint32_t exponent = largest(most) >> 23, used = exponent < 20 ? 20 : exponent > 254 ? 254 : exponent;
        const float factor = float_of((268 - used) << 23);
        uint16_t part[2][4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            w[k] = multiply(w[k], factor);
            sum = add(sum, w[k]);
            // nibbles in the odd places of a byte count 16
            const float v = k % 2 ? multiply(w[k], 1.0f / 16) : w[k];
            part[0][k] = narrow<false>(v);
            part[1][k] = narrow<false>(add(v, -widen<false>(part[0][k])));
        }
        offset = multiply(over_lanes(sum), 8 * 0x1p-24f);
        const int word = n / 8, half = n / 2 % 2;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            auto* to = reinterpret_cast<uint32_t*>(own + S::SPLIT + (4 * i + word / S::WORDS) * S::FACTORS) + word % S::WORDS * 4 + half * 2;
            // codes k and k + 4 of a run are one register
            to[0] = uint32_t(part[i][2]) << 16 | part[i][0], to[1] = uint32_t(part[i][3]) << 16 | part[i][1];
        }
        return float_of((used - 14) << 23);
    }

    // code step C of rows 16 q + 2 g and the next one, in that unit and with the offset.
    __device__ __forceinline__ Two products() {
        float sums[4][4] = {};
        const auto* factors = reinterpret_cast<const Words*>(own + S::SPLIT + (4 * (g % 2) + q) * S::FACTORS);
#pragma unroll
        for (int i = 0; i < S::WORDS; ++i) {
            const Words b = factors[i];
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int t = 0; t < 4; ++t) {
                    const uint32_t one = codes[2 * t].at[i] >> 8 * half, two = codes[2 * t + 1].at[i] >> 8 * half;
                    const uint32_t a[4] = {
                        mask_turn(one, 0x000F000Fu, 0x00080008u), mask_turn(two, 0x000F000Fu, 0x00080008u),
                        mask_turn(one, 0x00F000F0u, 0x00800080u), mask_turn(two, 0x00F000F0u, 0x00800080u)};
                    mma<false>(sums[t], a, b.at[2 * half], b.at[2 * half + 1], sums[t]);
                }
        }
        const auto both = [&](int t) -> Two { return {add(sums[t][0], sums[t][1]), add(sums[t][2], sums[t][3])}; };
        const Two first = both(0), second = both(1), third = both(2), last = both(3);
        const bool upper = q / 2 != 0, odd = q % 2 != 0;
        return {upper ? (odd ? last.x : third.x) : (odd ? second.x : first.x), upper ? (odd ? last.y : third.y) : (odd ? second.y : first.y)};
    }

    // The token into the window, whose row no other warp reads.
    __device__ __forceinline__ void keep(Two own_x) const {
        // computed anew, so that it takes no registers until here
        const RecentRow to = RecentRow::of<S::P, S::N>(call, anew(head), group);
        float* row = recent_rows(call, anew(sequence)) + filled * call.width;
        *reinterpret_cast<Two*>(row + to.x + 16 * q + 2 * g) = own_x;
        if constexpr (S::EARLY) {
            if (lane == filled) row[to.decay] = faded;
        } else {
            if (lane == 0) row[to.decay] = call.decay[unit];
        }
        if (place > 0) return;
#pragma unroll
        for (int i = 0; i < S::N; i += 32) row[to.b + i + lane] = call.b[int64_t(shared) * S::N + i + lane];
    }

    __device__ __forceinline__ void read_out() {
        const int r = row();
        if constexpr (!S::EARLY) ask_scales(), ask_decay();
        const float channel[2] = {widen<false>(uint16_t(channels)), widen<false>(uint16_t(channels >> 16))};
        const float all = decays();
        float offset;
        const float unit_of_sums = split(offset);
        wait<0>();
        sync_warp(); // factors, shares and drives are there
        Two held = products(), y{}, token{};
        for (int j = 0; j <= filled; ++j) {
            token = *reinterpret_cast<const Two*>(x(j) + r);
            const float share = shares()[j];
            y = {fused(token.x, share, y.x), fused(token.y, share, y.y)};
        }
        held = {multiply(multiply(add(held.x, -offset), 0x1p24f), unit_of_sums), multiply(multiply(add(held.y, -offset), 0x1p24f), unit_of_sums)};
        y = {fused(multiply(held.x, channel[0]), all, y.x), fused(multiply(held.y, channel[1]), all, y.y)};
        *reinterpret_cast<Two*>(call.out + int64_t(unit) * S::P + r) = y;
        keep(token);
    }
};

// Grid: for every group as many blocks as its heads need, and sequences. Also advances the windows of all sequences.
template <class S> __global__ void __launch_bounds__(S::THREADS, S::BLOCKS) read_kernel(const __grid_constant__ ReplayCall call) {
    Reader<S> reader(call, shared_memory());
    const bool reads = reader.filled < call.rows;
    if (reads) {
        reader.fetch();
        reader.multiply_groups();
    }
    sync(); // all of the block know how full the window is, and the products of groups are there
    const bool counts = threadIdx.x == 0;
    int before = 0;
    // nothing but counts is read by other blocks than write it, so that no result has to wait for the others'
    if (S::EARLY && counts) before = count_up(call.arrived + reader.sequence);
    if (reads && reader.has_head()) reader.read_out();
    if (!counts) return;
    if constexpr (!S::EARLY) {
        fence();
        before = count_up(call.arrived + reader.sequence);
    }
    if (before < int(gridDim.x) - 1) return;
    // the rounding launch in front has to have read the count; nothing else of what it writes is of this launch's sequences
    previous_launch();
    call.arrived[reader.sequence] = 0;
    call.count[reader.sequence] = reads ? reader.filled + 1 : 0;
}

} // namespace llmcompress::gpu
