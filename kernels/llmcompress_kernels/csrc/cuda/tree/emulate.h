// The instructions of device.cuh on the host.
#pragma once

#include "../common/emulate.h"

namespace llmcompress::gpu {

struct alignas(8) Pair { uint32_t x, y; };

// What the lanes of a block show each other.
struct Shown { const void* address; uint32_t at[3]; };
inline Shown shown[1024];

inline void count_common(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    const unsigned thread = threadIdx.x, lane = thread % 32, g = lane / 4, t = lane % 4;
    shown[thread] = {nullptr, {a0, a1, b}};
    pause(Waits::SYNC);
    const Shown* warp = shown + thread - lane;
    for (unsigned i = 0; i < 4; ++i) {
        d[i] = 0;
        for (unsigned k = 0; k < 4; ++k)
            d[i] += __builtin_popcount(warp[4 * g + k].at[i / 2] & warp[4 * (2 * t + i % 2) + k].at[2]);
    }
    pause(Waits::SYNC);
}

inline SharedAddress shared_address(void* at) { return static_cast<unsigned char*>(at); }
template <int BEYOND> inline void copy_word_async(SharedAddress shared, const void* global) { copy(shared + BEYOND, global, 4); }

inline Words load_matrices(SharedAddress shared) {
    const unsigned thread = threadIdx.x, lane = thread % 32;
    shown[thread].address = shared;
    pause(Waits::SYNC);
    Words out;
    for (unsigned i = 0; i < 4; ++i)
        std::memcpy(&out.at[i], static_cast<const char*>(shown[thread - lane + 8 * i + lane / 4].address) + lane % 4 * 4, 4);
    pause(Waits::SYNC);
    return out;
}

inline Four read_written_four(const float* at) { return *reinterpret_cast<const Four*>(at); }

} // namespace llmcompress::gpu
