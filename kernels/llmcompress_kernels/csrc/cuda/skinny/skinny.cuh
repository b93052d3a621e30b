// Products of a few tokens with 2-, 3- and 4-bit weights in the stored order, dense and routed: y = W x.
//
// What limits them is reading W, so everything else has to fit beside that. At 3 TB/s an H100 issues 2.8 instructions
// of a thread per 2-bit weight, 4.0 per 3-bit and 5.3 per 4-bit weight; cuda/aot.py counts what the machine code needs.
//
// A block of 4 warps owns 128 rows and walks the columns in steps of 512 (4 bits: 256). cp.async brings a step's words
// and activations into shared memory two steps ahead (3 bits: one). A warp multiplies 2 x 16 rows by mma.m16n8k16: weights are
// the left operand, tokens the 8 columns of the right one. The order of the columns inside a dot product is free as long
// as both operands agree, so a lane owns the 8 (2 bits: 16) neighbouring columns that the word it reads holds, and the
// stored stream needs no second layout. Two codes of a word that lie 16 bits apart become two numbers by a shift and
// one LOP3: a code at the top of the mantissa under the exponent of 2^b is the number 2^b + code, exactly. The
// activations are brought into the same pairs by byte permutations, shared by the warp's 32 rows.
//
// Scales and zero points act on the fp32 sums of a group: scale (part - (2^b + zero) sum(x)), where the tensor core
// also delivers sum(x), as the product with a matrix of ones.
//
// Columns may be split over blocks. The last block to arrive at a tile adds the parts in a fixed order, so results do
// not depend on scheduling, and no second launch is needed. For experts, a block finds its expert's slots itself: gate,
// up and activation are one launch, down projection and the weighted sum over slots another.
#pragma once

#include "call.h"

