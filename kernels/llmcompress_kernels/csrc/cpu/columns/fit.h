// Sums over the columns of a tile, and the least squares fit of its scales, 16 rows at a time. No include guard:
// included once for each instruction set.
//
// With d_g the codes of group g less their zero point, H the Hessian and D what damping added to its diagonal, the sums
// are d_g (H+D) d_h^T and d_g (H+D) (w-q)^T. The new scales are old + s with (M + jitter) s = d_g (H + ridge) (w-q)^T
// and M made of d_g (H + ridge) d_h^T. Rows where rounding them to fp16 does not pay keep the old ones. The definition is
// `_refit` of llmcompress/algorithms/gptq.py.
#include "lanes.h"

namespace LLMCOMPRESS_ISA {

using namespace llmcompress::columns;

class Sums {
  public:
    // vectors per group, and per tile: error and energy
    static constexpr int kVectors = 5, kTotals = 2;

    Sums(int64_t groups, float* totals, float* matrix, float* factor, float* vectors)
        : groups_(groups), totals_(totals), matrix_(matrix), factor_(factor), vectors_(vectors) {}

    void clear(bool fit) const {
        std::memset(totals_, 0, sizeof(float) * kTile * kTotals);
        if (!fit) return;
        std::memset(matrix_, 0, sizeof(float) * kTile * triangle(groups_));
        std::memset(vectors_, 0, sizeof(float) * kTile * kVectors * groups_);
    }

    const float* error() const { return totals_; }
    const float* energy() const { return totals_ + kTile; }

    // Adds a group's columns to the squared error, in terms of H.
    inline void errors(const float* err, const float* delta, const float* added, int64_t size, int lane) const {
        F16 damped{}, damping{};
        for (int64_t c = 0; c < size; ++c) {
            const F16 e = load(err + c * kTile), x = load(delta + c * kTile);
            damped += e * e;
            damping += x * x * added[c];
        }
        add(totals_ + lane, damped - damping);
    }

    // What of a group's sums is due to the diagonal that damping added, and how that differs from the ridge.
    inline void diagonals(const float* delta, const float* steps, const float* added, int64_t size, float ridge,
                          int64_t group, int lane) const {
        F16 square{}, square_over{}, cross{}, cross_over{};
        for (int64_t c = 0; c < size; ++c) {
            const F16 d = load(steps + c * kTile), x = load(delta + c * kTile);
            square += d * d * added[c], square_over += d * d * (added[c] - ridge);
            cross += d * x * added[c], cross_over += d * x * (added[c] - ridge);
        }
        store(vector(kSquare, group) + lane, square), store(vector(kSquareOver, group) + lane, square_over);
        store(vector(kCross, group) + lane, cross), store(vector(kCrossOver, group) + lane, cross_over);
    }

    // Adds a group's columns to the products of all groups so far; `parts` hold each one's codes times the root, which
    // is given its diagonal back here.
    inline void products(float* parts, int64_t wide, const float* err, const float* root, int64_t size, int64_t group,
                         int lane) const {
        for (int64_t g = 0; g <= group; ++g) {
            float* part = parts + g * wide;
            F16 sum{};
            for (int64_t c = 0; c < size; ++c) {
                const F16 whole = load(part + c * kTile) * root[c];
                store(part + c * kTile, whole);
                sum += whole * load(err + c * kTile);
            }
            add(vector(kRight, g) + lane, sum);
        }
        int64_t high = 0;
        for (; high + kSquareTile <= group + 1; high += kSquareTile)
            for (int64_t low = 0; low <= high; low += kSquareTile)
                square<kSquareTile>(parts, wide, size, high, low, lane);
        for (; high <= group; ++high)
            for (int64_t low = 0; low <= high; ++low) square<1>(parts, wide, size, high, low, lane);
    }

    // Error of 16 rows where scales are not fitted.
    inline void finish(int lane) const { store(totals_ + lane, most(load(totals_ + lane), F16{})); }

    // Better scales for 16 rows in place of the old, the error that they leave, and the energy of the weights.
    inline void fit(float* scales, int lane) const {
        F16 sum{};
        for (int64_t g = 0; g < groups_; ++g) {
            const F16 damped = load(matrix_ + cell(g, g) + lane), right = load(vector(kRight, g) + lane);
            const F16 left = damped - load(vector(kSquareOver, g) + lane);
            store(vector(kLeft, g) + lane, left);
            store(matrix_ + cell(g, g) + lane, damped - load(vector(kSquare, g) + lane));
            store(vector(kRight, g) + lane, right - load(vector(kCross, g) + lane));
            store(vector(kResidual, g) + lane, right - load(vector(kCrossOver, g) + lane));
            sum += left;
        }
        const F16 jitter = sum / float(groups_) * 1e-4f + 0x1p-126f, error = load(totals_ + lane);
        F16 twice{}, energy = error + form(scales, lane);
        for (int64_t g = 0; g < groups_; ++g) {
            add(vector(kLeft, g) + lane, jitter);
            twice += load(scales + g * kTile) * load(vector(kRight, g) + lane);
        }
        energy += twice + twice;
        I16 better = factorize(lane);
        solve(lane);
        F16 gain{}, pull{}, ridge{};
        for (int64_t g = 0; g < groups_; ++g) {
            const F16 old = load(scales + g * kTile);
            const F16 now = to_half(clamp(old + load(vector(kStep, g) + lane), F16{}, spread(kHalfMax)));
            const F16 step = now - old, more = load(vector(kLeft, g) + lane) - load(matrix_ + cell(g, g) + lane);
            better &= now > F16{};
            store(vector(kStep, g) + lane, step);
            gain += step * load(vector(kResidual, g) + lane);
            pull += step * load(vector(kRight, g) + lane);
            ridge += step * step * more;
            store(vector(kRight, g) + lane, now);
        }
        const F16 exact = form(vector(kStep, 0) + lane, lane);
        better &= gain > 0.5f * (exact + ridge);
        for (int64_t g = 0; g < groups_; ++g) {
            const F16 old = load(scales + g * kTile);
            store(scales + g * kTile, better ? load(vector(kNew, g) + lane) : old);
        }
        store(totals_ + lane, most(better ? error - (pull + pull) + exact : error, F16{}));
        store(totals_ + kTile + lane, most(energy, F16{}));
    }

