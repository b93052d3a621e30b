// The column loop on one tile of rows, in GCC's vector types, compiled to what the including file's target offers.
//
// A tile is held as [K, 32]: a column of 32 rows is two vectors, and all its work fits the second-level cache, so the
// update of the columns after a block is a product of two small matrices that never leave it. Rounding is that of the
// definition (llmcompress/algorithms/gptq.py and grids.py): to the nearest, ties to even, codes after a true division.
// Only sums may differ in their last bits.
#include <cstring>

#include "columns.h"

namespace LLMCOMPRESS_ISA {

using namespace llmcompress::columns;

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));

constexpr float kHalfMax = 65504.f;
constexpr float kHalfTiny = 0x1p-24f;
constexpr float kHalfNormal = 0x1p-14f;
// adding and taking away 1.5 * 2^23 rounds values below 2^22 to the nearest integer
constexpr float kMagic = 12582912.f;

inline F16 load(const float* p) {
    F16 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, F16 v) { std::memcpy(p, &v, sizeof v); }
inline F16 spread(float x) { return x - F16{}; }
inline F16 least(F16 a, F16 b) { return a < b ? a : b; }
inline F16 most(F16 a, F16 b) { return a > b ? a : b; }
inline F16 clamp(F16 x, F16 low, F16 high) { return least(most(x, low), high); }
inline F16 rounded(F16 x) { return (x + kMagic) - kMagic; }

// The nearest fp16 value of x in [2^-24, 65504].
inline F16 to_half(F16 x) {
    const U16 bits = (U16)x;
    const F16 normal = (F16)((bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fffu);
    const F16 small = rounded(x * 0x1p24f) * 0x1p-24f;
    return x < spread(kHalfNormal) ? small : normal;
}

inline uint16_t half_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return x < kHalfNormal ? uint16_t(x * 0x1p24f) : uint16_t((bits >> 13) - (112u << 10));
}

struct Solver {
    const Problem& p;
    const float* factor;
    float *work, *codes, *errors, *scales, *zeros, *importance, *reciprocal;
    const float top;

    // Scale and zero point that cover [low, high].
    inline void cover(F16 low, F16 high, F16& scale, F16& zero) const {
        const I16 empty = (low == F16{}) & (high == F16{});
        F16 s = p.symmetric ? most(-low, high) * (2.f / top) : (high - low) / top;
        s = to_half(clamp(s, spread(kHalfTiny), spread(kHalfMax)));
        scale = empty ? spread(1.f) : s;
        zero = p.symmetric ? spread(float(p.midpoint)) : rounded(clamp(-low / scale, F16{}, spread(top)));
    }

    // Squared rounding error of the group under a grid, weighted.
    inline F16 cost(const float* values, int64_t start, int64_t size, F16 scale, F16 zero) const {
        const F16 inverse = 1.f / scale, high = spread(top);
        F16 sum{};
        for (int64_t c = 0; c < size; ++c) {
            const F16 exact = load(values + c * kTile) * inverse + zero;
            const F16 error = rounded(clamp(exact, F16{}, high)) - exact;
            sum += error * error * importance[start + c];
        }
        return sum * scale * scale;
    }

    // Grid of the group that starts at a column, for 16 rows.
    inline void find(int64_t start, int lane) const {
        const int64_t index = start / p.group, size = start + p.group < p.columns ? p.group : p.columns - start;
        const float* values = work + start * kTile + lane;
        F16 low{}, high{};
        for (int64_t c = 0; c < size; ++c) {
            const F16 v = load(values + c * kTile);
            low = least(low, v);
            high = most(high, v);
        }
        F16 scale, zero, fraction = spread(1.f);
        cover(low, high, scale, zero);
        if (p.coarse_count + p.fine_count > 0) {
            F16 best = cost(values, start, size, scale, zero);
            const auto attempt = [&](F16 share) {
                F16 s, z;
                cover(low * share, high * share, s, z);
                const F16 error = cost(values, start, size, s, z);
                const I16 better = error < best;
                scale = better ? s : scale;
                zero = better ? z : zero;
                best = better ? error : best;
                fraction = better ? share : fraction;
            };
            for (int64_t i = 0; i < p.coarse_count; ++i) attempt(spread(p.coarse[i]));
            const F16 centre = fraction;
            for (int64_t i = 0; i < p.fine_count; ++i) attempt(centre + p.fine[i]);
        }
        store(scales + index * kTile + lane, scale);
        store(zeros + index * kTile + lane, zero);
    }