namespace llmcompress::skinny {

constexpr int THREADS = 128, ROWS = 128, TILE = 8;
constexpr int CHANNELS = ROWS / 2;  // GATE_UP: half the rows are gates
constexpr int MOST_SLOTS = 1024;    // that a call may route

template <int BITS> struct Shape {
    static constexpr int COLUMNS = BITS == 4 ? 256 : 512;  // of a step: 128 or 192 bytes of a row
    static constexpr int PAIRS = BITS == 2 ? 8 : 4;        // pairs of codes that a lane takes at once
    static constexpr int UNIT = 8 * PAIRS;                 // columns that four lanes take at once
    static constexpr int UNITS = COLUMNS / UNIT;
    static constexpr int UNIT_BYTES = UNIT * BITS / 8;
    static constexpr int ROW_BYTES = COLUMNS * BITS / 8;
    static constexpr int STRIDE = ROW_BYTES + 16;          // 8 rows x 4 lanes then meet 32 different banks
    static constexpr int X_STRIDE = 2 * COLUMNS + (BITS == 2 ? 16 : 64);
    static constexpr int STAGES = BITS == 3 ? 2 : 3;        // so that two blocks share a multiprocessor at 8 tokens
    static constexpr int GROUPS = 8;                       // most groups of a step
};

// Groups of a step of `columns` whose scales differ.
__host__ __device__ inline int groups_per_step(int columns, int group) { return group >= columns ? 1 : columns / group; }

// Shared memory: addresses of rows, slots, [stages] words, two sets of scales, [stages] activations.
template <int BITS, int NT> struct Memory {
    using S = Shape<BITS>;
    static constexpr int ROW = 0;
    static constexpr int X_ROW = ROW + 8 * ROWS;
    static constexpr int LIST = X_ROW + 8 * NT * TILE;
    static constexpr int COUNT = LIST + 2 * MOST_SLOTS;
    static constexpr int WORDS = COUNT + 16;
    static constexpr int SCALES = WORDS + S::STAGES * ROWS * S::STRIDE;
    __host__ __device__ static constexpr int x(int groups) { return SCALES + 2 * groups * ROWS * 8; }
    __host__ __device__ static constexpr int bytes(int groups, int at_once) { return x(groups) + S::STAGES * at_once * S::X_STRIDE; }
};

// Number i of the pairs of a lane's codes, as two numbers 2^b + code in a 16-bit type.
template <int BITS, bool BF16, int I> __device__ __forceinline__ uint32_t pair_of(uint32_t v) {
    constexpr int MANTISSA = BF16 ? 7 : 10, BIAS = BF16 ? 127 : 15, TOP = MANTISSA - BITS, BY = TOP - BITS * I;
    constexpr uint32_t ONE = ((1u << BITS) - 1) << TOP, EXPONENT = uint32_t(BIAS + BITS) << MANTISSA;
    const uint32_t moved = BY >= 0 ? v << (BY >= 0 ? BY : 0) : v >> (BY < 0 ? -BY : 0);
    return mask_set(moved, ONE * 0x10001u, EXPONENT * 0x10001u);
}

// The codes of a lane, two in every bit position of the halves of a word. `row` points at the unit's first word.
template <int BITS> __device__ __forceinline__ uint32_t codes_of(const unsigned char* row, int t) {
    const auto* words = reinterpret_cast<const uint32_t*>(row);
    if constexpr (BITS == 3) {
        // 8 codes are 24 bits, which begin at 0, 24, 16 and 8 of words 0, 0, 1 and 2
        const int bit = 24 * t, at = bit >> 5;
        const uint32_t v = funnel(words[at], words[at < 2 ? at + 1 : 2], bit & 31);
        return (v & 0xFFFu) | ((v << 4) & ~0xFFFu); // codes 4 to 7 into the upper half; bits above them stay
    } else {
        return words[t];
    }
}

template <int BITS, int NT> struct Block {
    using S = Shape<BITS>;
    using M = Memory<BITS, NT>;
    const Call& call;
    unsigned char* memory;
    int thread, warp, g, t; // g: row of a fragment, t: place in its four lanes
    int tile, expert, split;
    int64_t first_row; // of the expert, in the bank
    int stage_groups;
    unsigned char* xs; // [stages][tokens at once] activations
    const uint16_t* scale_row; // of this thread's row
    const uint32_t* zero_row;

    __device__ Block(const Call& c, unsigned char* m) : call(c), memory(m) {
        thread = threadIdx.x, warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
        tile = blockIdx.x, expert = blockIdx.y, split = blockIdx.z;
        first_row = int64_t(expert) * (call.mode == GATE_UP ? 2 : 1) * call.rows;
        stage_groups = groups_per_step(S::COLUMNS, call.group);
        xs = memory + M::x(stage_groups);
        const int64_t row = weight_row(thread);
        scale_row = call.scale + row * call.groups;
        zero_row = call.zero + row * call.zero_words;
    }

    template <typename T> __device__ T* at(int offset) { return reinterpret_cast<T*>(memory + offset); }

    // Weight row of row `j` of the block; beyond the matrix the last one, whose results are dropped.
    __device__ int64_t weight_row(int j) const {
        if (call.mode != GATE_UP) {
            const int row = tile * ROWS + j;
            return first_row + (row < call.rows ? row : call.rows - 1);
        }
        // 16 gates, then their 16 ups
        const int channel = tile * CHANNELS + j / 32 * 16 + j % 16;
        return first_row + (j / 16 % 2) * int64_t(call.rows) + (channel < call.rows ? channel : call.rows - 1);
    }

    // Number of tokens of this block's expert; their slots go to the list.
    __device__ int gather() {
        if (call.mode == DENSE) return call.tokens;
        int* count = at<int>(M::COUNT);
        if (thread == 0) *count = 0;
        sync();
        for (int slot = thread; slot < call.tokens * call.slots; slot += THREADS)
            if (read(call.index + slot) == expert) at<uint16_t>(M::LIST)[add(count, 1)] = uint16_t(slot);
        sync();
        return *count;
    }

    // Row of x of entry i of the list.
    __device__ int64_t x_row(int i) {
        if (call.mode == DENSE) return i;
        const int slot = at<uint16_t>(M::LIST)[i];
        return call.mode == GATE_UP ? slot / call.slots : slot;
    }

    // Start copying step `step`, which begins at column `k`.
    __device__ __forceinline__ void fetch(int step, int k, int count) {
        const int stage = step % S::STAGES, left = call.columns - k;
        // 16 rows at a time; 8 with 3 bits, whose rows are 12 pieces of 16 bytes, where a quarter of the threads rests
        constexpr int CHUNKS = S::ROW_BYTES / 16, AT_ONCE = BITS == 3 ? 8 : 16;
        const int row = thread / CHUNKS, place = thread % CHUNKS * 16;
        if (row < AT_ONCE && (left >= S::COLUMNS || place < left * BITS / 8)) {
            unsigned char* to = memory + M::WORDS + (stage * ROWS + row) * S::STRIDE + place;
            const auto* const* rows = at<const unsigned char*>(M::ROW) + row;
            const int64_t skip = int64_t(k / S::UNIT) * S::UNIT_BYTES + place;
#pragma unroll
            for (int i = 0; i < ROWS; i += AT_ONCE) copy_async(to + i * S::STRIDE, rows[i] + skip);
        }
        // a warp copies a token's activations
#pragma unroll 1
        for (int token = warp; token < count; token += THREADS / 32) {
            unsigned char* to = xs + (stage * call.at_once + token) * S::X_STRIDE;
            const unsigned char* x = at<const unsigned char*>(M::X_ROW)[token] + 2 * int64_t(k);
            const int lane = 16 * (thread % 32);
#pragma unroll
            for (int i = 0; i < 2 * S::COLUMNS; i += 16 * 32)
                if (lane + i < 2 * left) copy_async(to + lane + i, x + lane + i);
        }
    }

    struct Grid { // scales and zero points of this thread's row for one step, as stored
        int count;    // groups; 0 beyond the row's end
        uint16_t scale[S::GROUPS];
        uint32_t zero[2];
        int bit;
    };

    // Calls `f(i)` for so many groups; a step has 1, 2, 4 or 8 of them, the last one of a row perhaps fewer.
    template <typename F> static __device__ __forceinline__ void each(int count, F f) {
        f(0);
        if (count == 1) return;
        f(1);
        if (count == 2) return;
#pragma unroll
        for (int i = 2; i < S::GROUPS; ++i)
            if (i < count) f(i);
    }

    __device__ __forceinline__ void load_grid(Grid& grid, int k) {
        grid.count = 0;
        if (k >= call.columns) return;
        int group = k / S::COLUMNS * stage_groups;
        if (call.group > S::COLUMNS) group = k / call.group;
        const int left = int(call.groups) - group;
        grid.count = left < stage_groups ? left : stage_groups;
        const uint16_t* scales = scale_row + group;
        each(grid.count, [&](int i) { grid.scale[i] = read(scales + i); });
        if (call.zero == nullptr) return;
        // the zero points of a step fill at most 32 bits; only those of 3 bits may lie in two words
        const int word = group * BITS / 32;
        grid.bit = group * BITS % 32;
        grid.zero[0] = read(zero_row + word);
        grid.zero[1] = BITS == 3 && word + 1 < call.zero_words ? read(zero_row + word + 1) : 0;
    }

    // (scale, -scale (2^b + zero)) of this thread's row for step `step`.
    __device__ __forceinline__ void store_grid(const Grid& grid, int step) {
        if (grid.count == 0) return;
        Pair* scales = at<Pair>(M::SCALES) + (step & 1) * stage_groups * ROWS + thread;
        const bool stored = call.zero != nullptr;
        const uint32_t codes = stored ? funnel(grid.zero[0], grid.zero[1], grid.bit) : 0;
        each(grid.count, [&](int i) {
            const uint32_t zero = stored ? (codes >> (BITS * i)) & ((1u << BITS) - 1) : 1u << (BITS - 1);
            const float scale = widen<false>(grid.scale[i]);
            scales[i * ROWS] = {scale, -scale * float((1u << BITS) + zero)};
        });
    }
};

// The activations of a unit for token `g` of a tile, in the pairs of pair_of.
template <int BITS> __device__ __forceinline__ void pairs_of_x(uint32_t* b, const unsigned char* x, int t) {
    constexpr int PAIRS = Shape<BITS>::PAIRS;
    const auto* from = reinterpret_cast<const Words*>(x) + t * (PAIRS / 4);
    uint32_t flat[PAIRS];
#pragma unroll
    for (int i = 0; i < PAIRS / 4; ++i) {
        const Words w = from[i];
#pragma unroll
        for (int j = 0; j < 4; ++j) flat[4 * i + j] = w.at[j];
    }
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) b[p] = permute(flat[p / 2], flat[p / 2 + PAIRS / 2], p % 2 ? 0x7632 : 0x5410);
}

