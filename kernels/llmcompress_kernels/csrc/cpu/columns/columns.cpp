// Which instruction set runs, and the tiles of all experts side by side.
#include "columns.h"

#include <cstdlib>
#include <cstring>

namespace llmcompress::columns {
namespace {

bool wanted(const char* name) {
    const char* only = std::getenv("LLMCOMPRESS_CPU_ISA");
    return only == nullptr || *only == '\0' || std::strcmp(only, name) == 0;
}

Tile best() {
#ifdef __x86_64__
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && wanted("avx512"))
        return tile_avx512;
    if (avx2 && wanted("avx2")) return tile_avx2;
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
