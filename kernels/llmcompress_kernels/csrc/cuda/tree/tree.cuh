// Models of one residual tree in one launch: y[t] = sum over the nodes above token t of W x[t], each node read once.
//
// Almost all bytes are leaves of 1 bit, of which each serves few tokens, so 1-bit codes must cost little: an H100 issues
// 1.2 instructions of a thread per 1-bit weight while 3 TB/s of them arrive. One takes 0.125 by mma.m16n8k16 and 0.6 to
// become a factor of it: a bit under the exponent of 1 is the number 1 + bit 2^(its place below the point), so bits of
// four neighbouring places need one shift together, and the place's power of two goes, exactly, into the activations.
// Codes of 2 and 4 bits become 2^b + code likewise. What all that adds, and the middle of the grid, depends on
// activations alone: the sum begins with its negative, which is computed once per group and serves all nodes and rows.
//
// A warp owns 32 rows and walks all nodes over the block's columns, 64 bytes of a row a step, through a ring of its own in
// shared memory that cp.async keeps full; warps never wait for one another. The block's activations lie ready in shared
// memory as the right operands of its products, in one order per width: a lane owns 32 neighbouring columns of a group of
// 128, the same in all of them. Columns are split over blocks where rows are few; the last block to arrive at its rows
// adds the parts in a fixed order, so results do not depend on scheduling.
#pragma once

#include "call.h"