template <int BITS, bool BF16, int NT> struct Sums {
    using S = Shape<BITS>;
    float total[2][NT][4]; // [16-row half][8 tokens]: rows g, g, g + 8, g + 8 and tokens 2 t, 2 t + 1, 2 t, 2 t + 1

    __device__ void clear() {
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) total[r][n][i] = 0;
    }

    // Step i of the unit's products: columns of two pairs of every lane.
    template <int I>
    __device__ __forceinline__ void multiply(float (&part)[2][NT][4], float (&sum)[NT][4], const uint32_t (&code)[2][2],
                                             const uint32_t (&b)[NT][S::PAIRS]) {
        constexpr uint32_t ONE = BF16 ? 0x3F803F80u : 0x3C003C00u;
        const uint32_t ones[4] = {ONE, ONE, ONE, ONE};
#pragma unroll
        for (int n = 0; n < NT; ++n) mma<BF16>(sum[n], ones, b[n][2 * I], b[n][2 * I + 1]);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t a[4] = {pair_of<BITS, BF16, 2 * I>(code[r][0]), pair_of<BITS, BF16, 2 * I>(code[r][1]),
                                   pair_of<BITS, BF16, 2 * I + 1>(code[r][0]), pair_of<BITS, BF16, 2 * I + 1>(code[r][1])};
#pragma unroll
            for (int n = 0; n < NT; ++n) mma<BF16>(part[r][n], a, b[n][2 * I], b[n][2 * I + 1]);
        }
    }

    // Add the products of one step of `columns` columns for `count` tokens. The columns of a product that have no token
    // repeat the last one's.
    __device__ __forceinline__ void step(Block<BITS, NT>& block, int step, int columns, int count) {
        using M = Memory<BITS, NT>;
        const int stage = step % S::STAGES, g = block.g, t = block.t, row = 32 * block.warp + g;
        const unsigned char* words = block.memory + M::WORDS + stage * ROWS * S::STRIDE;
        const unsigned char* xs[NT];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const int token = n * TILE + g < count ? n * TILE + g : count - 1;
            xs[n] = block.xs + (stage * block.call.at_once + token) * S::X_STRIDE;
        }
        const Pair* scales = block.template at<Pair>(M::SCALES) + (step & 1) * block.stage_groups * ROWS;
        const int units = (columns < S::COLUMNS ? columns : S::COLUMNS) / S::UNIT;
        const int per_group = S::UNITS / block.stage_groups;
        float part[2][NT][4] = {}, sum[NT][4] = {};
        int in_group = 0;
        // rows of 3-bit codes hold an even number of units, and groups too
        constexpr int PER_TURN = BITS == 3 ? 2 : 1;
