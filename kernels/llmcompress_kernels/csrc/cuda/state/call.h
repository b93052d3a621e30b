// What one launch is told; llmcompress_kernels/cuda/state.py holds the same structure.
#pragma once

#include <cstdint>

namespace llmcompress::gpu {

// S sequences, H heads, G groups that share b and c, P channels, N states.
struct StateCall {
    uint8_t* codes;        // [S, H, P, N bits / 8], replaced
    uint16_t* channel;     // [S, H, P] fp16, replaced; unused with `fixed`
    uint16_t* scale;       // [S, H, N] fp16, replaced
    const uint16_t* fixed; // [H, P] fp16 calibrated channel scales, or null
    const float* drive;    // [S, H, P]
    const float* decay;    // [S, H]
    const float* b;        // [S, G, N]
    const float* c;        // [S, G, N]
    float* out;            // [S, H, P]
    int units, heads, share; // S H; H; H / G
    int bits, states, blocks; // N; blocks to launch
    int dither;               // whether the bits of a state scale are added before rounding
    int overlap;              // whether the launch may begin while the one in front still runs; compute capability 9.0 and more
};

// The same within replay windows, whose rows are `drive | decay | b` of all heads and groups of a token.
struct ReplayCall : StateCall {
    float* recent; // [S, rows, width = H P + H + G N], replaced
    int* count;    // [S] filled rows, replaced
    int* arrived;  // [S] zeros, left as zeros: blocks that have read their sequence's count
    int rows, sequences, groups, width; // R - 1; S; G; of a row
};

} // namespace llmcompress::gpu
