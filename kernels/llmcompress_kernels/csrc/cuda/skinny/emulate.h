// The instructions of device.cuh on the host; common/emulate.h says what breaks here when a kernel is wrong.
#pragma once

#include "../common/emulate.h"

#include <math.h>

#define blockDim (llmcompress::gpu::machine.size)

namespace llmcompress::gpu {

struct alignas(8) Pair { float x, y; };
struct alignas(16) Eight { uint64_t at[2]; }; // scales

} // namespace llmcompress::gpu

namespace llmcompress::skinny {

using namespace gpu;

inline SharedAddress shared_address(void* at) { return static_cast<unsigned char*>(at); }

inline Words words_written(const Words* at) { return *at; }

template <bool BF16> inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { gpu::mma<BF16>(d, a, b0, b1, d); }

inline uint32_t funnel(uint32_t low, uint32_t high, uint32_t by) { return uint32_t((uint64_t(high) << 32 | low) >> (by & 31)); }

inline int add(int* counter, int value) {
    const int before = *counter;
    *counter += value;
    return before;
}

} // namespace llmcompress::skinny
