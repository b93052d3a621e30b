// How fast this machine reads memory: the floor that every product with few tokens is measured against.
#include <omp.h>

#include <algorithm>
#include <cstdint>

// Read `bytes` (a multiple of 64) on `threads` threads, one stream each, prefetching `ahead` bytes; returns a checksum.
extern "C" __attribute__((visibility("default"))) uint64_t llmcompress_read(const uint64_t* memory, int64_t bytes,
                                                                            int threads, int64_t ahead) {
    const int64_t lines = bytes / 64;
    uint64_t sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : sum)
    for (int part = 0; part < threads; ++part) {
        uint64_t lanes[8] = {};
        const int64_t last = lines * (part + 1) / threads;
        for (int64_t i = lines * part / threads; i < last; ++i) {
            const uint64_t* line = memory + i * 8;
            __builtin_prefetch(reinterpret_cast<const char*>(line) + ahead, 0, 3);
            for (int k = 0; k < 8; ++k) lanes[k] += line[k];
        }
        for (uint64_t lane : lanes) sum += lane;
    }
    return sum;
}
