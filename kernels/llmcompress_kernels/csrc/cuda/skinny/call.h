// What one launch is told; llmcompress_kernels/cuda/skinny.py holds the same structure.
#pragma once

#include <cstdint>

namespace llmcompress::skinny {

enum Mode : int { DENSE = 0, GATE_UP = 1, DOWN = 2 };
enum Activation : int { SILU = 0, GELU = 1, GELU_TANH = 2, GPT_OSS = 3 };

// T tokens, k slots per token, E experts, N rows, K columns; weight rows are N, or 2 N (gate rows first) for GATE_UP.
struct Call {
    const void* x;          // [T, K]; DOWN: [T k, K], a row per slot
    const uint32_t* weight; // [E, rows, words]
    const uint16_t* scale;  // [E, rows, groups] fp16
    const uint32_t* zero;   // [E, rows, zero_words], or null: the midpoint
    const void* bias;       // [E, rows] in the type of x, or null
    const int64_t* index;   // [T, k], E skips a slot; unused by DENSE
    const float* share;     // [T, k], DOWN
    void* out;              // DENSE [T, N]; GATE_UP [T k, N]; DOWN [T, N]
    float* parts;           // DENSE [splits, T, N]; GATE_UP [splits, T k, 2 N]; DOWN [splits, T k, N]; null if unused
    int* arrived;           // one counter per tile (and expert, for GATE_UP), zero before and after
    int64_t words, groups, zero_words;
    int tokens, slots, experts, rows, columns, group, splits, steps; // steps of columns, per split
    int mode, activation;
    int at_once; // most tokens of a block at a time, at most 8 per tile
    float alpha, limit;
};

} // namespace llmcompress::skinny
