// GPTQ's column loop for a stack of weights: what is computed and the memory it is computed in.
#pragma once

#include <cstdint>

namespace llmcompress::columns {

// rows (outputs) of a weight that are solved together: two vectors of 16
constexpr int kTile = 32;
// columns whose sums over earlier columns are held in registers at once
constexpr int kPanel = 4;
// columns quantized one after another before the next ones hear of them; a multiple of kPanel
constexpr int kBlock = 32;
// earlier columns that one pass goes through: their rows of a tile fit the first-level cache
constexpr int kChunk = 128;

// E experts, N rows, K columns, G groups per row; columns are visited in the order of the factor.
struct Problem {
    const float* weight;   // [E, N, K], stored order
    const int64_t* order;  // [E, K], the stored column of each visit, or null
    const float* root;     // [E, K, K] with strides, lower triangular, reverse order of visit: see Roots
    const float* added;    // [E, K], what damping added to the Hessian's diagonal, order of visit
    const float* ridge;    // [E], what it adds to the diagonal where scales are fitted
    uint8_t* codes;        // [E, N, K], stored order
    float* values;         // [E, N, K], what the codes stand for
    uint16_t* scale;       // [E, N, G], fp16, stored order of groups
    uint8_t* zero;         // [E, N, G]
    float* error;          // [E, N], diagonal of (W-Q) H (W-Q)^T
    float* energy;         // [E, N], diagonal of W H W^T; written where scales are fitted
    const float* coarse;   // fractions of the range to try beside the whole
    const float* fine;     // then these offsets from the best
    int64_t experts, rows, columns, group, groups, row_stride, column_stride, coarse_count, fine_count, levels,
        midpoint, symmetric, refit;
};

// The Hessian's upper triangular root R (R R^T = H, order of visit) of one expert, as tiles read it: every value of a
// column divided by the column's diagonal, and in the order in which they are used.
struct Roots {
    const float* packed;    // see pack.h
    const float* diagonal;  // [K]
};

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t padded(int64_t columns) { return (columns + kPanel - 1) / kPanel * kPanel; }
inline int64_t triangle(int64_t n) { return n * (n + 1) / 2; }

// What a tile works in: weights (then errors) and codes of all columns; of one group weights twice, errors and, where
// scales are fitted, every group's part in the root's columns; grids; sums for the fit.
inline int64_t scratch_floats(const Problem& p) {
    const int64_t width = padded(p.group), fit = p.refit ? p.groups * width + 2 * triangle(p.groups) + 5 * p.groups : 0;
    return kTile * (2 * p.columns + 3 * width + 2 * p.groups + 2 + fit) + p.group;
}

// One tile of rows; scratch holds `scratch_floats` floats.
using Tile = void (*)(const Problem&, const Roots&, int64_t expert, int64_t first_row, float* scratch);

void tile_avx512(const Problem& p, const Roots& roots, int64_t expert, int64_t first_row, float* scratch);
void tile_avx2(const Problem& p, const Roots& roots, int64_t expert, int64_t first_row, float* scratch);
void tile_portable(const Problem& p, const Roots& roots, int64_t expert, int64_t first_row, float* scratch);

}  // namespace llmcompress::columns
