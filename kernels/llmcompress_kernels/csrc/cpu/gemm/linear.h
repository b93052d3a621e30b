// One product with one weight, on all threads.
#pragma once

#include <vector>

#include "llmcompress/lowbit.h"

namespace llmcompress {

// A weight as PyTorch holds it: interleaved, or canonical (row-major streams, any number of rows).
struct Operand {
    const uint32_t* packed;
    const uint16_t* scale;
    const uint32_t* zero;
    int64_t rows, columns, group;
    int bits;
    bool interleaved;

    Weight weight() const { return {packed, scale, zero, rows, columns, group, bits}; }
    // Rows [first, first + count), of which the first is a multiple of 16.
    Operand part(int64_t first, int64_t count) const {
        const Weight w = weight().from(first);
        return {w.packed, w.scale, w.zero, count, columns, group, bits, interleaved};
    }
};

// Scratch that grows and stays with its thread.
class Scratch {
   public:
    void* get(size_t bytes);
    void trim(size_t most);  // give memory back if it is more than that
    ~Scratch();

   private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};

struct Plan {
    std::vector<Chunk> parts;
    Plan() = default;
    Plan(const Operand& w, int planes) : parts(size_t(chunk_count(w.group, w.columns, planes))) {
        chunks(w.bits, w.group, w.columns, parts.data(), planes);
    }
    int64_t count() const { return int64_t(parts.size()); }
};

// Row blocks [first, last) of `w`, 16 rows each, for quantized activations; the last one may have fewer rows.
void operand_rows(const Operand& w, const Plan& plan, const Activations& a, int64_t first, int64_t last, void* out,
                  Type type, int64_t stride);

inline int64_t blocks_of(int64_t rows) { return (rows + LANES - 1) / LANES; }
int threads_for(int64_t work);

// out[t, n] = sum over k of x[t, k] * w[n, k]; x and out are contiguous.
void linear(const Operand& w, const void* x, Type type, int64_t tokens, int planes, void* out);

}  // namespace llmcompress
