// The root of a Hessian in the order in which a tile reads it.
//
// Group after group. First, for each chunk of columns before the group, the chunk's rows of the root in each panel of
// the group's columns. Then for each block of the group: for each chunk between the group's start and the block, the
// chunk's rows in each panel of the block; and the block's own square, row by row. Columns are divided by their
// diagonal; columns of a panel beyond the group are zeros.
#pragma once

#include "columns.h"

namespace llmcompress::columns {

// Calls act(first, last) for the chunks of columns in [start, stop), none of which spans two groups.
template <class Act>
inline void each_chunk(int64_t start, int64_t stop, int64_t group, Act&& act) {
    for (int64_t first = start; first < stop;) {
        const int64_t last = lesser(lesser(first + kChunk, (first / group + 1) * group), stop);
        act(first, last);
        first = last;
    }
}

inline int64_t packed_floats(const Problem& p) {
    int64_t count = 0;
    for (int64_t start = 0; start < p.columns; start += p.group) {
        const int64_t size = lesser(p.group, p.columns - start);
        count += start * padded(size);
        for (int64_t at = 0; at < size; at += kBlock) {
            const int64_t width = lesser(kBlock, size - at);
            count += at * padded(width) + width * width;
        }
    }
    return count;
}

// Packs the roots of one group's columns, from where `out` points; returns the place after them.
inline float* pack_group(const Problem& p, int64_t expert, int64_t start, const float* diagonal, float* out) {
    const float* last = p.root + expert * p.columns * p.columns + (p.columns - 1) * (p.row_stride + p.column_stride);
    const int64_t stop = lesser(start + p.group, p.columns);
    const auto panel = [&](int64_t first, int64_t end, int64_t column) {
        for (int64_t i = 0; i < kPanel; ++i, ++column) {
            const float* source = last - column * p.column_stride;
            const float inverse = column < stop ? 1.f / diagonal[column] : 0.f;
            if (column < stop)
                for (int64_t k = first; k < end; ++k) out[(k - first) * kPanel + i] = source[-k * p.row_stride] * inverse;
            else
                for (int64_t k = first; k < end; ++k) out[(k - first) * kPanel + i] = 0.f;
        }
        out += (end - first) * kPanel;
    };
    each_chunk(0, start, p.group, [&](int64_t first, int64_t end) {
        for (int64_t column = start; column < stop; column += kPanel) panel(first, end, column);
    });
    for (int64_t block = start; block < stop; block += kBlock) {
        const int64_t limit = lesser(block + kBlock, stop);
        each_chunk(start, block, p.group, [&](int64_t first, int64_t end) {
            for (int64_t column = block; column < limit; column += kPanel) panel(first, end, column);
        });
        for (int64_t k = block; k < limit; ++k)
            for (int64_t column = block; column < limit; ++column)
                *out++ = column < k ? 0.f : last[-k * p.row_stride - column * p.column_stride] / diagonal[column];
    }
    return out;
}

}  // namespace llmcompress::columns
