// One token of Mamba-2 with the state in 4- or 8-bit DSQ codes: decode, update, read out, round, store. Codes and scales
// are the definition's (reference/state.py) to the last bit.
//
// Moving the codes takes 0.15 ns of an H100 per 1000 states, so what limits this kernel is instructions: at 1.75 GHz the
// GPU issues 30,000 a ns/1000. Exactness decides how many there have to be. Per state, with 4 bits:
//
//   old code            LOP3 puts it under the exponent of 2^23, an addition takes that away                2
//   fresh state         channel step, code step, decay old, x B, their sum, each rounded by itself          5
//   read-out            one fused product                                                                   1
//   channel scale       |u| added in the definition's order; not if calibrated                              1.3
//   state scale         u / channel, largest                                                                2
//   new code            u / channel times 1 / step, a little less and a little more, must round alike       3
//   pack                shift and add                                                                       1
//
// and 1 to 2 for everything that a row, a column or a lane does once. With a dither, whose definition multiplies by
// reciprocals, 4 bits take as many and 8 bits four more. None of it may be fused, but for products with
// 1 / x, which are allowed to be off: where two bounds of the true quotient round differently, the warp divides.
//
// A block owns a head's whole [P, N] tile, because the state scale is a maximum over P. A lane holds R rows x W runs of 8
// columns; L lanes share a row. The mean of |u| is summed in halves, so a lane has the columns that differ in the upper
// bits of n: these are added first. In the next steps, from lane to lane, each lane gives away half of its rows; slot i of
// a lane is row i ^ (its upper bits), so that always the upper half of the slots is given and nothing is selected.
//
// A block walks over heads; cp.async fetches the next one's codes and operands while it works on this one.
#pragma once

#include <type_traits>

#include "call.h"
#include "window.cuh"

