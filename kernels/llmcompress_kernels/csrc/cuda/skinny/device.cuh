// The instructions that skinny.cuh is written in, besides those of common/device.cuh, for a GPU of compute capability 8.0
// or more. emulate.h has the same names for the host.
#pragma once

#include "../common/device.cuh"

namespace llmcompress::gpu {

struct alignas(8) Pair { float x, y; };
struct alignas(16) Eight { uint64_t at[2]; }; // scales
template <> __device__ __forceinline__ Eight read<Eight>(const Eight* at) {
    const ulonglong2 v = __ldg(reinterpret_cast<const ulonglong2*>(at));
    return {v.x, v.y};
}

} // namespace llmcompress::gpu

namespace llmcompress::skinny {

using namespace gpu;

__device__ __forceinline__ SharedAddress shared_address(void* at) { return static_cast<unsigned>(__cvta_generic_to_shared(at)); }

// 16 bytes that a launch in front wrote.
__device__ __forceinline__ Words words_written(const Words* at) {
    const uint4 v = __ldcg(reinterpret_cast<const uint4*>(at));
    return {{v.x, v.y, v.z, v.w}};
}

// d += a b for 16 rows, 16 columns and 8 tokens.
template <bool BF16> __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    gpu::mma<BF16>(d, a, b0, b1, d);
}

__device__ __forceinline__ uint32_t funnel(uint32_t low, uint32_t high, uint32_t by) { return __funnelshift_r(low, high, by); }

__device__ __forceinline__ int add(int* counter, int value) { return atomicAdd(counter, value); }

} // namespace llmcompress::skinny
