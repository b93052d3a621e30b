// The column loop on one tile of rows, in GCC's vector types, compiled to what the including file's target offers.
//
// A tile is held as [K, 32]: a column of 32 rows is two vectors, and all its work fits the second-level cache.
//
// The definition (llmcompress/algorithms/gptq.py) passes errors on by the Cholesky factor U of the inverse Hessian:
// w - q = err U. Here the root R = U^-1 is used instead, for which H = R R^T and err = (w - q) R: the weight that is
// quantized in column j is w_j + sum over i < j of (w_i - q_i) R_ij / R_jj. So no inverse is needed, a column is written
// once, and the rows of errors and of codes go through the same root at once: with d_g the codes of group g,
// F_g = d_g R gives d_g H d_h^T = F_g F_h^T and d_g H (w - q)^T = F_g err^T, which is all that the least squares fit of
// the scales needs. A group's grid is chosen for the weights as they are when it is reached, that is with later columns
// moved as if those before them in the group were not going to be rounded: `settle` solves for them.
//
// Rounding is that of the definition: to the nearest, ties to even, codes after a true division. Only sums differ in
// their last bits.
#include "columns.h"
#include "fit.h"

namespace LLMCOMPRESS_ISA {

using namespace llmcompress::columns;

struct Solver {
    const Problem& p;
    const Roots& roots;
    const float* packed;  // what is read next
    const int64_t expert;
    // [K, 32]: weights, then what rounding took off them; codes less their zero point
    float *delta, *steps;
    // of the group at work, [columns, 32]: weights as earlier columns move them, the same for its grid, errors
    float *work, *settled, *errors;
    float *scales, *zeros;
    // [G, columns of the group, 32]: codes of each group times the root
    float* parts;
    Sums sums;
    float* importance;
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
    inline F16 cost(const float* values, int64_t size, F16 scale, F16 zero) const {
        const F16 inverse = 1.f / scale, high = spread(top);
        F16 sum{};
        for (int64_t c = 0; c < size; ++c) {
            const F16 exact = load(values + c * kTile) * inverse + zero;
            const F16 error = rounded(clamp(exact, F16{}, high)) - exact;
            sum += error * error * importance[c];
        }
        return sum * scale * scale;
    }

