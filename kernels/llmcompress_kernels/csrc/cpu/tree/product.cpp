// C interface: rows of several models against all nodes of one weight, on several threads.
#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "llmcompress/tree.h"

using namespace llmcompress;

namespace {

// multiply-adds below which a second thread costs more than it saves
constexpr int64_t SERIAL_WORK = 1 << 17;

struct Memory {
    std::vector<char> bytes;
    void* get(size_t size) {
        if (bytes.size() < size + 64) bytes.resize(size + 64);
        return bytes.data();
    }
};

}  // namespace

// out[t, n] = sum over the nodes whose span holds t of x[t] W'. `x` and `out` are fp32 and contiguous, out has `rows`
// rows rounded up to 16 per token. Spans are pairs (low, high), one to a node.
extern "C" __attribute__((visibility("default"))) void llmcompress_tree_product(
    const TreeNode* nodes, int64_t count, const int64_t* spans, int64_t rows, int64_t columns, int64_t group, const float* x,
    int64_t tokens, int32_t planes, int32_t threads, float* out) {
    static thread_local Memory memory;
    std::vector<TreeChunk> parts(size_t(tree_chunks(columns, group, nullptr)));
    tree_chunks(columns, group, parts.data());
    const TreeShape shape = tree_shape(columns, group, int64_t(parts.size()), parts.data(), nodes, count);
    const int64_t blocks = (rows + LANES - 1) / LANES, stride = blocks * LANES;
    const TreeVariant& v = tree_variant;
    for (int64_t first = 0; first < tokens; first += TREE_PASS) {
        const int64_t now = std::min(TREE_PASS, tokens - first);
        const TreeActivations a =
            place_tree_activations(shape, now, planes, memory.get(tree_activation_bytes(shape, now, planes)));
        float* const to = out + first * stride;
        const int team = rows * columns * now < SERIAL_WORK ? 1 : threads;
        const int64_t tasks = std::min<int64_t>(blocks, team == 1 ? 1 : 4 * team);
#pragma omp parallel num_threads(team) if (team > 1)
        {
#pragma omp for schedule(static)
            for (int64_t t = 0; t < now; ++t) v.quantize(shape, x + (first + t) * columns, a, t);
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < tasks; ++i) {
                const int64_t from = blocks * i / tasks, till = blocks * (i + 1) / tasks;
                for (int64_t t = 0; t < now; ++t)
                    std::memset(to + t * stride + from * LANES, 0, size_t((till - from) * LANES) * sizeof(float));
                for (int64_t n = 0; n < count; ++n) {
                    const int64_t low = std::max<int64_t>(0, spans[2 * n] - first), high = std::min(now, spans[2 * n + 1] - first);
                    if (low < high) v.add(nodes[n], shape, a, low, high, from, till, to, stride);
                }
            }
        }
    }
}

// Bits [shift, shift + part) of the codes of a canonical LSB-first stream [rows, words], in the order of tree.h.
extern "C" __attribute__((visibility("default"))) void llmcompress_tree_plane(
    const uint32_t* stream, int64_t rows, int64_t columns, int64_t group, int32_t bits, int32_t shift, int32_t part,
    int32_t threads, uint32_t* out) {
    const int64_t words = (columns * bits + 31) / 32, blocks = (rows + LANES - 1) / LANES;
    int64_t units = 0;
    for (int64_t begin = 0; begin < columns; begin += group) units += (std::min(group, columns - begin) + UNIT - 1) / UNIT;
    const uint32_t keep = (1u << part) - 1;
    const int each = UNIT / part;  // codes of a word
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        uint32_t* to = out + block * units * part * LANES;
        for (int64_t begin = 0; begin < columns; begin += group) {
            const int64_t end = std::min(begin + group, columns);
            for (int64_t first = begin; first < end; first += UNIT)
                for (int w = 0; w < part; ++w, to += LANES)
                    for (int64_t lane = 0; lane < LANES; ++lane) {
                        const int64_t row = block * LANES + lane;
                        uint32_t word = 0;
                        for (int i = 0; i < each && row < rows; ++i) {
                            const int64_t column = first + w * each + i;
                            if (column >= end) break;
                            const uint32_t* from = stream + row * words + column * bits / 32;
                            const int at = int(column * bits % 32);
                            uint64_t pair = *from;
                            if (at + bits > 32) pair |= uint64_t(from[1]) << 32;
                            word |= (uint32_t(pair >> (at + shift)) & keep) << (8 * (i % 4) + part * (i / 4));
                        }
                        to[lane] = word;
                    }
        }
    }
}

extern "C" __attribute__((visibility("default"))) int llmcompress_tree_node_size() { return int(sizeof(TreeNode)); }
