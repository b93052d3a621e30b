// How fast this machine reads memory: the floor that every product with few tokens is measured against.
#include <omp.h>

#include <cstdint>

// Read `bytes` on `threads` threads, each in `streams` places at a time, prefetching `ahead` bytes; returns a checksum.
extern "C" __attribute__((visibility("default"))) uint64_t llmcompress_read(const uint64_t* memory, int64_t bytes,
                                                                            int threads, int streams, int64_t ahead) {
    const int64_t lines = bytes / 64 / (threads * streams);  // of one stream
    uint64_t sum = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(+ : sum)
    for (int part = 0; part < threads; ++part) {
        uint64_t lanes[8] = {};
        const uint64_t* const begin = memory + part * streams * lines * 8;
        for (int64_t i = 0; i < lines; ++i)
            for (int s = 0; s < streams; ++s) {
                const uint64_t* line = begin + (s * lines + i) * 8;
                __builtin_prefetch(reinterpret_cast<const char*>(line) + ahead, 0, 3);
                for (int k = 0; k < 8; ++k) lanes[k] += line[k];
            }
        for (uint64_t lane : lanes) sum += lane;
    }
    return sum;
}
