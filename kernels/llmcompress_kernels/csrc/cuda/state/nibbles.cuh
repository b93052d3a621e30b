// 4-bit states in units of the old step: the same codes and scales as update.cuh by fewer instructions.
//
// update.cuh computes what the definition says, in the definition's order. Here, as in csrc/cpu/state/nibbles.h, everything
// is in units of the old step of its row and column, in which the fresh state is the old code and one fused product for
// every token that is taken in,
//
//   w = code + sum_k z_rk B_vk / s_v,     u = rate_r s_v w,     z_rk = E_k x_rk / rate_r,     rate_r = D channel_r,
//
// E_k the decays after token k, D all of them, s the stored state scale over 7. Where D is so small that it could not be
// divided by, the codes are multiplied by it instead, and rate_r is channel_r. What is common to a row or a column is
// multiplied in where rows or columns are few. The result U is not the definition's u, but with e = 2^-24, R tokens and
// T_k = |E_k x_k B_k|
//
//   |U - u| <= (4 R + 2.1) e |u| + (4 R + 8) e sum T_k     and     <= (4 R + 2.1) e T + e sum (4 (R - k) + 9.5) T_k,
//
// T the code's part: nibbles.h counts these roundings, of which T_k has two fewer here. A scale or a code is taken only
// where every number within that distance rounds to it. The others are computed again by the definition: of a head of normal
// numbers some 0.3 channel scales, 0.3 state scales and 0.4 codes, in windows of 4 some 0.4, 1 and 0.7 (counted on the host).
//
// Per state, R tokens taken in:
//
//   old code            LOP3, and a fused product takes its exponent away                                   2
//   fresh state         one fused product a token                                                           R
//   read-out            one fused product                                                                   1
//   channel scale       |w| times s, fused into the sum; not if calibrated                                  1
//   state scale         u / channel, largest; the largest alone if calibrated                               2
//   new code            one fused product with 16 digits behind the point, the smallest of these            2
//   pack                                                                                                    1
//
// beside 9 + 3 R, 1.3 for the channel scale and 1 in update.cuh.
#pragma once

#include "update.cuh"

