// Products with the nodes of a residual tree: rows of several models at once, each node read once for all of them.
//
// A node is a matrix on a half-integer grid, W = multiplier * scale * (code - (2^bits - 1) / 2), of 1, 2 or 4 bits; wider
// codes are two such nodes, because q = low + 2^k * high splits the grid's offset the same way. The order of the codes
// differs from that of lowbit.h: a group is padded to units of 32 columns, `bits` words to a unit and row, and a
// word holds its codes so that (word >> bits * j) & mask are columns 4j to 4j + 3. All widths therefore take
// activations in natural order, which are rounded once for the whole tree:
//
//   [unit][token][plane][32 bytes]   fixed-point numbers of `planes` bytes (see lowbit.h), one scale to a chunk
//
// Tokens of a model are neighbours, models are sorted along the tree, so a node's tokens are a range of bytes at a
// constant distance. One-bit nodes may read tables of partial sums instead (cpu/tree/tables*.inc):
//
//   [16 columns][token][plane][64 entries]
//
// Words and scales of 16 rows lie side by side, as in lowbit.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "llmcompress/lowbit.h"

namespace llmcompress {

constexpr int UNIT = 32;           // columns
constexpr int TREE_TABLE = 64;     // entries of a table
constexpr int TREE_TABLE_COLUMNS = 16;
constexpr int64_t TREE_PASS = 64;  // tokens whose activations are held at once

struct TreeNode {
    const uint32_t* words;  // [row blocks][units * bits][16]
    const uint16_t* scale;  // [row blocks][groups][16] fp16
    uint64_t members;       // models below it, a bit each; for callers that think in models
    float multiplier;
    int32_t bits;
};

// Columns of one group that share an activation scale: at most MAX_CHUNK, a whole number of units but for the last.
struct TreeChunk {
    int32_t units, width;
    int64_t group, first;
};

// Chunks of a row; returns how many, `out` may be null to count.
inline int64_t tree_chunks(int64_t columns, int64_t group, TreeChunk* out) {
    int64_t count = 0;
    for (int64_t begin = 0, g = 0; begin < columns; begin += group, ++g) {
        const int64_t end = begin + group < columns ? begin + group : columns;
        for (int64_t at = begin; at < end; at += MAX_CHUNK, ++count) {
            const int64_t width = end - at < MAX_CHUNK ? end - at : MAX_CHUNK;
            if (out) out[count] = {int32_t((width + UNIT - 1) / UNIT), int32_t(width), g, at};
        }
    }
    return count;
}

struct TreeShape {
    int64_t columns, groups, units, chunks;
    const TreeChunk* parts;
    bool one_bit;  // whether a node has codes of one bit

    // of a token and a plane
    int64_t table_bytes() const { return one_bit ? units * (UNIT / TREE_TABLE_COLUMNS) * TREE_TABLE : 0; }
};

// The shape of a weight whose chunks are `parts`, of `count` nodes.
inline TreeShape tree_shape(int64_t columns, int64_t group, int64_t chunks, const TreeChunk* parts, const TreeNode* nodes,
                            int64_t count) {
    TreeShape shape{columns, (columns + group - 1) / group, 0, chunks, parts, false};
    for (int64_t c = 0; c < chunks; ++c) shape.units += parts[c].units;
    for (int64_t n = 0; n < count; ++n) shape.one_bit |= nodes[n].bits == 1;
    return shape;
}

struct TreeActivations {
    int8_t* bytes;
    float* scale;  // [chunk][token]
    float* sum;    // [chunk][token]: scale * sum of the numbers
    uint8_t* tables;  // where a node has one bit, like the rest
    int32_t* middle;  // [chunk][token]: half the sum of the numbers' sizes, rounded down; for AVX2 the sum of negative numbers
    float* odd;       // [chunk][token]: scale * what that rounding takes away
    int16_t* pairs;   // [unit][token][32] of two planes, in the order of cpu/tree/pairs.inc; for AVX2
    int64_t tokens;
    int planes;  // 2 or 3
};

inline size_t tree_activation_bytes(const TreeShape& s, int64_t tokens, int planes) {
    const int64_t each = planes * (s.units * UNIT + s.table_bytes()) + s.units * UNIT * int64_t(sizeof(int16_t)) +
                          s.chunks * 4 * int64_t(sizeof(float));
    return size_t(tokens * each + 7 * 64);
}

inline TreeActivations place_tree_activations(const TreeShape& s, int64_t tokens, int planes, void* memory) {
    Parts parts(memory);
    TreeActivations a;
    a.bytes = parts.take<int8_t>(tokens * s.units * UNIT * planes);
    a.scale = parts.take<float>(tokens * s.chunks);
    a.sum = parts.take<float>(tokens * s.chunks);
    a.tables = parts.take<uint8_t>(tokens * planes * s.table_bytes());
    a.middle = parts.take<int32_t>(tokens * s.chunks);
    a.odd = parts.take<float>(tokens * s.chunks);
    a.pairs = parts.take<int16_t>(tokens * s.units * UNIT);
    a.tokens = tokens;
    a.planes = planes;
    return a;
}

struct TreeVariant {
    // Round token `token` of a row of fp32.
    void (*quantize)(const TreeShape& s, const float* x, const TreeActivations& a, int64_t token);
    // Row blocks [first, last) of one node for tokens [low, high), added to out[t * stride + row].
    void (*add)(const TreeNode& n, const TreeShape& s, const TreeActivations& a, int64_t low, int64_t high, int64_t first,
                int64_t last, float* out, int64_t stride);
};

extern const TreeVariant tree_variant;  // of the instruction set that this library is compiled for

}  // namespace llmcompress
