// Which instruction set runs, and the tiles of all experts side by side.
#include "columns.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "llmcompress/isa.h"
#include "pack.h"

namespace llmcompress::columns {
namespace {

[[maybe_unused]] bool wanted(const char* name) {
    const char* only = std::getenv("LLMCOMPRESS_CPU_ISA");
    return only == nullptr || *only == '\0' || std::strcmp(only, name) == 0;
}

Tile best() {
#ifdef __x86_64__
    if (has_avx512_core() && wanted("avx512")) return tile_avx512;
    if (has_avx2() && (wanted("avx2") || wanted("avxvnni"))) return tile_avx2;
#endif
    return tile_portable;
}

// 64-byte aligned floats, null where memory runs out.
class Floats {
  public:
    explicit Floats(int64_t count)
        : data_(static_cast<float*>(std::aligned_alloc(64, size_t((count * 4 + 63) / 64 * 64)))) {}
    ~Floats() { std::free(data_); }
    Floats(const Floats&) = delete;
    Floats& operator=(const Floats&) = delete;
    float* get() const { return data_; }

  private:
    float* data_;
};

// What a thread keeps for its next call: new memory of a size that is mapped by itself costs a page fault per 4 KiB.
constexpr int64_t kKept = int64_t(16) << 20;

// Diagonals and packed roots of all experts; groups side by side.
void prepare(const Problem& p, float* packed, int64_t stride, float* diagonals) {
    std::vector<int64_t> places;
    int64_t place = 0;
    for (int64_t start = 0; start < p.columns; start += p.group) {
        places.push_back(place);
        const int64_t size = lesser(p.group, p.columns - start);
        place += start * padded(size);
        for (int64_t at = 0; at < size; at += kBlock) {
            const int64_t width = lesser(kBlock, size - at);
            place += at * padded(width) + width * width;
        }
    }
    for (int64_t e = 0; e < p.experts; ++e)
        for (int64_t c = 0; c < p.columns; ++c)
            diagonals[e * p.columns + c] =
                p.root[e * p.columns * p.columns + (p.columns - 1 - c) * (p.row_stride + p.column_stride)];
    const int64_t count = p.experts * p.groups;
#pragma omp parallel for schedule(dynamic) if (count > 1)
    for (int64_t i = 0; i < count; ++i) {
        const int64_t expert = i / p.groups, group = i % p.groups;
        float* out = packed + expert * stride + places[size_t(group)];
        pack_group(p, expert, group * p.group, diagonals + expert * p.columns, out);
    }
}

}  // namespace
}  // namespace llmcompress::columns

// The lower triangles of matrices, rows and columns in the reverse of an order of visit; null for as they come.
extern "C" __attribute__((visibility("default"))) void llmc_gptq_reversed(const float* matrix, const int64_t* order,
                                                                          float* out, int64_t experts,
                                                                          int64_t columns) {
    const int64_t count = experts * columns;
#pragma omp parallel for schedule(dynamic, 64) if (count > 256)
    for (int64_t i = 0; i < count; ++i) {
        const int64_t expert = i / columns, row = i % columns, visit = columns - 1 - row;
        const float* all = matrix + expert * columns * columns;
        float* to = out + i * columns;
        if (order == nullptr) {
            const float* from = all + visit * columns + columns - 1;
            for (int64_t c = 0; c <= row; ++c) to[c] = from[-c];
        } else {
            const int64_t* place = order + expert * columns;
            const float* from = all + place[visit] * columns;
            for (int64_t c = 0; c <= row; ++c) to[c] = from[place[columns - 1 - c]];
        }
    }
}

// 0, or 1 where memory runs out.
extern "C" __attribute__((visibility("default"))) int llmc_gptq_columns(const llmcompress::columns::Problem* problem) {
    using namespace llmcompress::columns;
    const Problem& p = *problem;
    const Tile tile = best();
    const int64_t tiles = (p.rows + kTile - 1) / kTile, count = p.experts * tiles, stride = packed_floats(p);
    thread_local std::unique_ptr<Floats> kept;
    thread_local int64_t kept_floats = 0;
    const int64_t floats = p.experts * (stride + p.columns);
    if (kept == nullptr || kept_floats < floats) kept = std::make_unique<Floats>(floats), kept_floats = floats;
    float *const packed = kept->get(), *const diagonals = packed + p.experts * stride;
    if (packed == nullptr) return kept.reset(), 1;
    prepare(p, packed, stride, diagonals);
    int failed = 0;
#pragma omp parallel if (count > 1) reduction(| : failed)
    {
        const Floats scratch(scratch_floats(p));
        failed = scratch.get() == nullptr;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; ++i) {
            const int64_t expert = i / tiles;
            const Roots roots{packed + expert * stride, diagonals + expert * p.columns};
            if (scratch.get() != nullptr) tile(p, roots, expert, i % tiles * kTile, scratch.get());
        }
    }
    if (floats * int64_t(sizeof(float)) > kKept) kept.reset();
    return failed;
}