#pragma unroll 1
        for (int u = 0; u < units; u += PER_TURN) {
#pragma unroll
            for (int v = u; v < u + PER_TURN; ++v) {
                uint32_t b[NT][S::PAIRS], code[2][2];
#pragma unroll
                for (int n = 0; n < NT; ++n) pairs_of_x<BITS>(b[n], xs[n] + v * 2 * S::UNIT, t);
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    code[r / 2][r % 2] = codes_of<BITS>(words + (row + 8 * r) * S::STRIDE + v * S::UNIT_BYTES, t);
                multiply<0>(part, sum, code, b);
                multiply<1>(part, sum, code, b);
                if constexpr (S::PAIRS == 8) {
                    multiply<2>(part, sum, code, b);
                    multiply<3>(part, sum, code, b);
                }
            }
            in_group += PER_TURN;
            if (in_group < per_group && u + PER_TURN < units) continue;
            flush(part, sum, scales + row);
            scales += ROWS, in_group = 0;
        }
    }

    __device__ __forceinline__ void flush(float (&part)[2][NT][4], float (&sum)[NT][4], const Pair* scales) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const Pair low = scales[16 * r], high = scales[16 * r + 8];
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const Pair s = i < 2 ? low : high;
                    total[r][n][i] = fmaf(s.y, sum[n][i % 2], fmaf(s.x, part[r][n][i], total[r][n][i]));
                    part[r][n][i] = 0;
                }
        }
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[n][i] = 0;
    }
};

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