namespace llmcompress::gpu {

constexpr float ROUNDING = 0x1p-24f;   // by which one rounding may be off
constexpr float QUOTIENT = 6.4f;       // roundings of u / channel, ours and the definition's
constexpr float FAR = 0x1p50f;         // what z and B / s may be at most, so that nothing overflows
constexpr float SLOW = 0x1p-60f;       // what all decays may be at least, so that they can be divided by
constexpr float GROWTH = 0x1p20f;      // and at most
constexpr float MOST_WORST = 0x1p14f;  // beyond that, in 2^-24, hardly a code would be sure

template <class S> struct Nibbles {
    static_assert(S::UNITS && S::BITS == 4, "");
    static constexpr int HALF = S::N / 2; // columns between both fours of a run

    float w[S::R][S::W][8]; // fresh states in units of the old step, then over the new channel scale
    float y[S::R], sizes[S::R];
    float all; // decays

    static __device__ __forceinline__ int rows_of(const Head<S>& head) {
        if constexpr (S::KEPT) return head.call.rows;
        return 0;
    }

    // Roundings in |u|.
    static __device__ __forceinline__ float of_state(const Head<S>& head) { return fused(4.0f, float(rows_of(head) + 1), 2.1f); }
    // Those in an input |E_k x B|; of all tokens, and of token k.
    static __device__ __forceinline__ float of_input(const Head<S>& head) {
        return S::KEPT ? fused(4.0f, float(rows_of(head) + 1), 8.0f) : 10.0f;
    }
    static __device__ __forceinline__ float of_input(const Head<S>& head, int k) {
        return S::KEPT ? fused(4.0f, float(rows_of(head) + 1 - k), 5.5f) : 10.0f;
    }

    static __device__ __forceinline__ bool turned(float all) { return !(all >= SLOW); }

    static constexpr int ROW = KeptRow<S::P, S::N>::BYTES; // of a window

    // Inputs of token k: z by row, and B / s by column.
    static __device__ __forceinline__ float* z(const Head<S>& head, int k) {
        return head.template at<float>(S::BYTES + 2 * rows_of(head) * ROW + k * S::INPUTS);
    }
    static __device__ __forceinline__ float* f(const Head<S>& head, int k) { return z(head, k) + S::P; }

    // A run of this lane from what lies by place_of.
    static __device__ __forceinline__ void eight(float* to, const float* from, int run) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const Four four = *reinterpret_cast<const Four*>(from + h * HALF + 4 * run);
#pragma unroll
            for (int k = 0; k < 4; ++k) to[4 * h + k] = four.at[k];
        }
    }

    // What rows, columns and tokens have in common; true where numbers are so far apart that only the definition will do. A warp
    // takes a token: a lane has two rows and four columns.
    __device__ __forceinline__ bool prepare(const Head<S>& head) {
        const int rows = rows_of(head), column = 4 * head.lane;
        all = 1;
        if constexpr (S::KEPT) {
            const unsigned char* row = head.kept(head.stage, 0);
#pragma unroll 1
            for (int k = 0; k < rows; ++k, row += ROW) all = multiply(all, KeptRow<S::P, S::N>{const_cast<unsigned char*>(row)}.decay());
        }
        all = multiply(all, head.decay);
        const uint32_t channels = head.template staged<uint32_t>(S::CHANNEL)[head.lane];
        Two rate{widen<false>(uint16_t(channels)), widen<false>(uint16_t(channels >> 16))};
        if (!turned(all)) rate = {multiply(all, rate.x), multiply(all, rate.y)};
        const Two inverses{inverse(rate.x), inverse(rate.y)};
        const bool has_columns = column < S::N;
        Four over{};
        if (has_columns) {
            const Four size = *reinterpret_cast<const Four*>(head.template at<float>(S::PER_STATE) + head.stage * S::N + column);
            if (head.warp == S::WARPS - 1) {
                Four c = *reinterpret_cast<const Four*>(head.template staged<float>(S::C) + column);
#pragma unroll
                for (int i = 0; i < 4; ++i) c.at[i] = multiply(c.at[i], size.at[i]);
                *reinterpret_cast<Four*>(head.template at<float>(S::READ) + S::place_of(column)) = c;
                *reinterpret_cast<Four*>(head.template at<float>(S::SIZES) + S::place_of(column)) = size;
                head.template at<Two>(S::RATE)[head.lane] = rate;
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) over.at[i] = inverse(size.at[i]);
        }
        // the largest of inputs, and of decays behind a token
        float most = 0, behind = 1, grown = all;
        const auto input = [&](const float* x, const float* b, int k) {
            float* to = z(head, k);
            Two found = reinterpret_cast<const Two*>(x)[head.lane];
            found = {multiply(multiply(found.x, behind), inverses.x), multiply(multiply(found.y, behind), inverses.y)};
            reinterpret_cast<Two*>(to)[head.lane] = found;
            most = more_or_nan(more_or_nan(most, size_of(found.x)), size_of(found.y));
            float sum = 0;
            if (has_columns) {
                Four four = *reinterpret_cast<const Four*>(b + column);
                sum = add(add(size_of(four.at[0]), size_of(four.at[1])), add(size_of(four.at[2]), size_of(four.at[3])));
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    four.at[i] = multiply(four.at[i], over.at[i]);
                    most = more_or_nan(most, size_of(four.at[i]));
                }
                *reinterpret_cast<Four*>(to + S::P + S::place_of(column)) = four;
            }
#pragma unroll
            for (int bit = 16; bit > 0; bit /= 2) sum = add(sum, swap(sum, bit));
            if (head.lane == 0) head.template at<float>(S::SUMS)[k] = sum;
        };
        if (rows % S::WARPS == head.warp) input(head.template staged<float>(S::X), head.template staged<float>(S::B), rows);
        if constexpr (S::KEPT) {
            float last = head.decay;
            unsigned char* at = head.kept(head.stage, rows);
#pragma unroll 1
            for (int k = rows - 1; k >= 0; --k) {
                at -= ROW;
                behind = multiply(behind, last), grown = more_or_nan(grown, behind);
                const KeptRow<S::P, S::N> row{at};
                last = row.decay();
                if (k % S::WARPS == head.warp) input(row.x(), row.b(), k);
            }
        }
        return !(most <= FAR && grown <= GROWTH);
    }

    template <int K> __device__ __forceinline__ void decode(const uint32_t (&run)[1], int i, int j) {
        w[i][j][K] = Head<S>::template code<K>(run);
        if constexpr (K < 7) decode<K + 1>(run, i, j);
    }

    __device__ __forceinline__ void fill(const Head<S>& head) {
#pragma unroll
        for (int j = 0; j < S::W; ++j)
#pragma unroll
            for (int i = 0; i < S::R; ++i) {
                const uint32_t run[1] = {*head.template staged<uint32_t>(head.run_at(i, j))};
                decode<0>(run, i, j);
            }
        if (turned(all))
#pragma unroll
            for (int j = 0; j < S::W; ++j)
#pragma unroll
                for (int i = 0; i < S::R; ++i)
#pragma unroll
                    for (int k = 0; k < 8; ++k) w[i][j][k] = multiply(w[i][j][k], all);
#pragma unroll 1
        for (int t = 0; t <= rows_of(head); ++t) {
            float by[S::R];
#pragma unroll
            for (int i = 0; i < S::R; ++i) by[i] = z(head, t)[head.row(head.g, head.l, i)];
#pragma unroll
            for (int j = 0; j < S::W; ++j) {
                float input[8];
                eight(input, f(head, t), head.l + S::L * j);
#pragma unroll
                for (int i = 0; i < S::R; ++i)
#pragma unroll
                    for (int k = 0; k < 8; ++k) w[i][j][k] = fused(by[i], input[k], w[i][j][k]);
            }
        }
#pragma unroll
        for (int j = 0; j < S::W; ++j) {
            in_order();
            float read[8], size[8];
            eight(read, head.template at<float>(S::READ), head.l + S::L * j);
            if constexpr (!S::FIXED) eight(size, head.template at<float>(S::SIZES), head.l + S::L * j);
#pragma unroll
            for (int i = 0; i < S::R; ++i) {
                if (j == 0) y[i] = sizes[i] = 0;
                float sum = 0; // of a run, so that few roundings lie one behind the other
#pragma unroll
                for (int k = 0; k < 8; ++k) {
                    y[i] = fused(w[i][j][k], read[k], y[i]);
                    if constexpr (!S::FIXED) sum = fused(size_of(w[i][j][k]), size[k], sum);
                }
                sizes[i] = add(sizes[i], sum);
            }
        }
    }

    // Read-out and channel scale of this lane's row; puts what its slots' w are multiplied by into `factors`.
    __device__ __forceinline__ void rows(const Head<S>& head, float (&factors)[S::R]) {
        const int r = head.row(head.g, head.l, 0);
        const bool first = head.l % (S::L / S::R) == 0;
        float sums[S::R][S::FIXED ? 1 : 2];
#pragma unroll
        for (int i = 0; i < S::R; ++i) {
            sums[i][0] = y[i];
            if constexpr (!S::FIXED) sums[i][1] = sizes[i];
        }
        Tile<S>::across(sums);
        const float rate = head.template at<float>(S::RATE)[r];
        if (first) head.call.out[int64_t(head.unit) * S::P + r] = multiply(sums[0][0], rate);
        float factor = 1;
        if constexpr (S::FIXED) {
            if (first) head.template at<float>(S::WIDE)[r] = widen<false>(head.template staged<uint16_t>(S::CHANNEL)[r]);
        } else {
            const float wide = channel(head, r, first, rate, multiply(sums[0][1], multiply(rate, 1.0f / S::N)));
            factor = multiply(rate, inverse(wide));
            factors[0] = factor;
#pragma unroll
            for (int i = 1; i < S::R; ++i) factors[i] = swap(factor, i * (S::L / S::R));
        }
        // how far inputs of a token may be off in units of B / s, and codes: the largest of the warp's rows
        auto* reach = head.template at<float>(S::REACH) + head.warp;
        const float* input = z(head, 0) + r;
        float roundings = of_input(head, 0);
#pragma unroll 1
        for (int k = 0; k <= rows_of(head); ++k, input += S::INPUTS / 4, roundings = add(roundings, -4.0f)) {
            const float most = multiply(float_of(largest(bits_of(size_of(multiply(*input, factor))))), roundings);
            if (head.lane == 0) reach[4 * k] = most;
        }
        const float most = multiply(float_of(largest(bits_of(size_of(factor)))), multiply(8.0f, of_state(head)));
        if (head.lane == 0) reach[4 * TOKENS] = most;
    }

    // New channel scale of row r, whose |u| have this mean.
    static __device__ __forceinline__ float channel(const Head<S>& head, int r, bool first, float rate, float mean) {
        // sum of |E_k x_k| |B_k| over rate
        float inputs = 0;
        const float *input = z(head, 0) + r, *sums = head.template at<float>(S::SUMS);
#pragma unroll 1
        for (int k = 0; k <= rows_of(head); ++k, input += S::INPUTS / 4, ++sums) inputs = fused(size_of(*input), *sums, inputs);
        // half of a mean's distance is its root's
        inputs = multiply(multiply(inputs, rate), multiply(0.51f * ROUNDING / S::N, of_input(head)));
        // Relative distance of the root: half of the mean's, to which belong roundings of our sum, as many as lie one behind the
        // other, and log2 N of the definition's; three roundings and the root's own two follow.
        constexpr int OURS = 8 + S::W + (S::L == 8 ? 3 : 2), THEIRS = S::N == 128 ? 7 : 6;
        static_assert((S::L == 8 || S::L == 4) && (S::N == 128 || S::N == 64), "");
        const float of_root = multiply(fused(0.5f, of_state(head), 0.5f * (OURS + THEIRS) + 5.6f), ROUNDING);
        const float off = fused(inputs, about_inverse(more_of(mean, 1e-30f)), of_root), found = about_root(mean);
        uint16_t scale = narrow<false>(clamped(fused(-found, off, found)));
        const bool unsure = scale != narrow<false>(clamped(fused(found, off, found))) || !(off < 1e-2f);
#pragma unroll 1
        for (uint32_t lanes = ballot(unsure && first); lanes != 0; lanes &= lanes - 1) {
            const int lane = first_of(lanes), again = head.row(lane / S::L, lane % S::L, 0);
            float unread;
            const float exact = exact_mean(head, again, unread);
            if (again == r) scale = narrow<false>(clamped(root(exact)));
        }
        float wide = widen<false>(scale);
        if constexpr (S::L > S::R) {
            // two lanes have the row: an approximate instruction need not give both the same
            static_assert(S::L == 2 * S::R, "");
            const float other = swap(wide, 1);
            wide = first ? wide : other;
        }
        if (first) {
            head.call.channel[int64_t(head.unit) * S::P + r] = scale;
            head.template at<float>(S::WIDE)[r] = wide;
        }
        return wide;
    }

    // The mean of |u| of row r, summed as the definition does, and its read-out; all lanes of the warp.
    static __device__ float exact_mean(const Head<S>& head, int r, float& read) {
        float part[S::N / 32];
        read = 0;
#pragma unroll
        for (int j = 0; j < S::N / 32; ++j) {
            const float u = head.again(r, head.lane + 32 * j);
            part[j] = size_of(u), read = fused(u, head.template staged<float>(S::C)[head.lane + 32 * j], read);
        }
#pragma unroll
        for (int h = S::N / 64; h > 0; h /= 2)
#pragma unroll
            for (int j = 0; j < h; ++j) part[j] = add(part[j], part[j + h]);
#pragma unroll
        for (int bit = 16; bit > 0; bit /= 2) part[0] = add(part[0], swap(part[0], bit)), read = add(read, swap(read, bit));
        return multiply(part[0], 1.0f / S::N);
    }

    // Read-outs and channel scales of the warp's rows by the definition, in place of fill, rows and divide.
    static __device__ __forceinline__ void exact_rows(const Head<S>& head) {
#pragma unroll 1
        for (int r = head.warp * S::ROWS; r < (head.warp + 1) * S::ROWS; ++r) {
            float read;
            const float mean = exact_mean(head, r, read);
            uint16_t scale;
            if constexpr (S::FIXED) scale = head.template staged<uint16_t>(S::CHANNEL)[r];
            else scale = narrow<false>(clamped(root(mean)));
            if (head.lane != 0) continue;
            head.call.out[int64_t(head.unit) * S::P + r] = read;
            head.template at<float>(S::WIDE)[r] = widen<false>(scale);
            if constexpr (!S::FIXED) head.call.channel[int64_t(head.unit) * S::P + r] = scale;
        }
    }

    // Over the new channel scale; largest of each column over the warp's rows.
    __device__ __forceinline__ void divide(const Head<S>& head, const float (&factors)[S::R]) {
        float* mine = head.template at<float>(S::MOST) + head.warp * S::GROUPS * S::COLUMNS;
#pragma unroll
        for (int j = 0; j < S::W; ++j) {
            in_order();
            Four most[2];
            Tile<S>::template most_of_run<!S::FIXED>(w, factors, j, most);
            auto* to = reinterpret_cast<Four*>(mine + head.g * S::COLUMNS + 4 * (head.l + S::L * j));
            to[0] = most[0], to[HALF / 4] = most[1];
        }
        Tile<S>::most_of_warp(head, mine);
    }

    // New codes; `worst`: how far values of codes may be from the definition's, in 2^-24.
    __device__ __forceinline__ void round(const Head<S>& head, float worst) {
        // Beside that, quotients and products of numbers up to 8 with what was left out are off by 128. What is that near to the
        // middle between two codes is a number of digits, 2^-16 each, on both sides of it. HALVES leaves 1 for each.
        const bool careful = !(worst <= MOST_WORST);
        const float digits = careful ? 1.0f : nearest(fused(worst, 1.02f / 256, 0.5f));
        const float more = multiply(add(digits, -1.0f), 0x1p-16f);
        const uint32_t sure = uint32_t(int(fused(2.0f, digits, 1.0f)));
        uint32_t found[S::W][S::R], unsure = 0; // runs with a code that is not, a bit each
#pragma unroll
        for (int j = 0; j < S::W; ++j) {
            in_order();
            uint32_t middle = ~0u;
            float times[8], added[8];
            eight(times, head.template at<float>(S::BOUNDS), head.l + S::L * j);
            if constexpr (S::DITHER) eight(added, head.template at<float>(S::ADDED), head.l + S::L * j);
#pragma unroll
            for (int k = 0; k < 8; ++k) added[k] = add(S::DITHER ? added[k] : HALVES, more);
#pragma unroll
            for (int i = 0; i < S::R; ++i) {
                uint32_t low[8];
#pragma unroll
                for (int k = 0; k < 8; ++k) low[k] = bits_of(fused(w[i][j][k], times[k], added[k]));
                found[j][i] = Tile<S>::packed(low, middle);
            }
            unsure |= uint32_t((middle & 0xFFFFu) < sure || middle >> 16 < sure) << j;
        }
        if (careful) unsure = (1u << S::W) - 1;
        // whoever divides reads the old codes of its run only
#pragma unroll
        for (int j = 0; j < S::W; ++j) {
            if ((unsure >> j & 1) != 0) continue;
#pragma unroll
            for (int i = 0; i < S::R; ++i) *head.template staged<uint32_t>(head.run_at(i, j)) = found[j][i];
        }
        if (ballot(unsure != 0) != 0) {
#pragma unroll 1
            for (int j = 0; j < S::W; ++j)
#pragma unroll 1
                for (uint32_t lanes = ballot((unsure >> j & 1) != 0); lanes != 0; lanes &= lanes - 1) divide_run(head, first_of(lanes), j);
        }
        Tile<S>::copy_out(head);
    }

    // The codes of a lane's rows in one run of eight columns, one by each lane of the warp, by division.
    static __device__ __forceinline__ void divide_run(const Head<S>& head, int lane, int j) {
        static_assert(S::R == 4, "four rows of eight codes");
        const int l = lane % S::L, k = head.lane % 8, r = head.row(lane / S::L, l, head.lane / 8);
        const int code = head.exact_code(r, 8 * (l + S::L * j) + k) & 15;
        const int next = int(bits_of(swap(float_of(uint32_t(code)), 1)));
        // all have read the run
        if (k % 2 == 0) head.template staged<uint8_t>(Head<S>::place(r, j))[l * S::RUN + k / 2] = uint8_t(code | next << 4);
    }
};