namespace llmcompress::gpu {

constexpr int TOKENS = MOST_ROWS + 1; // of a window
// Blocks of candidates that leave lanes fewer registers, which makes no difference on the host.
#ifdef __CUDACC__
constexpr int MANY = 6;
#else
constexpr int MANY = 4;
#endif
constexpr float SMALLEST = 0x1p-24f, LARGEST = 65504.0f, NORMAL = 0x1p-14f;
// 1.5 * 2^23: adding it rounds to the nearest integer, ties to even, which then is the low bits of the sum
constexpr float MAGIC = 12582912.0f;
// 4 bits: a number that it is added to has its nearest integer 16 bits up, and below that how far it is from the middle
// between two of them, which is 1.
constexpr float HALVES = 192.5f + 0x1p-16f;
// 8 bits with a dither, whose definition takes reciprocals: the same number of roundings, and two more of reciprocals here.
constexpr float LESS_OF_PRODUCT = 1.0f - 8 * 0x1p-24f, MORE_OF_PRODUCT = 1.0f + 10 * 0x1p-24f;
// Bounds of u / step / (u (1 / channel) (1 / per_state)): six roundings of 2^-24, and one of the bound itself.
constexpr float LESS = 1.0f - 7 * 0x1p-24f, MORE = 1.0f + 8 * 0x1p-24f;

// UNITS: by the arithmetic of nibbles.cuh.
template <int BITS_, int N_, int R_, int L_, bool FIXED_, int BLOCKS_, bool DITHER_ = false, bool KEPT_ = false, bool UNITS_ = false>
struct StateShape {
    static constexpr int BITS = BITS_, P = 64, N = N_, R = R_, L = L_, BLOCKS = BLOCKS_;
    static constexpr bool FIXED = FIXED_, DITHER = DITHER_, KEPT = KEPT_, UNITS = UNITS_;
    using Call = std::conditional_t<KEPT, ReplayCall, StateCall>;
    static constexpr float QMAX = float((1 << (BITS - 1)) - 1);
    static constexpr int GROUPS = 32 / L, ROWS = GROUPS * R; // of a warp
    static constexpr int WARPS = P / ROWS, THREADS = 32 * WARPS;
    static constexpr int RUN = BITS;                         // bytes of 8 columns
    static constexpr int CHUNK = L * RUN;                    // bytes that the lanes of a row take at once
    static constexpr int W = N / 8 / L;                      // chunks of a row
    static constexpr int ROW = N * BITS / 8;                 // bytes
    static constexpr int LINE = ROW >= 128 ? 1 : 128 / ROW;  // rows that fill all banks
    // shared memory; what the next head needs comes twice
    static constexpr int CHANNEL = P * ROW, X = CHANNEL + 2 * P, B = X + 4 * P, C = B + 4 * N, STAGE = C + 4 * N;
    static constexpr int PER_STATE = 2 * STAGE, WIDE = PER_STATE + 2 * 4 * N, NEW = WIDE + 4 * P, BOUNDS = NEW + 4 * N;
    static constexpr int ADDED = BOUNDS + (BITS == 4 ? 4 : 8) * N; // before rounding, with a dither
    static constexpr int MOST = ADDED + (DITHER ? 4 * N : 0), COLUMNS = N + 4; // a warp's largest, a row per lane group, shifted by 4 banks
    static constexpr int ALL = MOST + WARPS * GROUPS * COLUMNS * 4;
    // of nibbles.cuh: by column, by row, and bounds by token and warp
    static constexpr int READ = ALL + WARPS * N * 4, SIZES = READ + 4 * N, RATE = SIZES + 4 * N, SUMS = RATE + 4 * P;
    static constexpr int REACH = SUMS + 4 * TOKENS, WORST = REACH + 16 * (TOKENS + 1), BYTES = UNITS ? WORST + 16 : READ;
    // behind the rows of a window: a token's inputs by row and by column
    static constexpr int INPUTS = UNITS ? 4 * (P + N) : 0;
    static __host__ __device__ constexpr int bytes(int rows) { return BYTES + 2 * rows * KeptRow<P, N>::BYTES + (rows + 1) * INPUTS; }
    // place of a column among what lanes read eight of: first the fours that begin runs, so that no two share a bank
    static __host__ __device__ constexpr int place_of(int n) { return UNITS ? n / 4 % 2 * (N / 2) + n / 8 * 4 + n % 4 : n; }
    static_assert(WARPS <= 4 || !UNITS, "");
    static_assert(W >= 1 && (W & (W - 1)) == 0 && CHUNK % 16 == 0 && P % ROWS == 0, "");
};

__device__ __forceinline__ float clamped(float v) { return less_or_nan(more_or_nan(v, SMALLEST), LARGEST); }

// v / q for a scale of fp16 and q = 7 or 127, correctly rounded: tests/kernels/test_cuda_state.py tries all of them.
template <class S> __device__ __forceinline__ float per_state(float v) {
    constexpr float INVERSE = 1.0f / S::QMAX;
    const float guess = multiply(v, INVERSE);
    return fused(fused(-S::QMAX, guess, v), INVERSE, guess);
}

// 1 / v, off by hardly more than half of its last bit.
__device__ __forceinline__ float inverse(float v) {
    const float guess = about_inverse(v);
    return fused(fused(-v, guess, 1.0f), guess, guess);
}

// What the bits of a state scale add before rounding, in units of a step: dither_of of the definition.
__device__ __forceinline__ float dither_of(uint16_t scale) {
    return fused(float(int(uint32_t(scale) * 40503u >> 12 & 15)), 0.0625f, -7.5f * 0.0625f);
}

// A head of a sequence.
struct Unit {
    int at, head, sequence, shared; // shared: of b and c
    __device__ Unit(const StateCall& call, int index) : at(index), head(index % call.heads), sequence(index / call.heads) { group(call); }
    __device__ __forceinline__ void group(const StateCall& call) {
        shared = call.share == call.heads ? sequence : sequence * (call.heads / call.share) + head / call.share;
    }
    __device__ __forceinline__ void advance(const StateCall& call, int steps, int heads, int sequences) {
        at += steps, head += heads, sequence += sequences;
        if (head >= call.heads) head -= call.heads, ++sequence;
        group(call);
    }
};

// A head of one of the sequences whose windows are full; `at` is beyond all heads where there is none any more.
struct DueUnit : Unit {
    Due due;
    int rank; // of the sequence among them
    __device__ DueUnit(const ReplayCall& call, int index) : Unit(call, index), rank(sequence) { find(call); }
    __device__ __forceinline__ void find(const ReplayCall& call) {
        sequence = due.find(call, rank);
        at = sequence < 0 ? call.units : sequence * call.heads + head;
        group(call);
    }
    __device__ __forceinline__ void advance(const ReplayCall& call, int, int heads, int sequences) {
        head += heads, rank += sequences;
        if (head >= call.heads) head -= call.heads, ++rank;
        find(call);
    }
};

template <class S> struct Head {
    const typename S::Call& call;
    unsigned char* memory;
    int thread, warp, lane, g, l; // g: group of lanes, which share rows; l: place in it
    int unit, stage;
    float decay;

    __device__ Head(const typename S::Call& c, unsigned char* m) : call(c), memory(m) {
        find_place();
        unit = int(blockIdx.x), stage = 0;
    }

    __device__ __forceinline__ void find_place() {
        thread = thread_again(), warp = thread / 32, lane = thread % 32, g = lane / S::L, l = lane % S::L;
    }

    template <typename T> __device__ __forceinline__ T* at(int offset) const { return reinterpret_cast<T*>(memory + offset); }
    template <typename T> __device__ __forceinline__ T* staged(int offset) const { return at<T>(stage * S::STAGE + offset); }

    // Row of slot i of lane (g, l) of this warp.
    __device__ __forceinline__ int row(int group, int place, int i) const {
        return warp * S::ROWS + group + S::GROUPS * (i ^ (place * S::R / S::L));
    }

    // Byte of a row's chunk: rows that meet in a line of the banks have their chunks in different order.
    static __device__ __forceinline__ int place(int row, int chunk) {
        return row * S::ROW + (chunk ^ (row / S::LINE % S::W)) * S::CHUNK;
    }

    // The same for chunk j of slot i of this lane, and its place in that. Rows of a group of lanes lie in the same order.
    __device__ __forceinline__ int run_at(int i, int j) const {
        static_assert(S::GROUPS % (S::LINE * S::W) == 0, "slots of a lane have their chunks in the same order");
        const int first = (warp * S::ROWS + g) * S::ROW + l * S::RUN + (l * S::R / S::L ^ i) * (S::GROUPS * S::ROW);
        return first + ((g / S::LINE % S::W * S::CHUNK) ^ (j * S::CHUNK));
    }

    // Start copying the codes and operands of `next`.
    __device__ __forceinline__ void fetch(int to, const Unit& next) const {
        constexpr int SHORT = S::P * 2 / 16, LONG = S::P * 4 / 16, WIDE = S::N * 4 / 16, PIECES = 2 * WIDE + LONG + SHORT;
        constexpr int STEP = 16 * S::THREADS;
        static_assert(STEP / S::ROW % (S::LINE * S::W) == 0, "pieces of a thread lie at one place of their rows");
        unsigned char* target = memory + to * S::STAGE;
        const int piece = 16 * thread, in = piece % S::ROW, begin = place(piece / S::ROW, in / S::CHUNK) + in % S::CHUNK;
        const unsigned char* codes = call.codes + int64_t(next.at) * (S::P * S::ROW) + piece;
#pragma unroll
        for (int i = 0; i < S::P * S::ROW; i += STEP) copy_async(target + begin + i, codes + i);
        // pieces of b, c, drive and channel, so that as few warps as possible have two of them to choose from
        const auto copy = [&](int offset, const void* array, int64_t from, int i) {
            copy_async(target + offset + 16 * i, static_cast<const unsigned char*>(array) + from + 16 * i);
        };
#pragma unroll
        for (int first = 0; first < PIECES; first += S::THREADS) {
            const int i = first + thread;
            if (i < WIDE) copy(S::B, call.b, int64_t(next.shared) * (4 * S::N), i);
            else if (i < 2 * WIDE) copy(S::C, call.c, int64_t(next.shared) * (4 * S::N), i - WIDE);
            else if (i < 2 * WIDE + LONG) copy(S::X, call.drive, int64_t(next.at) * (4 * S::P), i - 2 * WIDE);
            else if (i >= PIECES) break;
            else if (S::FIXED) copy(S::CHANNEL, call.fixed, next.head * (2 * S::P), i - 2 * WIDE - LONG);
            else copy(S::CHANNEL, call.channel, int64_t(next.at) * (2 * S::P), i - 2 * WIDE - LONG);
        }
        if constexpr (S::KEPT) fetch_kept<S::P, S::N, S::THREADS>(call, next, kept(to, 0), thread);
    }

    // Row `row` of a stage's window.
    __device__ __forceinline__ unsigned char* kept(int of, int row) const {
        return memory + S::BYTES + (of * call.rows + row) * KeptRow<S::P, S::N>::BYTES;
    }

    // Code k of a run of 8; of 8 bits with the upper one turned.
    template <int K> static __device__ __forceinline__ float code(const uint32_t (&run)[S::RUN / 4]) {
        if constexpr (S::BITS == 8) {
            return add(float_of(permute(run[K / 4], 0x4B000000u, 0x7440 + K % 4)), -(0x1p23f + 128));
        } else {
            constexpr int BIT = 4 * (K % 4);
            const float number = float_of(mask_turn(K < 4 ? run[0] : run[0] >> 16, 15u << BIT, 0x4B000000u | 8u << BIT));
            return fused(number, 1.0f / float(1 << BIT), -(0x1p23f / float(1 << BIT) + 8));
        }
    }

    static __device__ __forceinline__ float old(float code, float channel, float step) { return multiply(code, multiply(channel, step)); }

    static __device__ __forceinline__ float fresh(float old, float x, float b, float decay) {
        return add(multiply(decay, old), multiply(x, b));
    }

    // The same for one state anywhere in the tile, as long as its codes are the old ones.
    __device__ float again(int r, int n) const {
        const int byte = n * S::BITS / 8, chunk = byte / S::CHUNK;
        const uint32_t raw = staged<uint8_t>(place(r, chunk))[byte % S::CHUNK];
        const int turned = S::BITS == 8 ? int(raw ^ 128) - 128 : int((raw >> 4 * (n % 2) & 15) ^ 8) - 8;
        float u = old(float(turned), widen<false>(staged<uint16_t>(S::CHANNEL)[r]), at<float>(S::PER_STATE)[stage * S::N + n]);
        if constexpr (S::KEPT) {
#pragma unroll 1
            for (int i = 0; i < call.rows; ++i) {
                const KeptRow<S::P, S::N> row{kept(stage, i)};
                u = fresh(u, row.x()[r], row.b()[n], row.decay());
            }
        }
        return fresh(u, staged<float>(S::X)[r], staged<float>(S::B)[n], decay);
    }

    // Its new code, by division.
    __device__ int exact_code(int r, int n) const {
        float value;
        if constexpr (S::DITHER) {
            const float part = multiply(again(r, n), divide(1.0f, at<float>(S::WIDE)[r]));
            const float added = at<float>(S::ADDED)[S::place_of(n)];
            value = fused(part, divide(1.0f, at<float>(S::NEW)[n]), S::BITS == 4 ? add(added, -HALVES) : added);
        } else {
            value = divide(again(r, n), multiply(at<float>(S::WIDE)[r], at<float>(S::NEW)[n]));
        }
        return int(less_of(more_of(nearest(value), -S::QMAX), S::QMAX));
    }

    // The largest |u| / channel of a column, by division; all lanes of the warp.
    __device__ float exact_most(int n) const {
        float most = 0;
        for (int r = lane; r < S::P; r += 32) most = more_or_nan(most, divide(size_of(again(r, n)), at<float>(S::WIDE)[r]));
        return float_of(largest(bits_of(most)));
    }
};

template <class S> struct Tile {
    float u[S::R][S::W][8]; // fresh states, then divided by the channel scale
    float y[S::R];

    template <int K> __device__ __forceinline__ void decode(const uint32_t (&run)[S::RUN / 4], int i, int j, float channel, const float* step) {
        u[i][j][K] = Head<S>::old(Head<S>::template code<K>(run), channel, step[K]);
        if constexpr (K < 7) decode<K + 1>(run, i, j, channel, step);
    }

    static __device__ __forceinline__ void eight(float* to, const float* from) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const Four four = reinterpret_cast<const Four*>(from)[h];
#pragma unroll
            for (int k = 0; k < 4; ++k) to[4 * h + k] = four.at[k];
        }
    }

    __device__ __forceinline__ void fill(const Head<S>& head) {
        float channel[S::R], x[S::R];
#pragma unroll
        for (int i = 0; i < S::R; ++i) {
            const int r = head.row(head.g, head.l, i);
            channel[i] = widen<false>(head.template staged<uint16_t>(S::CHANNEL)[r]), x[i] = head.template staged<float>(S::X)[r], y[i] = 0;
        }
#pragma unroll
        for (int j = 0; j < S::W; ++j) {
            const int n = 8 * (head.l + S::L * j);
            in_order();
            float step[8], b[8], c[8];
            eight(step, head.template at<float>(S::PER_STATE) + head.stage * S::N + n);
            if constexpr (!S::KEPT) eight(b, head.template staged<float>(S::B) + n), eight(c, head.template staged<float>(S::C) + n);
#pragma unroll
            for (int i = 0; i < S::R; ++i) {
                const auto* from = head.template staged<uint32_t>(head.run_at(i, j));
                uint32_t run[S::RUN / 4];
                if constexpr (S::BITS == 8) {
                    const uint64_t both = *reinterpret_cast<const uint64_t*>(from);
                    run[0] = uint32_t(both) ^ 0x80808080u, run[1] = uint32_t(both >> 32) ^ 0x80808080u;
                } else {
                    run[0] = *from;
                }
                decode<0>(run, i, j, channel[i], step);
                if constexpr (!S::KEPT) token(i, j, x[i], head.decay, b, c);
            }
            if constexpr (S::KEPT) {
                replay(head, j, n);
                eight(b, head.template staged<float>(S::B) + n), eight(c, head.template staged<float>(S::C) + n);
#pragma unroll
                for (int i = 0; i < S::R; ++i) token(i, j, x[i], head.decay, b, c);
            }
        }
    }

    // A run's new states, and what is read out of them.
    __device__ __forceinline__ void token(int i, int j, float x, float decay, const float* b, const float* c) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            u[i][j][k] = Head<S>::fresh(u[i][j][k], x, b[k], decay);
            y[i] = fused(u[i][j][k], c[k], y[i]);
        }
    }

    // The tokens of the window, one after the other, into chunk j, which begins at column n.
    __device__ __forceinline__ void replay(const Head<S>& head, int j, int n) {
#pragma unroll 1
        for (int t = 0; t < head.call.rows; ++t) {
            const KeptRow<S::P, S::N> row{head.kept(head.stage, t)};
            const float decay = row.decay();
            float b[8];
            eight(b, row.b() + n);
#pragma unroll
            for (int i = 0; i < S::R; ++i) {
                const float x = row.x()[head.row(head.g, head.l, i)];
#pragma unroll
                for (int k = 0; k < 8; ++k) u[i][j][k] = Head<S>::fresh(u[i][j][k], x, b[k], decay);
            }
        }
    }

    // Sums over a row's lanes of what every slot holds; the row of slot 0 is left.
    template <int COUNT> static __device__ __forceinline__ void across(float (&v)[S::R][COUNT]) {
        int live = S::R;
#pragma unroll
        for (int bit = S::L / 2; bit > 0; bit /= 2) {
            const int give = live > 1 ? live / 2 : 0;
            live = live > 1 ? live / 2 : 1;
#pragma unroll
            for (int i = 0; i < live; ++i)
#pragma unroll
                for (int k = 0; k < COUNT; ++k) v[i][k] = add(v[i][k], swap(v[i + give][k], bit));
        }
    }

    // Read-out and channel scale of this lane's row; puts 1 / channel of its slots into `inverses`.
    __device__ __forceinline__ void rows(const Head<S>& head, float (&inverses)[S::R]) {
        const int r = head.row(head.g, head.l, 0);
        const bool first = head.l % (S::L / S::R) == 0;
        float reads[S::R][1];
#pragma unroll
        for (int i = 0; i < S::R; ++i) reads[i][0] = y[i];
        across(reads);
        if (first) head.call.out[int64_t(head.unit) * S::P + r] = reads[0][0];
        float wide;
        if constexpr (S::FIXED) {
            wide = widen<false>(head.template staged<uint16_t>(S::CHANNEL)[r]);
        } else {
            float sums[S::R][8];
#pragma unroll
            for (int i = 0; i < S::R; ++i)
#pragma unroll
                for (int k = 0; k < 8; ++k) sums[i][k] = folded<0, S::W>(i, k);
            across(sums);
            float* s = sums[0];
#pragma unroll
            for (int h = 4; h > 0; h /= 2)
#pragma unroll
                for (int k = 0; k < h; ++k) s[k] = add(s[k], s[k + h]);
            const uint16_t channel = narrow<false>(clamped(root(multiply(s[0], 1.0f / S::N))));
            wide = widen<false>(channel);
            if (first) head.call.channel[int64_t(head.unit) * S::P + r] = channel;
        }
        if (first) head.template at<float>(S::WIDE)[r] = wide;
        inverses[0] = inverse(wide);
#pragma unroll
        for (int i = 1; i < S::R; ++i) inverses[i] = swap(inverses[0], i * (S::L / S::R));
    }

    // Sum of |u| over runs J, J + 1 .. J + COUNT - 1 of slot i, the second half added to the first.
    template <int J, int COUNT> __device__ __forceinline__ float folded(int i, int k) const { return fold<J, COUNT, 1>(i, k); }
    template <int J, int COUNT, int STEP> __device__ __forceinline__ float fold(int i, int k) const {
        // runs J, J + STEP, ...: halves of the row that are added last differ in the lowest bit of the run
        if constexpr (COUNT == 1)
            return size_of(u[i][J][k]);
        else
            return add(fold<J, COUNT / 2, 2 * STEP>(i, k), fold<J + STEP, COUNT / 2, 2 * STEP>(i, k));
    }

    // Largest of a run's columns over the lane's rows; with MULTIPLY once these are multiplied by what belongs to them.
    template <bool MULTIPLY>
    static __device__ __forceinline__ void most_of_run(float (&u)[S::R][S::W][8], const float (&by)[S::R], int j, Four (&most)[2]) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            float found = 0;