    // Grid of a group of so many columns, for 16 rows.
    inline void find(const float* weights, int64_t group, int64_t size, int lane) const {
        const float* values = weights + lane;
        F16 low{}, high{};
        for (int64_t c = 0; c < size; ++c) {
            const F16 v = load(values + c * kTile);
            low = least(low, v);
            high = most(high, v);
        }
        F16 scale, zero, fraction = spread(1.f);
        cover(low, high, scale, zero);
        if (p.coarse_count + p.fine_count > 0) {
            F16 best = cost(values, size, scale, zero);
            const auto attempt = [&](F16 share) {
                F16 s, z;
                cover(low * share, high * share, s, z);
                const F16 error = cost(values, size, s, z);
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
        store(scales + group * kTile + lane, scale);
        store(zeros + group * kTile + lane, zero);
    }

    // Adds to kPanel columns what earlier ones, in `from`, do to them: a sum over those times the panel's roots.
    template <int Vectors>
    static inline void product(const float* from, const float* panel, int64_t count, float* to) {
        F16 sum[kPanel][Vectors];
#pragma GCC unroll 4
        for (int i = 0; i < kPanel; ++i)
#pragma GCC unroll 2
            for (int v = 0; v < Vectors; ++v) sum[i][v] = load(to + i * kTile + 16 * v);
        for (int64_t k = 0; k < count; ++k) {
            F16 x[Vectors];
#pragma GCC unroll 2
            for (int v = 0; v < Vectors; ++v) x[v] = load(from + k * kTile + 16 * v);
#pragma GCC unroll 4
            for (int i = 0; i < kPanel; ++i)
#pragma GCC unroll 2
                for (int v = 0; v < Vectors; ++v) sum[i][v] += x[v] * panel[k * kPanel + i];
        }
#pragma GCC unroll 4
        for (int i = 0; i < kPanel; ++i)
#pragma GCC unroll 2
            for (int v = 0; v < Vectors; ++v) store(to + i * kTile + 16 * v, sum[i][v]);
    }

    // The same for all rows of the tile.
    static inline void products(const float* from, const float* panel, int64_t count, float* to) {
        if (kManyRegisters) return product<2>(from, panel, count, to);
        product<1>(from, panel, count, to);
        product<1>(from + 16, panel, count, to + 16);
    }

    // The same for errors and codes, in one pass where registers hold the sums.
    inline void contribute(int64_t first, int64_t last, int64_t column, float* part) {
        const int64_t count = last - first;
        const float *x = delta + first * kTile, *d = steps + first * kTile;
        float *to = work + column * kTile, *at = part == nullptr ? nullptr : part + column * kTile;
        if (kManyRegisters && part != nullptr) {
            F16 moved[kPanel][2], added[kPanel][2];
#pragma GCC unroll 4
            for (int i = 0; i < kPanel; ++i) {
                moved[i][0] = load(to + i * kTile), moved[i][1] = load(to + i * kTile + 16);
                added[i][0] = load(at + i * kTile), added[i][1] = load(at + i * kTile + 16);
            }
            for (int64_t k = 0; k < count; ++k) {
                const F16 x0 = load(x + k * kTile), x1 = load(x + k * kTile + 16);
                const F16 d0 = load(d + k * kTile), d1 = load(d + k * kTile + 16);
#pragma GCC unroll 4
                for (int i = 0; i < kPanel; ++i) {
                    const F16 root = spread(packed[k * kPanel + i]);
                    moved[i][0] += x0 * root, moved[i][1] += x1 * root;
                    added[i][0] += d0 * root, added[i][1] += d1 * root;
                }
            }
#pragma GCC unroll 4
            for (int i = 0; i < kPanel; ++i) {
                store(to + i * kTile, moved[i][0]), store(to + i * kTile + 16, moved[i][1]);
                store(at + i * kTile, added[i][0]), store(at + i * kTile + 16, added[i][1]);
            }
        } else {
            products(x, packed, count, to);
            if (part != nullptr) products(d, packed, count, at);
        }
        packed += count * kPanel;
    }

    // Columns [first, last) of the tile add to columns [column, stop) of the group at work.
    inline void pass(int64_t first, int64_t last, int64_t column, int64_t stop, float* part) {
        for (int64_t from = first; from < last;) {
            const int64_t to = lesser(lesser(from + kChunk, (from / p.group + 1) * p.group), last);
            float* own = part == nullptr ? nullptr : part + from / p.group * width() * kTile;
            for (int64_t c = column; c < stop; c += kPanel) contribute(from, to, c, own);
            from = to;
        }
    }

    inline int64_t width() const { return padded(p.group); }

    // Quantize `size` columns from `column` of the group that starts at `start`; each is heard of by those after it.
    inline void block(int64_t start, int64_t column, int64_t size, float* own) {
        const int64_t group = start / p.group;
        for (int64_t j = 0; j < size; ++j) {
            const int64_t c = column + j, at = (start + c) * kTile;
            const float* row = packed + j * size;
            F16 error[2], step[2];
            for (int half = 0; half < 2; ++half) {
                const int64_t lane = 16 * half, grid = group * kTile + lane;
                const F16 value = load(work + c * kTile + lane), scale = load(scales + grid);
                const F16 zero = load(zeros + grid);
                step[half] = rounded(clamp(value / scale, -zero, top - zero));
                const F16 quantized = step[half] * scale;
                error[half] = load(delta + at + lane) - quantized;
                store(delta + at + lane, error[half]);
                store(steps + at + lane, step[half]);
                store(errors + c * kTile + lane, (value - quantized) * roots.diagonal[start + c]);
            }
            for (int64_t i = j + 1; i < size; ++i) {
                float* target = work + (column + i) * kTile;
                store(target, load(target) + error[0] * row[i]);
                store(target + 16, load(target + 16) + error[1] * row[i]);
            }
            if (own == nullptr) continue;
            for (int64_t i = j; i < size; ++i) {
                float* target = own + (column + i) * kTile;
                store(target, load(target) + step[0] * row[i]);
                store(target + 16, load(target + 16) + step[1] * row[i]);
            }
        }
        packed += size * size;
    }

    // Weights of a group as they are before any of its columns is rounded, into `settled`: `work` has what the columns
    // before the group do to each of its own, but not yet what those moved ones do to each other.
    inline void settle(int64_t start, int64_t size) {
        const float *roots_left = packed, *original = delta + start * kTile;
        float* const moved = errors;  // unmoved less moved weights; errors come later
        std::memcpy(settled, work, sizeof(float) * kTile * width());
        for (int64_t column = 0; column < size; column += kBlock) {
            const int64_t stop = lesser(column + kBlock, size), wide = stop - column;
            for (int64_t from = 0; from < column; from += kChunk) {
                const int64_t count = lesser(kChunk, column - from);
                for (int64_t c = column; c < stop; c += kPanel, roots_left += count * kPanel)
                    products(moved + from * kTile, roots_left, count, settled + c * kTile);
            }
            for (int64_t c = column; c < stop; ++c, roots_left += wide)
                for (int lane = 0; lane < kTile; lane += 16) {
                    const F16 by = load(original + c * kTile + lane) - load(settled + c * kTile + lane);
                    store(moved + c * kTile + lane, by);
                    for (int64_t i = c + 1; i < stop; ++i) {
                        float* target = settled + i * kTile + lane;
                        store(target, load(target) + by * roots_left[i - column]);
                    }
                }
        }
    }

    // Weights of a group into `delta` and `work`, unmoved.
    inline void fetch(int64_t start, int64_t size, int64_t first_row, int64_t rows, const int64_t* order) {
        const float* source = p.weight + (expert * p.rows + first_row) * p.columns;
        float* target = delta + start * kTile;
        if (rows < kTile) std::memset(target, 0, sizeof(float) * kTile * size);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < size; ++c)
                target[c * kTile + r] = source[r * p.columns + (order == nullptr ? start + c : order[start + c])];
        std::memcpy(work, target, sizeof(float) * kTile * size);
        std::memset(work + size * kTile, 0, sizeof(float) * kTile * (width() - size));
    }

    inline void run(int64_t first_row, int64_t rows, const int64_t* order) {
        const int64_t wide = width() * kTile;
        float* const all = p.refit ? parts : nullptr;
        for (int64_t start = 0, group = 0; start < p.columns; start += p.group, ++group) {
            const int64_t size = lesser(p.group, p.columns - start);
            float* const own = p.refit ? parts + group * wide : nullptr;
            if (p.refit) std::memset(parts, 0, sizeof(float) * (group + 1) * wide);
            fetch(start, size, first_row, rows, order);
            pass(0, start, 0, size, all);
            for (int64_t c = 0; c < size; ++c) importance[c] = roots.diagonal[start + c] * roots.diagonal[start + c];
            if (start > 0) settle(start, size);
            for (int lane = 0; lane < kTile; lane += 16) find(start > 0 ? settled : work, group, size, lane);
            for (int64_t column = 0; column < size; column += kBlock) {
                const int64_t stop = lesser(column + kBlock, size);
                pass(start, start + column, column, stop, all);
                block(start, column, stop - column, own);
            }
            const float* added = p.added + expert * p.columns + start;
            for (int lane = 0; lane < kTile; lane += 16) {
                sums.errors(errors + lane, delta + start * kTile + lane, added, size, lane);
                if (p.refit) {
                    sums.diagonals(delta + start * kTile + lane, steps + start * kTile + lane, added, size,
                                  p.ridge[expert], group, lane);
                    sums.products(parts + lane, wide, errors + lane, roots.diagonal + start, size, group, lane);
                }
            }
        }
    }
};

// Rows beyond the last are filled with zeros and left out of what is written.
inline void solve_tile(const Problem& p, const Roots& roots, int64_t expert, int64_t first_row, float* scratch) {
    const int64_t columns = p.columns, rows = lesser(kTile, p.rows - first_row), width = padded(p.group);
    float* at = scratch;
    const auto take = [&at](int64_t lines) {
        float* taken = at;
        at += lines * kTile;
        return taken;
    };
    float *const delta = take(columns), *const steps = take(columns), *const work = take(width);
    float *const settled = take(width), *const errors = take(width);
    float *const scales = take(p.groups), *const zeros = take(p.groups);
    const int64_t fit = p.refit ? 1 : 0;
    float* const parts = take(fit * p.groups * width);
    const Sums sums(p.groups, take(Sums::kTotals), take(fit * triangle(p.groups)), take(fit * triangle(p.groups)),
                    take(fit * Sums::kVectors * p.groups));
    Solver solver{p,      roots,  roots.packed, expert, delta, steps, work, settled,
                  errors, scales, zeros,        parts,  sums,  at,    float(p.levels - 1)};
    sums.clear(p.refit);
    const int64_t* order = p.order == nullptr ? nullptr : p.order + expert * columns;
    solver.run(first_row, rows, order);
    const int64_t begin = expert * p.rows + first_row;
    for (int lane = 0; lane < kTile; lane += 16) {
        if (p.refit)
            sums.fit(scales + lane, lane);
        else
            sums.finish(lane);
        for (int64_t r = lane; r < lesser(rows, lane + 16); ++r) {
            p.error[begin + r] = sums.error()[r];
            if (p.refit) p.energy[begin + r] = sums.energy()[r];
        }
    }
    for (int64_t start = 0, group = 0; start < columns; start += p.group, ++group) {
        const int64_t size = lesser(p.group, columns - start);
        const auto place = [&](int64_t c) { return order == nullptr ? start + c : order[start + c]; };
        for (int64_t r = 0; r < rows; ++r) {
            const float scale = scales[group * kTile + r], zero = zeros[group * kTile + r];
            const float* from = steps + start * kTile + r;
            uint8_t* out_codes = p.codes + (begin + r) * columns;
            float* out_values = p.values + (begin + r) * columns;
            for (int64_t c = 0; c < size; ++c) {
                out_codes[place(c)] = uint8_t(from[c * kTile] + zero);
                out_values[place(c)] = from[c * kTile] * scale;
            }
            const int64_t to = (begin + r) * p.groups + place(0) / p.group;
            p.scale[to] = half_bits(scale);
            p.zero[to] = uint8_t(zero);
        }
    }
}

}  // namespace LLMCOMPRESS_ISA
