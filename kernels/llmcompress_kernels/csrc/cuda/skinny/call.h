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
    float* parts;           // [pieces, T or T k, rows]: sums of strips that several blocks share
    int* arrived;           // one counter per strip (and job, but for DOWN), zero before and after
    int64_t words, groups, zero_words;
    int tokens, slots, experts, rows, columns, group;
    int mode, activation;
    int at_once; // most slots of a job, at most 8 per tile of the matrix instruction
    int blocks, warps, stages; // of the launch, of a block, of a warp's pipeline
    int room;    // bytes of shared memory for activations
    int least;   // steps that a block has at least
    int pieces;  // blocks that share a strip of a job, at most
    // where blocks take whole strips: rows of a strip that are used, strips of a tile as a power of two, warps that share a strip,
    // tiles of a job, steps of a warp for a tile, jobs of DENSE
    int height, teams, teams_log, members, tiles, rounds, jobs;
    int overlap; // start before the launch in front has ended
    float alpha, limit;
};

} // namespace llmcompress::skinny