namespace llmcompress::gpu {

constexpr int GROUP = 128, ROWS_OF_WARP = 32, STEP_BYTES = 64, TILE = 8;

template <bool BF16_, int NT_, int WARPS_, int STAGES_> struct TreeShape {
    static constexpr bool BF16 = BF16_;
    static constexpr int NT = NT_, WARPS = WARPS_, STAGES = STAGES_, THREADS = 32 * WARPS, ROWS = ROWS_OF_WARP * WARPS;
    static constexpr int MANTISSA = BF16 ? 7 : 10, BIAS = BF16 ? 127 : 15;
    static constexpr int CODES = ROWS_OF_WARP * STEP_BYTES, STAGE = CODES + ROWS_OF_WARP * 16; // 3 words of scales per row
    static constexpr int FLAG = WARPS * STAGES * STAGE, OFFSETS = FLAG + 16;
    // operands of one width and group for all tokens; sums of as many
    static constexpr int OPERANDS = NT * 2048, SUMS = NT * TILE * 4;
    __host__ __device__ static constexpr int bytes(int widths, int each) { return OFFSETS + widths * each * (SUMS + OPERANDS); }
};

// Where bit I of a word's halves is put, below it the number is 1 (fp16: 4) and a fraction.
template <class S, int I> __device__ __forceinline__ constexpr int place_of() { return S::BF16 ? 3 + I % 4 : 8 + I % 2; }

template <class S> constexpr uint32_t ONE_BIT_BASE = S::BF16 ? 0x3F80u : 0x4400u;

// What activations are multiplied by, so that a bit at place_of is worth 1: two powers of two.
template <class S> __device__ __forceinline__ constexpr uint32_t times_of(int i) {
    return (S::BF16 ? uint32_t(0x4180 - 0x80 * (i % 4)) : i % 2 == 0 ? 0x3C00u : 0x3800u) * 0x10001u;
}

// Number I of the pairs of codes of a word as two numbers.
template <class S, int BITS, int I> __device__ __forceinline__ uint32_t pair_of(uint32_t v) {
    constexpr int TOP = BITS == 1 ? place_of<S, I>() : S::MANTISSA - BITS, BY = TOP - BITS * I;
    constexpr uint32_t ONE = ((1u << BITS) - 1) << TOP;
    constexpr uint32_t BASE = BITS == 1 ? ONE_BIT_BASE<S> : uint32_t(S::BIAS + BITS) << S::MANTISSA;
    const uint32_t moved = BY >= 0 ? v << (BY >= 0 ? BY : 0) : v >> (BY < 0 ? -BY : 0);
    return mask_set(moved, ONE * 0x10001u, BASE * 0x10001u);
}

// What pair_of adds to a code, and the middle of the grid, negative: a factor of the group's activations.
template <class S, int BITS, int I> __device__ __forceinline__ uint32_t offset_of() {
    if constexpr (BITS == 1) return (0x8000u | ONE_BIT_BASE<S> | 1u << (place_of<S, I>() - 1)) * 0x10001u;
    else return narrow<S::BF16>(-(float(1 << BITS) + float((1 << BITS) - 1) / 2)) * 0x10001u;
}

template <class S> struct Tree {
    const TreeCall& call;
    unsigned char* memory;
    int thread, warp, lane, g, t; // g: row of a fragment, t: place in its four lanes
    int first, groups;            // of this block
    int row;                      // first of this warp

    struct Cursor { int node, group, bits; };

    // Where the next step of a node comes from: this lane's piece of row g, and the scales of row `lane`.
    struct Source {
        Cursor cursor;
        const unsigned char* words;
        const uint16_t* scales;
        int64_t stride; // of 8 rows
    };

    __device__ Tree(const TreeCall& c, unsigned char* m) : call(c), memory(m) {
        thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
        first = int(blockIdx.y) * call.each;
        groups = call.groups - first < call.each ? call.groups - first : call.each;
        row = int(blockIdx.x) * S::ROWS + warp * ROWS_OF_WARP;
    }

    template <typename T> __device__ __forceinline__ T* at(int offset) const { return reinterpret_cast<T*>(memory + offset); }
    __device__ __forceinline__ int stage(int i) const { return (warp * S::STAGES + i) * S::STAGE; }
    // Place of a width among those that the call has.
    __device__ __forceinline__ int slot(int bits) const { return (call.widths & 1 && bits > 1) + (call.widths & 2 && bits > 2); }
    __device__ __forceinline__ int place(int bits, int group) const { return slot(bits) * call.each + group; }
    __device__ __forceinline__ int widths() const { return (call.widths & 1) + (call.widths >> 1 & 1) + (call.widths >> 2 & 1); }
    __device__ __forceinline__ float* sums(int bits, int group) const { return at<float>(S::OFFSETS + place(bits, group) * S::SUMS); }
    __device__ __forceinline__ Words* operands(int bits, int group) const {
        return at<Words>(S::OFFSETS + widths() * call.each * S::SUMS + place(bits, group) * S::OPERANDS);
    }

    // Groups of a step of 64 bytes: 4, 2 and 1.
    static __device__ __forceinline__ int in_step(int bits) { return 4 >> bits / 2; }

    __device__ __forceinline__ Cursor begin() const { return {0, 0, call.node[0].bits}; }

    // The next step; whether it is another node's.
    __device__ __forceinline__ bool advance(Cursor& cursor) const {
        cursor.group += in_step(cursor.bits);
        if (cursor.group < groups) return false;
        cursor.group = 0, ++cursor.node;
        if (cursor.node < call.nodes) cursor.bits = call.node[cursor.node].bits;
        return true;
    }

    __device__ __forceinline__ void open(Source& source) const {
        const TreeNode& node = call.node[source.cursor.node];
        const int64_t bytes = int64_t(call.columns) * node.bits / 8;
        source.words = node.words + (row + g) * bytes + int64_t(first) * (16 * node.bits) + 16 * t;
        source.scales = node.scale + int64_t(row + lane) * call.groups + first;
        source.stride = 8 * bytes;
    }

    // Start copying 64 bytes of each row, or what is left of them, and their scales. Rows beyond the matrix are not
    // filled: their sums go nowhere.
    __device__ __forceinline__ void fetch(int to, Source& source) const {
        const Cursor& cursor = source.cursor;
        unsigned char* target = memory + stage(to);
        if (t < (groups - cursor.group) * cursor.bits) {
            // rows 8 apart lie in the same order
            unsigned char* place = target + g * STEP_BYTES + (t ^ (g / 2 % 4)) * 16;
            const unsigned char* from = source.words;
#pragma unroll
            for (int i = 0; i < ROWS_OF_WARP; i += 8) {
                if (row + i + g < call.rows) copy_async(place + i * STEP_BYTES, from);
                from += source.stride;
            }
        }
        // two scales a word; the first one may belong to the group before. Lanes that copy several rows' words side by side
        // ask L2 for less and are no faster (H200)
        if (row + lane < call.rows) {
            const int odd = (first + cursor.group) & 1, all = in_step(cursor.bits), left = groups - cursor.group;
            const int count = odd + (left < all ? left : all);
            unsigned char* place = target + S::CODES + 16 * lane;
            const uint16_t* from = source.scales + cursor.group - odd;
            copy_word_async(place, from);
            if (count > 2) copy_word_async(place + 4, from + 2);
            if (count > 4) copy_word_async(place + 8, from + 4);
        }
        source.words += STEP_BYTES;
        if (advance(source.cursor) && source.cursor.node < call.nodes) open(source);
    }

    // The activations of 32 columns of a token, as 16 pairs of neighbours, in the pairs of a width.
    template <int BITS> __device__ __forceinline__ void order(const uint32_t (&x)[16], Words* to) const {
        constexpr int PAIRS = 16 / BITS; // of a word
        uint32_t found[16];
#pragma unroll
        for (int q = 0; q < 16; ++q) {
            const int column = q / PAIRS * 2 * PAIRS + q % PAIRS;
            found[q] = permute(x[column / 2], x[(column + PAIRS) / 2], column % 2 ? 0x7632 : 0x5410);
            if constexpr (BITS == 1) found[q] = multiply_pair<S::BF16>(found[q], times_of<S>(q));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) to[32 * i] = {found[4 * i], found[4 * i + 1], found[4 * i + 2], found[4 * i + 3]};
    }

    __device__ __forceinline__ void prepare() const {
        for (int i = thread; i < groups * S::NT * 32; i += S::THREADS) {
            const int to = i % 32, n = i / 32 % S::NT, group = i / 32 / S::NT, token = n * TILE + to / 4;
            uint32_t x[16] = {};
            if (token < call.tokens) {
                const auto* from = reinterpret_cast<const Words*>(static_cast<const uint16_t*>(call.x) + int64_t(token) * call.columns +
                                                                  (first + group) * GROUP + to % 4 * 32);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const Words words = from[j];
#pragma unroll
                    for (int k = 0; k < 4; ++k) x[4 * j + k] = words.at[k];
                }
            }
            if (call.widths & 1) order<1>(x, operands(1, group) + n * 128 + to);
            if (call.widths & 2) order<2>(x, operands(2, group) + n * 128 + to);
            if (call.widths & 4) order<4>(x, operands(4, group) + n * 128 + to);
        }
    }

