// GPTQ's column loop for a stack of weights: what is computed and the memory it is computed in.
#pragma once

#include <cstdint>

namespace llmcompress::columns {

// rows (outputs) of a weight that are solved together: two vectors of 16
constexpr int kTile = 32;

// E experts, N rows, K columns, G groups per row; columns are visited in the order of the factor.
struct Problem {
    const float* weight;   // [E, N, K], stored order
    const int64_t* order;  // [E, K], the stored column of each visit, or null
    const float* factor;   // [E, K, K], upper triangular, order of visit
    uint8_t* codes;        // [E, N, K], stored order
    float* values;         // [E, N, K], what the codes stand for
    uint16_t* scale;       // [E, N, G], fp16, stored order of groups
    uint8_t* zero;         // [E, N, G]
    const int64_t* bounds; // [blocks, 2], columns between two updates of the rest
    const float* coarse;   // fractions of the range to try beside the whole
    const float* fine;     // then these offsets from the best
    int64_t experts, rows, columns, group, groups, blocks, coarse_count, fine_count, levels, midpoint, symmetric;
};

// One tile of rows; scratch holds `scratch_floats` floats.
using Tile = void (*)(const Problem&, int64_t expert, int64_t first_row, float* scratch);

inline int64_t longest(const Problem& p) {
    int64_t most = 0;
    for (int64_t i = 0; i < p.blocks; ++i) {
        const int64_t size = p.bounds[2 * i + 1] - p.bounds[2 * i];
        most = size > most ? size : most;
    }
    return most;
}

// weights, codes (as floats), errors of a block, grids, importance
inline int64_t scratch_floats(const Problem& p) {
    return kTile * (2 * p.columns + longest(p) + 2 * p.groups) + 2 * p.columns + 64;
}

void tile_avx512(const Problem& p, int64_t expert, int64_t first_row, float* scratch);
void tile_avx2(const Problem& p, int64_t expert, int64_t first_row, float* scratch);
void tile_portable(const Problem& p, int64_t expert, int64_t first_row, float* scratch);

}  // namespace llmcompress::columns
