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

// 16 bytes from global to shared memory, past the registers and past L1; the rest of its 128 bytes comes into L2, since a
// warp reads a row in pieces of 96 or 128 bytes. Asking for 256 is no faster (H200).
// `shared` comes from shared_address; BEYOND bytes behind it.
template <int BEYOND> __device__ __forceinline__ void copy_async(unsigned shared, const void* global) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0+%2], [%1], 16;" ::"r"(shared), "l"(global), "n"(BEYOND) : "memory");
}
using SharedAddress = unsigned;
__device__ __forceinline__ SharedAddress shared_address(void* at) { return static_cast<unsigned>(__cvta_generic_to_shared(at)); }

__device__ __forceinline__ bool any_of_warp(bool mine) { return __any_sync(0xFFFFFFFFu, mine); }

// 16 bytes that a launch in front wrote.
__device__ __forceinline__ Words words_written(const Words* at) {
    const uint4 v = __ldcg(reinterpret_cast<const uint4*>(at));
    return {{v.x, v.y, v.z, v.w}};
}

// Wait for the launch in front of this one to end and its results to be visible; until then only weights may be read.
__device__ __forceinline__ void previous_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Let the launch behind this one start as soon as there is room.
__device__ __forceinline__ void next_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// d += a b for 16 rows, 16 columns and 8 tokens.
template <bool BF16> __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    gpu::mma<BF16>(d, a, b0, b1, d);
}

__device__ __forceinline__ uint32_t funnel(uint32_t low, uint32_t high, uint32_t by) { return __funnelshift_r(low, high, by); }

// The same number, but the compiler does not know: what is computed from it is computed where it stands, and takes no register
// through the loop around it.
__device__ __forceinline__ int anew(int v) {
    asm volatile("" : "+r"(v));
    return v;
}

__device__ __forceinline__ int add(int* counter, int value) { return atomicAdd(counter, value); }

} // namespace llmcompress::skinny