// Write what a block has summed: the result where it holds all of it, else its part.
template <int BITS, bool BF16, int NT>
__device__ void store(Block<BITS, NT>& block, const Sums<BITS, BF16, NT>& sums, int first, int count) {
    const Call& call = block.call;
    const auto out = static_cast<uint16_t*>(call.out);
    const int64_t slots = int64_t(call.tokens) * call.slots;
    const int span = call.mode == GATE_UP ? 16 : 32;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int entry = n * TILE + 2 * block.t + i % 2;
            if (entry >= count) continue;
            const int64_t place = call.mode == DENSE ? first + entry : block.template at<uint16_t>(Memory<BITS, NT>::LIST)[first + entry];
            const int low = (call.mode == GATE_UP ? CHANNELS : ROWS) * block.tile + span * block.warp + block.g + i / 2 * 8;
            if (call.mode == GATE_UP) {
                if (low >= call.rows) continue;
                if (call.splits == 1) {
                    const float gate = sums.total[0][n][i] + bias_of<BF16>(call, block.first_row + low);
                    const float up = sums.total[1][n][i] + bias_of<BF16>(call, block.first_row + call.rows + low);
                    out[place * call.rows + low] = narrow<BF16>(activated(call, gate, up));
                } else {
                    float* part = call.parts + (block.split * slots + place) * 2 * call.rows + low;
                    part[0] = sums.total[0][n][i], part[call.rows] = sums.total[1][n][i];
                }
                continue;
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = low + 16 * r;
                if (row >= call.rows) continue;
                if (call.mode == DENSE && call.splits == 1)
                    out[place * call.rows + row] = narrow<BF16>(sums.total[r][n][i]);
                else
                    call.parts[(block.split * slots + place) * call.rows + row] = sums.total[r][n][i];
            }
        }
}

// Whether this block is the last of `all` to come to `counter`; what the others wrote is then visible to it.
template <int BITS, int NT> __device__ bool last_of(Block<BITS, NT>& block, int* counter, int all) {
    int* flag = block.template at<int>(Memory<BITS, NT>::COUNT) + 1;
    fence();
    sync();
    if (block.thread == 0) {
        *flag = add(counter, 1) == all - 1;
        if (*flag) *counter = 0; // ready for the next launch
    }
    sync();
    if (!*flag) return false;
    fence();
    return true;
}