#pragma unroll
            for (int i = 0; i < S::R; ++i) {
                if constexpr (MULTIPLY) u[i][j][k] = multiply(u[i][j][k], by[i]);
                found = i == 0 ? size_of(u[i][j][k]) : more_or_nan(found, size_of(u[i][j][k]));
            }
            most[k / 4].at[k % 4] = found;
        }
    }

    // Divide by the channel scale; largest of each column over the warp's rows.
    __device__ __forceinline__ void divide_rows(const Head<S>& head, const float (&inverses)[S::R]) {
        float* mine = head.template at<float>(S::MOST) + head.warp * S::GROUPS * S::COLUMNS;
#pragma unroll
        for (int j = 0; j < S::W; ++j) {
            in_order();
            Four most[2];
            most_of_run<true>(u, inverses, j, most);
            auto* to = reinterpret_cast<Four*>(mine + head.g * S::COLUMNS + 8 * (head.l + S::L * j));
            to[0] = most[0], to[1] = most[1];
        }
        most_of_warp(head, mine);
    }

    // The largest of what the warp's groups of lanes have found for each column.
    static __device__ __forceinline__ void most_of_warp(const Head<S>& head, const float* mine) {
        sync_warp();
#pragma unroll
        for (int n = 0; n < S::N; n += 128) {
            if (n + 4 * head.lane >= S::N) break;
            Four most = *reinterpret_cast<const Four*>(mine + n + 4 * head.lane);
#pragma unroll
            for (int g = 1; g < S::GROUPS; g += 2) {
                if (g % 4 == 1) in_order();
                const auto* others = reinterpret_cast<const Four*>(mine + g * S::COLUMNS + n + 4 * head.lane);
                const Four one = others[0], two = g + 1 < S::GROUPS ? others[S::COLUMNS / 4] : one;
#pragma unroll
                for (int k = 0; k < 4; ++k) most.at[k] = most_of_three(most.at[k], one.at[k], two.at[k]);
            }
            *reinterpret_cast<Four*>(head.template at<float>(S::ALL) + head.warp * S::N + n + 4 * head.lane) = most;
        }
    }

    // A run of 4-bit codes. u / channel times 1 / step is off by five roundings of 2^-24 at 7, 0.14 of what is counted.
    // With a dither both are off by three more, and `halves` is HALVES and the dither.
    static __device__ __forceinline__ uint32_t eight_codes(const float* u, const float* times, const float* halves, uint32_t& middle) {
        uint32_t low[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) low[k] = bits_of(fused(u[k], times[k], S::DITHER ? halves[k] : HALVES));
        return packed(low, middle);
    }

    // Codes from 16 bits up, and the smallest of what is below them.
    static __device__ __forceinline__ uint32_t packed(const uint32_t (&low)[8], uint32_t& middle) {
#pragma unroll
        for (int k = 0; k < 8; k += 2) middle = less_halves(middle, permute(low[k], low[k + 1], 0x5410));
        const uint32_t even = permute(permute(low[0], low[2], 0x0062), permute(low[4], low[6], 0x0062), 0x5410);
        const uint32_t odd = permute(permute(low[1], low[3], 0x0062), permute(low[5], low[7], 0x0062), 0x5410);
        return (even & 0x0F0F0F0Fu) | ((odd << 4) & 0xF0F0F0F0u);
    }

    // A code of 8 bits in the lowest bits. A dither takes the largest number beyond the largest code.
    static __device__ __forceinline__ uint32_t rounded(float u, float times, const float* dither) {
        if constexpr (!S::DITHER) return bits_of(fused(u, times, MAGIC));
        return bits_of(add(less_of(more_of(fused(u, times, *dither), -S::QMAX), S::QMAX), MAGIC));
    }

    // Half a run of 8-bit codes; `differ` is no longer 0 where two bounds of the quotient round differently.
    static __device__ __forceinline__ uint32_t four_codes(
        const float* u, const float* less, const float* more, const float* dither, uint32_t& differ) {
        uint32_t low[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            low[k] = rounded(u[k], less[k], dither + k);
            differ |= low[k] ^ rounded(u[k], more[k], dither + k);
        }
        return permute(permute(low[0], low[1], 0x0040), permute(low[2], low[3], 0x0040), 0x5410);
    }

    // New codes into the place of the old ones; `careful` divides all of them.
    __device__ __forceinline__ void round(const Head<S>& head, bool careful) {
        uint32_t found[S::W][S::R][S::RUN / 4], differ = 0, middle = ~0u;
#pragma unroll
        for (int j = 0; j < S::W; ++j) {
            in_order();
            const int n = 8 * (head.l + S::L * j);
            float added[8];
            if constexpr (S::DITHER) eight(added, head.template at<float>(S::ADDED) + n);
            if constexpr (S::BITS == 4) {
                float times[8];
                eight(times, head.template at<float>(S::BOUNDS) + n);
#pragma unroll
                for (int i = 0; i < S::R; ++i) found[j][i][0] = eight_codes(u[i][j], times, added, middle);
            } else {
                float less[8], more[8];
                const auto* bounds = head.template at<Four>(S::BOUNDS) + n / 2;
#pragma unroll
                for (int k = 0; k < 8; k += 2) {
                    const Four four = bounds[k / 2];
                    less[k] = four.at[0], more[k] = four.at[1], less[k + 1] = four.at[2], more[k + 1] = four.at[3];
                }
#pragma unroll
                for (int i = 0; i < S::R; ++i)
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        found[j][i][h] = four_codes(u[i][j] + 4 * h, less + 4 * h, more + 4 * h, added + 4 * h, differ);
            }
        }
        // the smallest distance of a half; 0 and 1 are within what the product and the quotient may differ by
        if constexpr (S::BITS == 4) differ = (middle & 0xFFFFu) < 2 || middle >> 16 < 2;
        keep(head, found, careful || differ != 0);
    }

    // Codes of this lane, by division if `unsure`, into the place of the old ones.
    static __device__ __forceinline__ void keep(const Head<S>& head, const uint32_t (&found)[S::W][S::R][S::RUN / 4], bool unsure) {
        uint32_t lanes = ballot(unsure);
        if (!unsure) {
#pragma unroll
            for (int j = 0; j < S::W; ++j)
#pragma unroll
                for (int i = 0; i < S::R; ++i) {
                    auto* to = head.template staged<uint32_t>(head.run_at(i, j));
                    if constexpr (S::BITS == 8)
                        *reinterpret_cast<uint64_t*>(to) = uint64_t(found[j][i][1]) << 32 | found[j][i][0];
                    else
                        *to = found[j][i][0];
                }
        }
#pragma unroll 1
        for (; lanes != 0; lanes &= lanes - 1) divide_lane(head, first_of(lanes));
        copy_out(head);
    }

    // The warp's codes to where they stay.
    static __device__ __forceinline__ void copy_out(const Head<S>& head) {
        sync_warp();
        constexpr int STEP = 16 * 32;
        static_assert(STEP / S::ROW % (S::LINE * S::W) == 0, "pieces of a lane lie at one place of their rows");
        const int piece = 16 * head.lane, in = piece % S::ROW;
        const int from = Head<S>::place(head.warp * S::ROWS + piece / S::ROW, in / S::CHUNK) + in % S::CHUNK;
        unsigned char* to = head.call.codes + (int64_t(head.unit) * S::P + head.warp * S::ROWS) * S::ROW + piece;
#pragma unroll
        for (int i = 0; i < S::ROWS * S::ROW; i += STEP) *reinterpret_cast<Words*>(to + i) = *head.template staged<Words>(from + i);
    }

    // The codes of a lane, a byte at a time, by all lanes of the warp.
    static __device__ __forceinline__ void divide_lane(const Head<S>& head, int lane) {
        constexpr int BYTES = S::R * S::W * S::RUN;
#pragma unroll 1
        for (int i = head.lane; i < BYTES; i += 32) {
            const int l = lane % S::L, byte = i % S::RUN, j = i / S::RUN % S::W;
            const int r = head.row(lane / S::L, l, i / (S::RUN * S::W)), n = 8 * (l + S::L * j) + byte * 8 / S::BITS;
            uint32_t code = uint32_t(head.exact_code(r, n));
            if constexpr (S::BITS == 4) code = (code & 15) | uint32_t(head.exact_code(r, n + 1)) << 4;
            head.template staged<uint8_t>(Head<S>::place(r, j))[l * S::RUN + byte] = uint8_t(code);
        }
    }
};