// Columns of a thread: they lie BETWEEN apart. Of 64 columns half of 128 threads have none.
template <class S> struct Columns {
    static constexpr int EACH = (S::N + S::THREADS - 1) / S::THREADS, BETWEEN = S::THREADS / 2;
    static __device__ __forceinline__ bool some(const Head<S>& head) { return S::N >= S::THREADS || head.thread < S::N; }
};

// How far u / channel of this thread's columns may be from the definition's in any row, in 2^-24; `most`: the largest.
template <class S, int EACH>
__device__ __forceinline__ void apart(const Head<S>& head, const float (&most)[EACH], float (&found)[EACH]) {
    const Four* reach = head.template at<Four>(S::REACH);
    const auto of_warps = [](Four each) { // whose rows are all of them
        float all = each.at[0];
#pragma unroll
        for (int w = 1; w < S::WARPS; ++w) all = more_or_nan(all, each.at[w]);
        return all;
    };
    const float of_codes = S::KEPT ? of_warps(reach[TOKENS]) : Nibbles<S>::of_state(head);
#pragma unroll
    for (int i = 0; i < EACH; ++i) found[i] = S::KEPT ? of_codes : multiply(most[i], of_codes);
    const float* input = Nibbles<S>::f(head, 0) + S::place_of(head.thread);
#pragma unroll 1
    for (int left = Nibbles<S>::rows_of(head); left >= 0; --left, ++reach, input += S::INPUTS / 4) {
        const float by = of_warps(*reach);
#pragma unroll
        for (int i = 0; i < EACH; ++i) found[i] = fused(by, size_of(input[i * Columns<S>::BETWEEN]), found[i]);
    }
}