    template <int BITS> __device__ __forceinline__ void load(uint32_t (&b)[16], int group, int n) const {
        const Words* from = operands(BITS, group) + n * 128 + lane;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Words words = from[32 * i];
#pragma unroll
            for (int k = 0; k < 4; ++k) b[4 * i + k] = words.at[k];
        }
    }

    template <int BITS, int Q> __device__ __forceinline__ void offset(float (&d)[4], const uint32_t (&b)[16]) const {
        constexpr int PAIRS = 16 / BITS;
        const uint32_t low = offset_of<S, BITS, 2 * Q % PAIRS>(), high = offset_of<S, BITS, (2 * Q + 1) % PAIRS>();
        const uint32_t a[4] = {low, low, high, high};
        mma<S::BF16>(d, a, b[2 * Q], b[2 * Q + 1], d);
        if constexpr (Q < 7) offset<BITS, Q + 1>(d, b);
    }

    // What the sums of a group begin with.
    template <int BITS> __device__ __forceinline__ void offsets() const {
        if (!(call.widths & BITS)) return;
        for (int i = warp; i < groups * S::NT; i += S::WARPS) {
            const int group = i / S::NT, n = i % S::NT;
            uint32_t b[16];
            load<BITS>(b, group, n);
            float d[4] = {};
            offset<BITS, 0>(d, b);
            if (g == 0) *reinterpret_cast<Two*>(sums(BITS, group) + n * TILE + 2 * t) = {d[0], d[1]};
        }
    }
};