// State scales and what codes are multiplied by. Whether the scales are so small or large that codes need care.
template <class S> __device__ __forceinline__ bool columns(const Head<S>& head) {
    bool careful = false;
#pragma unroll
    for (int first = 0; first < S::N; first += S::THREADS) {
        const int n = first + head.thread;
        if (n >= S::N) break; // a whole warp
        const float* all = head.template at<float>(S::ALL) + n;
        float most = all[0];
#pragma unroll
        for (int w = 1; w < S::WARPS; ++w) most = more_or_nan(most, all[w * S::N]);
        // The true maximum lies within two units of the last place. Where fp16 may round it differently, divide; beyond
        // fp16's normal numbers always, because there a scale may be far below the maximum that it stands for.
        const bool usual = most >= NORMAL && most < LARGEST;
        const bool unsure = usual ? ((bits_of(most) + 0x1002u) & 0x1FFFu) < 5 : most != 0;
        careful |= !usual && most != 0;
#pragma unroll 1
        for (uint32_t lanes = ballot(unsure); lanes != 0; lanes &= lanes - 1) {
            const int lane = first_of(lanes);
            const float exact = head.exact_most(n - head.lane + lane);
            if (lane == head.lane) most = exact;
        }
        const uint16_t scale = narrow<false>(clamped(most));
        head.call.scale[int64_t(head.unit) * S::N + n] = scale;
        const float step = per_state<S>(widen<false>(scale)), times = inverse(step);
        head.template at<float>(S::NEW)[n] = step;
        constexpr float less = S::DITHER ? LESS_OF_PRODUCT : LESS, more = S::DITHER ? MORE_OF_PRODUCT : MORE;
        if constexpr (S::BITS == 4) head.template at<float>(S::BOUNDS)[n] = times;
        else head.template at<Two>(S::BOUNDS)[n] = {multiply(times, less), multiply(times, more)};
        if constexpr (S::DITHER) head.template at<float>(S::ADDED)[n] = S::BITS == 4 ? add(dither_of(scale), HALVES) : dither_of(scale);
    }
    return careful;
}

} // namespace llmcompress::gpu
