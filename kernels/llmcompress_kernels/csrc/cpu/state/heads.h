// The state of one head for one token, or after a prompt: what update.cpp offers to the rest of the family.
#pragma once

#include <cstdint>

#include "tile.h"

namespace state {

// One token with a packed state: codes, channel and scale are replaced; x [P] is dt x, b and c [N] lie in pairs
// (split_pairs), y [P] is read from the fresh state, tile [P, N] is scratch.
using Head = void (*)(uint8_t* codes, uint16_t* channel, uint16_t* scale, const uint16_t* fixed, float decay, const float* x,
                      const float* b, const float* c, float* y, float* tile, int channels);

// Codes and scales of tile [P, N], whose rows lie in pairs.
using Pack = void (*)(float* tile, uint8_t* codes, uint16_t* channel, uint16_t* scale, const uint16_t* fixed, int channels);

// Null for a width or size that has no kernel.
Head head_update(Mode mode, int bits, int64_t states);
Pack head_pack(Mode mode, int bits, int64_t states);

// One token with an fp32 state rows [P, N], which is replaced; b and c in natural order.
void float_update(float* rows, float decay, const float* x, const float* b, const float* c, float* y, int64_t channels,
                  int64_t states);

}  // namespace state
