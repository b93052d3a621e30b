// Which instruction set runs, and the tiles of all experts side by side.
#include "columns.h"

#include <cstdlib>
#include <cstring>

#include "llmcompress/isa.h"

namespace llmcompress::columns {
namespace {

bool wanted(const char* name) {
    const char* only = std::getenv("LLMCOMPRESS_CPU_ISA");
    return only == nullptr || *only == '\0' || std::strcmp(only, name) == 0;
}

Tile best() {
#ifdef __x86_64__
    if (has_avx512_core() && wanted("avx512")) return tile_avx512;
    if (has_avx2() && wanted("avx2")) return tile_avx2;
#endif
    return tile_portable;
}

}  // namespace
}  // namespace llmcompress::columns

// 0, or 1 where memory runs out.
extern "C" __attribute__((visibility("default"))) int llmc_gptq_columns(const llmcompress::columns::Problem* problem) {
    using namespace llmcompress::columns;
    const Problem& p = *problem;
    const Tile tile = best();
    const int64_t tiles = (p.rows + kTile - 1) / kTile, count = p.experts * tiles;
    const int64_t bytes = (scratch_floats(p) * int64_t(sizeof(float)) + 63) / 64 * 64;
    int failed = 0;
#pragma omp parallel if (count > 1) reduction(| : failed)
    {
        float* scratch = static_cast<float*>(std::aligned_alloc(64, size_t(bytes)));
        failed = scratch == nullptr;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; ++i)
            if (scratch != nullptr) tile(p, i / tiles, i % tiles * kTile, scratch);
        std::free(scratch);
    }
    return failed;
}