template <class S> struct TreeSums {
    float own[2][S::NT][4] = {}; // the same of the node at hand, without its multiplier
    bool touched[S::NT];
    float total[2][S::NT][4] = {}; // [16-row half][8 tokens]: rows g, g, g + 8, g + 8 and tokens 2 t, 2 t + 1, 2 t, 2 t + 1

    // The words of a lane's columns in one row of a group.
    template <int BITS> static __device__ __forceinline__ void codes(const Tree<S>& tree, int stage, int r, int group, uint32_t (&to)[BITS]) {
        const int piece = BITS == 1 ? group : BITS == 2 ? 2 * group + tree.t / 2 : tree.t;
        const int skip = BITS == 1 ? 4 * tree.t : BITS == 2 ? tree.t % 2 * 8 : 0;
        const unsigned char* from = tree.memory + tree.stage(stage) + r * STEP_BYTES + (piece ^ (r / 2 % 4)) * 16 + skip;
        if constexpr (BITS == 1) to[0] = *reinterpret_cast<const uint32_t*>(from);
        if constexpr (BITS == 2) {
            const uint64_t both = *reinterpret_cast<const uint64_t*>(from);
            to[0] = uint32_t(both), to[1] = uint32_t(both >> 32);
        }
        if constexpr (BITS == 4) {
            const Words words = *reinterpret_cast<const Words*>(from);
            to[0] = words.at[0], to[1] = words.at[1], to[2] = words.at[2], to[3] = words.at[3];
        }
    }

    template <int BITS, int TOGETHER, int CHAINS, int Q>
    static __device__ __forceinline__ void products(float (&part)[TOGETHER][2][CHAINS][4], const uint32_t (&code)[TOGETHER][4][BITS],
                                                    const uint32_t (&b)[TOGETHER][16], const Two (&begin)[TOGETHER]) {
        constexpr int PAIRS = 16 / BITS, LOW = 2 * Q % PAIRS, WORD = 2 * Q / PAIRS;
        constexpr int HIGH = (2 * Q + 1) % PAIRS, NEXT = (2 * Q + 1) / PAIRS;
#pragma unroll
        for (int u = 0; u < TOGETHER; ++u)
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const uint32_t a[4] = {pair_of<S, BITS, LOW>(code[u][2 * m][WORD]), pair_of<S, BITS, LOW>(code[u][2 * m + 1][WORD]),
                                       pair_of<S, BITS, HIGH>(code[u][2 * m][NEXT]), pair_of<S, BITS, HIGH>(code[u][2 * m + 1][NEXT])};
                float(&sum)[4] = part[u][m][Q % CHAINS];
                const float start[4] = {Q == 0 ? begin[u].x : 0.0f, Q == 0 ? begin[u].y : 0.0f, Q == 0 ? begin[u].x : 0.0f, Q == 0 ? begin[u].y : 0.0f};
                if constexpr (Q < CHAINS) mma<S::BF16>(sum, a, b[u][2 * Q], b[u][2 * Q + 1], start);
                else mma<S::BF16>(sum, a, b[u][2 * Q], b[u][2 * Q + 1], sum);
            }
        if constexpr (Q < 7) products<BITS, TOGETHER, CHAINS, Q + 1>(part, code, b, begin);
    }

    // Groups `in` .. of a step. Products of one group wait for each other, so several go side by side, or one in halves.
    template <int BITS, int TOGETHER> __device__ __forceinline__ void add_groups(const Tree<S>& tree, int stage, const typename Tree<S>::Cursor& cursor, int in) {
        constexpr int CHAINS = TOGETHER == 1 ? 2 : 1;
        uint32_t code[TOGETHER][4][BITS];
        float scale[TOGETHER][4];
        const auto* scales = reinterpret_cast<const uint16_t*>(tree.memory + tree.stage(stage) + S::CODES) + 8 * tree.g;
        const int odd = (tree.first + cursor.group) & 1;
#pragma unroll
        for (int u = 0; u < TOGETHER; ++u)
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                codes<BITS>(tree, stage, tree.g + 8 * r, in + u, code[u][r]);
                scale[u][r] = widen<false>(scales[64 * r + odd + in + u]);
            }