// The largest |u| / channel of a column, by division, where rows of a warp come near to it; all lanes of the warp.
template <class S> __device__ __forceinline__ float exact_most(const Head<S>& head, int n, float near) {
    constexpr int WARPS = 32 / S::ROWS > 1 ? 32 / S::ROWS : 1; // whose rows the lanes look at together
    const float* all = head.template at<float>(S::ALL) + S::place_of(n);
    float most = 0;
#pragma unroll 1
    for (int first = 0; first < S::P; first += 32, all += WARPS * S::N) {
        float some = all[0];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) some = more_or_nan(some, all[w * S::N]);
        if (some < near) continue;
        const int r = first + head.lane;
        most = more_or_nan(most, divide(size_of(head.again(r, n)), head.template at<float>(S::WIDE)[r]));
    }
    return float_of(largest(bits_of(most)));
}

// State scales and what codes are multiplied by; how far, in 2^-24, values of codes may be from the definition's at most, beyond
// all bounds where they have to be divided.
template <class S> __device__ __forceinline__ float columns(const Head<S>& head, float all, bool far) {
    using Mine = Columns<S>;
    float worst = far ? INFINITY : 0.0f;
    if (!Mine::some(head)) return worst; // a whole warp
    const int at = S::place_of(head.thread);
    float most[Mine::EACH], distance[Mine::EACH];
#pragma unroll
    for (int i = 0; i < Mine::EACH; ++i) {
        const float* found = head.template at<float>(S::ALL) + at + i * Mine::BETWEEN;
        most[i] = found[0];
#pragma unroll
        for (int w = 1; w < S::WARPS; ++w) most[i] = more_or_nan(most[i], found[w * S::N]);
    }
    apart<S>(head, most, distance);
#pragma unroll
    for (int i = 0; i < Mine::EACH; ++i) {
        const int n = head.thread + i * S::THREADS, place = at + i * Mine::BETWEEN;
        float unit = head.template at<float>(S::SIZES)[place];
        if constexpr (S::FIXED) unit = Nibbles<S>::turned(all) ? unit : multiply(unit, all);
        const float off = multiply(fused(most[i], QUOTIENT, distance[i]), ROUNDING);
        float found = multiply(most[i], unit);
        uint16_t scale = narrow<false>(clamped(multiply(add(most[i], -off), unit)));
        const uint16_t high = narrow<false>(clamped(multiply(add(most[i], off), unit)));
#pragma unroll 1
        for (uint32_t lanes = ballot(far || scale != high || !(off <= LARGEST)); lanes != 0; lanes &= lanes - 1) {
            const int lane = first_of(lanes);
            // what may be the largest is not far below what was found
            const float least = far ? 0.0f : more_of(fused(-2.1f, off, most[i]), 0.0f);
            const float near = float_of(largest(lane == head.lane ? bits_of(least) : 0));
            const float exact = exact_most(head, n - head.lane + lane, near);
            if (lane == head.lane) found = exact, scale = narrow<false>(clamped(exact));
        }
        // beyond fp16's normal numbers a scale may be far below the maximum that it stands for
        if (found != 0 && !(found >= NORMAL && found < LARGEST)) worst = INFINITY;
        head.call.scale[int64_t(head.unit) * S::N + n] = scale;
        const float wide = widen<false>(scale), times = multiply(unit, multiply(S::QMAX, inverse(wide)));
        head.template at<float>(S::NEW)[n] = per_state<S>(wide);
        head.template at<float>(S::BOUNDS)[place] = times;
        worst = more_or_nan(worst, multiply(distance[i], times));
        if constexpr (S::DITHER) head.template at<float>(S::ADDED)[place] = add(dither_of(scale), HALVES);
    }
    return worst;
}

// The largest of what the threads of a block have, none of it negative, NaN above all; a barrier.
template <class S> __device__ __forceinline__ float largest_of_block(const Head<S>& head, float v) {
    const uint32_t mine = largest(bits_of(v));
    if (head.lane == 0) head.template at<float>(S::WORST)[head.warp] = float_of(mine);
    sync();
    const Four each = *head.template at<Four>(S::WORST);
    float found = each.at[0];
#pragma unroll
    for (int w = 1; w < S::WARPS; ++w) found = more_or_nan(found, each.at[w]);
    return found;
}

} // namespace llmcompress::gpu
