// What one launch is told; llmcompress_kernels/cuda/tree.py holds the same structures.
#pragma once

#include <cstdint>

namespace llmcompress::gpu {

constexpr int MOST_NODES = 64;

// Nodes of 1 bit and at most this many tokens count bits, for each token anew; all others multiply, for eight tokens at once.
constexpr int MOST_COUNTED = 4, COUNTS = 8;

struct TreeNode {
    const unsigned char* words; // [N, K bits / 8] stored codes
    const uint16_t* scale;      // [N, G] fp16
    float multiplier;           // of the scales
    int bits, low, high;        // tokens low <= t < high

#ifdef __CUDACC__
    __host__ __device__
#endif
    bool counts() const { return bits == 1 && high - low <= MOST_COUNTED; }
};

// T tokens, N rows, K columns in G groups of 128.
struct TreeCall {
    const void* x; // [T, K]
    void* out;     // [T, N]
    float* parts;  // [strips, slabs, sums of a strip], then [slabs, blocks, warps, sums of a strip]
    int* arrived;  // one counter per block of a slab, or one per strip where these are spread, zero before and after
    int tokens, rows, columns, groups;
    int nodes, forms;          // forms: sum of BITS of nodes that multiply, and of COUNTS
    int slabs, blocks, strips; // slabs of columns, blocks of each, strips of rows
    int steps, last_steps;     // of a strip, in the last slab
    int overlap;               // whether the launch in front may still run while weights are read
    TreeNode node[MOST_NODES];
};

} // namespace llmcompress::gpu