// Add the parts of a tile once all of them are there.
template <int BITS, bool BF16, int NT> __device__ void finish(Block<BITS, NT>& block, int total) {
    const Call& call = block.call;
    const auto out = static_cast<uint16_t*>(call.out);
    const int64_t slots = int64_t(call.tokens) * call.slots;
    const int width = call.mode == GATE_UP ? CHANNELS : ROWS, begin = block.tile * width;
    const int wide = call.rows - begin < width ? call.rows - begin : width;
    if (call.mode == GATE_UP) {
        if (call.splits == 1 || !last_of(block, call.arrived + block.expert * gridDim.x + block.tile, call.splits)) return;
        for (int i = block.thread; i < total * wide; i += THREADS) {
            const int channel = begin + i % wide;
            const int64_t slot = block.template at<uint16_t>(Memory<BITS, NT>::LIST)[i / wide];
            float gate = bias_of<BF16>(call, block.first_row + channel);
            float up = bias_of<BF16>(call, block.first_row + call.rows + channel);
            for (int s = 0; s < call.splits; ++s) {
                const float* part = call.parts + (s * slots + slot) * 2 * call.rows + channel;
                gate += read_written(part), up += read_written(part + call.rows);
            }
            out[slot * call.rows + channel] = narrow<BF16>(activated(call, gate, up));
        }
        return;
    }
    if (call.mode == DENSE && call.splits == 1) return;
    if (!last_of(block, call.arrived + block.tile, call.splits * call.experts)) return;
    for (int i = block.thread; i < call.tokens * wide; i += THREADS) {
        const int64_t token = i / wide, row = begin + i % wide;
        float sum = 0;
        for (int64_t slot = token * call.slots; slot < (token + 1) * call.slots; ++slot) {
            const int64_t owner = call.mode == DENSE ? 0 : read(call.index + slot);
            if (owner < 0 || owner >= call.experts) continue;
            float value = call.mode == DENSE ? 0.0f : bias_of<BF16>(call, owner * call.rows + row);
            for (int s = 0; s < call.splits; ++s) value += read_written(call.parts + (s * slots + slot) * call.rows + row);
            sum += call.mode == DENSE ? value : read(call.share + slot) * value;
        }
        out[token * call.rows + row] = narrow<BF16>(sum);
    }
}

// Grid: tiles of rows, experts, splits of the columns.
template <int BITS, bool BF16, int NT>
__global__ void __launch_bounds__(THREADS) skinny_kernel(const __grid_constant__ Call call) {
    using S = Shape<BITS>;
    using M = Memory<BITS, NT>;
    constexpr int COLUMNS = S::COLUMNS;
    Block<BITS, NT> block(call, shared_memory());
    const int total = block.gather();
    const int from = block.split * call.steps * COLUMNS;
    const int whole = (call.columns - from + COLUMNS - 1) / COLUMNS, steps = whole < call.steps ? whole : call.steps;
    using Address = const unsigned char*;
    if (total > 0)
        block.template at<Address>(M::ROW)[block.thread] =
            reinterpret_cast<Address>(call.weight + block.weight_row(block.thread) * call.words);
    for (int first = 0; first < total; first += call.at_once) {
        const int count = total - first < call.at_once ? total - first : call.at_once;
        if (block.thread < count)
            block.template at<Address>(M::X_ROW)[block.thread] =
                static_cast<Address>(call.x) + 2 * block.x_row(first + block.thread) * call.columns;
        sync();
        Sums<BITS, BF16, NT> sums;
        sums.clear();
        typename Block<BITS, NT>::Grid grid;
        for (int s = 0; s < S::STAGES - 1; ++s) {
            if (s < steps) block.fetch(s, from + s * COLUMNS, count);
            commit();
        }
        block.load_grid(grid, from);
        block.store_grid(grid, 0);
        block.load_grid(grid, from + COLUMNS);
        for (int s = 0; s < steps; ++s) {
            const int k = from + s * COLUMNS;
            wait<S::STAGES - 2>();
            sync(); // step s is there, and nobody reads step s - 1 any more
            if (s + S::STAGES - 1 < steps) block.fetch(s + S::STAGES - 1, k + (S::STAGES - 1) * COLUMNS, count);
            commit();
            block.store_grid(grid, s + 1);
            block.load_grid(grid, k + 2 * COLUMNS);
            sums.step(block, s, call.columns - k, count);
        }
        sync(); // the next pass writes what the last steps read
        store(block, sums, first, count);
    }
    finish<BITS, BF16, NT>(block, total);
}

} // namespace llmcompress::skinny
