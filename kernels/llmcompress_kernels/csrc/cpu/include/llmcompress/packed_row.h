// One row of a packed matrix, as numbers: what an embedding looks up.
#pragma once

#include <algorithm>
#include <cstdint>

#include "llmcompress/lowbit.h"
#include "llmcompress/types.h"

namespace llmcompress {

// Words, scales and zero points (or null) of sixteen rows lie side by side (lowbit.h). Inlined, so that it is compiled for
// the caller's instruction set.
__attribute__((always_inline)) inline void packed_row(const uint32_t* data, const uint16_t* scales, const uint32_t* zeros, int bits,
                                                      int64_t group, int64_t columns, int64_t row, float* to) {
  const int64_t words = (columns * bits + 31) / 32, groups = (columns + group - 1) / group;
  const int64_t block = row / LANES, lane = row % LANES;
  const uint32_t* word = data + block * words * LANES + lane;
  const uint16_t* scale = scales + block * groups * LANES + lane;
  const uint32_t* zero = zeros == nullptr ? nullptr : zeros + block * ((groups * bits + 31) / 32) * LANES + lane;
  const auto code = [bits](const uint32_t* stream, int64_t index) {
    const int64_t bit = index * bits, at = (bit >> 5) * LANES;
    const int shift = static_cast<int>(bit & 31);
    uint64_t both = stream[at];
    if (shift + bits > 32) both |= static_cast<uint64_t>(stream[at + LANES]) << 32;
    return static_cast<float>((both >> shift) & ((1u << bits) - 1));
  };
  for (int64_t g = 0, i = 0; g < groups; ++g) {
    const float step = half_to_float(scale[g * LANES]);
    const float middle = zero == nullptr ? static_cast<float>(1 << (bits - 1)) : code(zero, g);
    const int64_t end = std::min(columns, i + group);
    if (bits == 8 && i % 4 == 0) {
      for (; i + 4 <= end; i += 4) {
        const uint32_t four = word[i / 4 * LANES];
        for (int k = 0; k < 4; ++k) to[i + k] = (static_cast<float>(static_cast<int32_t>(four >> 8 * k & 255)) - middle) * step;
      }
    }
    for (; i < end; ++i) to[i] = (code(word, i) - middle) * step;
  }
}

}  // namespace llmcompress