    // Quantize columns [start, stop); each one's error is spread over those after it.
    inline void block(int64_t start, int64_t stop) const {
        for (int64_t column = start; column < stop; ++column) {
            if (column % p.group == 0)
                for (int lane = 0; lane < kTile; lane += 16) find(column, lane);
            const int64_t grid = column / p.group * kTile;
            F16 error[2];
            for (int half = 0; half < 2; ++half) {
                const int64_t at = column * kTile + 16 * half;
                const F16 value = load(work + at), scale = load(scales + grid + 16 * half);
                const F16 zero = load(zeros + grid + 16 * half);
                const F16 steps = rounded(clamp(value / scale, -zero, top - zero));
                store(codes + at, steps + zero);
                store(work + at, steps * scale);
                error[half] = (value - steps * scale) * reciprocal[column];
                store(errors + (column - start) * kTile + 16 * half, error[half]);
            }
            const float* row = factor + column * p.columns;
            for (int64_t c = column + 1; c < stop; ++c) {
                float* target = work + c * kTile;
                store(target, load(target) - error[0] * row[c]);
                store(target + 16, load(target + 16) - error[1] * row[c]);
            }
        }
    }

    // Columns [first, first + Count) after a block: work -= factor[block, columns]^T errors.
    template <int Count>
    inline void update(int64_t start, int64_t stop, int64_t first) const {
        F16 sum[Count][2];
#pragma GCC unroll 8
        for (int i = 0; i < Count; ++i) sum[i][0] = sum[i][1] = F16{};
        for (int64_t j = 0; j < stop - start; ++j) {
            const float* row = factor + (start + j) * p.columns + first;
            const F16 e0 = load(errors + j * kTile), e1 = load(errors + j * kTile + 16);
#pragma GCC unroll 8
            for (int i = 0; i < Count; ++i) {
                sum[i][0] += e0 * row[i];
                sum[i][1] += e1 * row[i];
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < Count; ++i) {
            float* target = work + (first + i) * kTile;
            store(target, load(target) - sum[i][0]);
            store(target + 16, load(target + 16) - sum[i][1]);
        }
    }

    inline void run() const {
        for (int64_t i = 0; i < p.blocks; ++i) {
            const int64_t start = p.bounds[2 * i], stop = p.bounds[2 * i + 1];
            block(start, stop);
            int64_t first = stop;
            for (; first + 8 <= p.columns; first += 8) update<8>(start, stop, first);
            for (; first < p.columns; ++first) update<1>(start, stop, first);
        }
    }
};

// Rows beyond the last are filled with zeros and left out of what is written.
inline void solve_tile(const Problem& p, int64_t expert, int64_t first_row, float* scratch) {
    const int64_t columns = p.columns, rows = p.rows - first_row < kTile ? p.rows - first_row : kTile;
    const float* factor = p.factor + expert * columns * columns;
    float* const codes = scratch + kTile * columns;
    float* const errors = codes + kTile * columns;
    float* const scales = errors + kTile * longest(p);
    float* const zeros = scales + kTile * p.groups;
    float* const importance = zeros + kTile * p.groups;
    float* const reciprocal = importance + columns;
    const Solver solver{p, factor, scratch, codes, errors, scales, zeros, importance, reciprocal, float(p.levels - 1)};
    const int64_t* order = p.order == nullptr ? nullptr : p.order + expert * columns;
    const auto place = [order](int64_t column) { return order == nullptr ? column : order[column]; };
    for (int64_t c = 0; c < columns; ++c) {
        reciprocal[c] = 1.f / factor[c * columns + c];
        importance[c] = reciprocal[c] * reciprocal[c];
    }
    if (rows < kTile) std::memset(scratch, 0, sizeof(float) * kTile * columns);
    const int64_t begin = expert * p.rows + first_row;
    for (int64_t r = 0; r < rows; ++r) {
        const float* source = p.weight + (begin + r) * columns;
        for (int64_t c = 0; c < columns; ++c) scratch[c * kTile + r] = source[place(c)];
    }
    solver.run();
    for (int64_t r = 0; r < rows; ++r) {
        uint8_t* out_codes = p.codes + (begin + r) * columns;
        float* out_values = p.values + (begin + r) * columns;
        for (int64_t c = 0; c < columns; ++c) {
            out_codes[place(c)] = uint8_t(codes[c * kTile + r]);
            out_values[place(c)] = scratch[c * kTile + r];
        }
        for (int64_t g = 0; g < p.groups; ++g) {
            const int64_t at = (begin + r) * p.groups + place(g * p.group) / p.group;
            p.scale[at] = half_bits(scales[g * kTile + r]);
            p.zero[at] = uint8_t(zeros[g * kTile + r]);
        }
    }
}

}  // namespace LLMCOMPRESS_ISA