  private:
    static constexpr int kSquareTile = 4;
    // the last four take the place of the first ones once those are used
    enum { kRight, kSquare, kSquareOver, kCross, kCrossOver };
    enum { kNew = kRight, kLeft = kSquareOver, kStep = kCross, kResidual = kCrossOver };

    float* vector(int kind, int64_t group) const { return vectors_ + (kind * groups_ + group) * kTile; }
    static int64_t cell(int64_t high, int64_t low) { return (triangle(high) + low) * kTile; }
    static void add(float* to, F16 value) { store(to, load(to) + value); }

    template <int Count>
    inline void square(const float* parts, int64_t wide, int64_t size, int64_t high, int64_t low, int lane) const {
        F16 sum[Count][Count] = {};
        const float *rows = parts + high * wide, *others = parts + low * wide;
        for (int64_t c = 0; c < size; ++c) {
            F16 other[Count];
#pragma GCC unroll 4
            for (int i = 0; i < Count; ++i) other[i] = load(others + i * wide + c * kTile);
#pragma GCC unroll 4
            for (int j = 0; j < Count; ++j) {
                const F16 row = load(rows + j * wide + c * kTile);
#pragma GCC unroll 4
                for (int i = 0; i < Count; ++i) sum[j][i] += row * other[i];
            }
        }
#pragma GCC unroll 4
        for (int j = 0; j < Count; ++j)
#pragma GCC unroll 4
            for (int i = 0; i < Count; ++i)
                if (low + i <= high + j) add(matrix_ + cell(high + j, low + i) + lane, sum[j][i]);
    }

    // s H s^T for one factor per group, which lie kTile apart and already at their rows.
    inline F16 form(const float* x, int lane) const {
        F16 sum{};
        for (int64_t h = 0; h < groups_; ++h) {
            F16 inner{};
            for (int64_t l = 0; l < h; ++l) inner += load(matrix_ + cell(h, l) + lane) * load(x + l * kTile);
            const F16 own = load(x + h * kTile);
            sum += own * (inner + inner + load(matrix_ + cell(h, h) + lane) * own);
        }
        return sum;
    }

    // L D L^T of the left side, L's diagonal replaced by 1 / D; where that is possible.
    inline I16 factorize(int lane) const {
        I16 sound = F16{} == F16{};
        for (int64_t h = 0; h < groups_; ++h) {
            float* row = factor_ + cell(h, 0) + lane;
            F16 own = load(vector(kLeft, h) + lane);
            for (int64_t l = 0; l < h; ++l) {
                const float* other = factor_ + cell(l, 0) + lane;
                F16 value = load(matrix_ + cell(h, l) + lane);
                for (int64_t k = 0; k < l; ++k) value -= load(row + k * kTile) * load(other + k * kTile);
                store(row + l * kTile, value);
            }
            for (int64_t l = 0; l < h; ++l) {
                const F16 value = load(row + l * kTile), scaled = value * load(factor_ + cell(l, l) + lane);
                own -= value * scaled;
                store(row + l * kTile, scaled);
            }
            sound &= own > F16{};
            store(row + h * kTile, 1.f / own);
        }
        return sound;
    }

    inline void solve(int lane) const {
        float *const x = vector(kStep, 0) + lane, *const right = vector(kResidual, 0) + lane;
        for (int64_t h = 0; h < groups_; ++h) {
            const float* row = factor_ + cell(h, 0) + lane;
            F16 value = load(right + h * kTile);
            for (int64_t l = 0; l < h; ++l) value -= load(row + l * kTile) * load(x + l * kTile);
            store(x + h * kTile, value);
        }
        for (int64_t h = 0; h < groups_; ++h)
            store(x + h * kTile, load(x + h * kTile) * load(factor_ + cell(h, h) + lane));
        for (int64_t h = groups_ - 1; h > 0; --h) {
            const float* row = factor_ + cell(h, 0) + lane;
            const F16 value = load(x + h * kTile);
            for (int64_t l = 0; l < h; ++l) store(x + l * kTile, load(x + l * kTile) - load(row + l * kTile) * value);
        }
    }

    int64_t groups_;
    float *totals_, *matrix_, *factor_, *vectors_;
};

}  // namespace LLMCOMPRESS_ISA