#pragma unroll
        for (int n = 0; n < S::NT; ++n) {
            if (S::NT > 1 && !touched[n]) continue;
            uint32_t b[TOGETHER][16];
            float part[TOGETHER][2][CHAINS][4];
            Two begin[TOGETHER];
#pragma unroll
            for (int u = 0; u < TOGETHER; ++u) {
                tree.template load<BITS>(b[u], cursor.group + in + u, n);
                begin[u] = *reinterpret_cast<const Two*>(tree.sums(BITS, cursor.group + in + u) + n * TILE + 2 * tree.t);
            }
            products<BITS, TOGETHER, CHAINS, 0>(part, code, b, begin);
#pragma unroll
            for (int u = 0; u < TOGETHER; ++u)
#pragma unroll
                for (int m = 0; m < 2; ++m)
#pragma unroll
                    for (int c = 0; c < CHAINS; ++c)
#pragma unroll
                        for (int i = 0; i < 4; ++i) own[m][n][i] = fused(scale[u][2 * m + i / 2], part[u][m][c][i], own[m][n][i]);
        }
    }

    template <int BITS> __device__ __forceinline__ void step(const Tree<S>& tree, int stage, const typename Tree<S>::Cursor& cursor) {
        const int left = tree.groups - cursor.group;
        if constexpr (BITS == 4) {
            add_groups<4, 1>(tree, stage, cursor, 0);
        } else {
            constexpr int MOST = 4 / BITS, TOGETHER = S::NT > 1 ? 2 : MOST;
            const int count = left < MOST ? left : MOST;
            if (TOGETHER == 4 && count == 4) return add_groups<BITS, TOGETHER>(tree, stage, cursor, 0);
#pragma unroll 1
            for (int in = 0; in + 2 <= count; in += 2) add_groups<BITS, 2>(tree, stage, cursor, in);
            if (count % 2 != 0) add_groups<BITS, 1>(tree, stage, cursor, count - 1);
        }
    }

    // Which tokens a node serves.
    __device__ __forceinline__ void begin(const TreeNode& node) {
#pragma unroll
        for (int n = 0; n < S::NT; ++n) touched[n] = node.high > n * TILE && node.low < (n + 1) * TILE;
    }

    // Add what a node has given to the tokens that it serves.
    __device__ __forceinline__ void end(const Tree<S>& tree, const TreeNode& node) {
#pragma unroll
        for (int n = 0; n < S::NT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = n * TILE + 2 * tree.t + i % 2;
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    if (token >= node.low && token < node.high) total[m][n][i] = fused(node.multiplier, own[m][n][i], total[m][n][i]);
                    own[m][n][i] = 0;
                }
            }
    }

    __device__ __forceinline__ void store(const Tree<S>& tree) const {
        const TreeCall& call = tree.call;
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < S::NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int row = tree.row + 16 * m + tree.g + i / 2 * 8, token = n * TILE + 2 * tree.t + i % 2;
                    if (row >= call.rows || token >= call.tokens) continue;
                    const int64_t to = int64_t(token) * call.rows + row;
                    if (call.splits == 1) static_cast<uint16_t*>(call.out)[to] = narrow<S::BF16>(total[m][n][i]);
                    else call.parts[int64_t(blockIdx.y) * call.tokens * call.rows + to] = total[m][n][i];
                }
    }
};

// Add the parts of the block's rows if this block is the last to come.
template <class S> __device__ void finish(const Tree<S>& tree) {
    const TreeCall& call = tree.call;
    int* last = tree.template at<int>(S::FLAG);
    fence();
    sync();
    if (tree.thread == 0) {
        *last = count_up(call.arrived + blockIdx.x) == call.splits - 1;
        if (*last) call.arrived[blockIdx.x] = 0; // ready for the next launch
    }
    sync();
    if (!*last) return;
    fence();
    const int begin = int(blockIdx.x) * S::ROWS, wide = call.rows - begin < S::ROWS ? call.rows - begin : S::ROWS;
    for (int i = tree.thread; i < call.tokens * wide; i += S::THREADS) {
        const int64_t at = int64_t(i / wide) * call.rows + begin + i % wide;
        float sum = 0;
        for (int s = 0; s < call.splits; ++s) sum += read_written(call.parts + int64_t(s) * call.tokens * call.rows + at);
        static_cast<uint16_t*>(call.out)[at] = narrow<S::BF16>(sum);
    }
}

// Grid: blocks of rows, splits of the columns.
template <class S> __global__ void __launch_bounds__(S::THREADS, 1) tree_kernel(const __grid_constant__ TreeCall call) {
    const Tree<S> tree(call, shared_memory());
    typename Tree<S>::Source ahead{tree.begin(), nullptr, nullptr, 0};
    tree.open(ahead);
#pragma unroll 1
    for (int i = 0; i < S::STAGES - 1; ++i) {
        if (ahead.cursor.node < call.nodes) tree.fetch(i, ahead);
        commit();
    }
    tree.prepare();
    sync();
    tree.template offsets<1>();
    tree.template offsets<2>();
    tree.template offsets<4>();
    sync();
    TreeSums<S> sums;
    typename Tree<S>::Cursor now = tree.begin();
    int stage = 0;
    sums.begin(call.node[0]);
#pragma unroll 1
    while (now.node < call.nodes) {
        wait<S::STAGES - 2>();
        sync_warp(); // this step is there, and nobody reads the one before any more
        if (ahead.cursor.node < call.nodes) tree.fetch(stage == 0 ? S::STAGES - 1 : stage - 1, ahead);
        commit();
        if (now.bits == 1) sums.template step<1>(tree, stage, now);
        else if (now.bits == 2) sums.template step<2>(tree, stage, now);
        else sums.template step<4>(tree, stage, now);
        stage = stage == S::STAGES - 1 ? 0 : stage + 1;
        const int node = now.node;
        if (!tree.advance(now)) continue;
        sums.end(tree, call.node[node]);
        if (now.node < call.nodes) sums.begin(call.node[now.node]);
    }
    sums.store(tree);
    if (call.splits > 1) finish(tree);
}

} // namespace llmcompress::gpu
