// The instructions that skinny.cuh is written in, for a GPU of compute capability 8.0 or more. emulate.h has the same
// names for the host.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

namespace llmcompress::skinny {

__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

// 16 bytes from global to shared memory, past the registers and past L1; the rest of its 128 bytes comes into L2, since a
// warp reads a row in pieces of 96 or 128 bytes. Asking for 256 is no faster (H200).
// `shared` comes from shared_address; BEYOND bytes behind it.
template <int BEYOND> __device__ __forceinline__ void copy_async(unsigned shared, const void* global) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0+%2], [%1], 16;" ::"r"(shared), "l"(global), "n"(BEYOND) : "memory");
}
using SharedAddress = unsigned;
__device__ __forceinline__ SharedAddress shared_address(void* at) { return static_cast<unsigned>(__cvta_generic_to_shared(at)); }

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most LEFT of the committed groups of this thread are on their way.
template <int LEFT> __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

__device__ __forceinline__ void sync() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ bool any_of_warp(bool mine) { return __any_sync(0xFFFFFFFFu, mine); }

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

// d += a b for 16 rows, 16 columns and 8 tokens; rows and tokens as in PTX's fragments of mma.m16n8k16.
template <bool BF16>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (BF16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t which) { return __byte_perm(a, b, which); }
__device__ __forceinline__ uint32_t funnel(uint32_t low, uint32_t high, uint32_t by) { return __funnelshift_r(low, high, by); }

// (v & mask) | set, which the compiler does not always find to be one instruction
__device__ __forceinline__ uint32_t mask_set(uint32_t v, uint32_t mask, uint32_t set) {
    uint32_t out;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(v), "r"(mask), "r"(set));
    return out;
}

template <bool BF16> __device__ __forceinline__ float widen(uint16_t v) {
    if constexpr (BF16) return __uint_as_float(uint32_t(v) << 16);
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v));
    return out;
}

template <bool BF16> __device__ __forceinline__ uint16_t narrow(float v) {
    uint16_t out;
    if constexpr (BF16)
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(v));
    else
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(v));
    return out;
}

// Weights, which nothing writes while kernels run: the compiler may move such reads anywhere, in front of previous_launch()
// too. And what other blocks of the launch wrote.
template <typename T> __device__ __forceinline__ T read(const T* at) { return __ldg(at); }
__device__ __forceinline__ float read_written(const float* at) { return __ldcg(at); }

// The same number, but the compiler does not know: what is computed from it is computed where it stands, and takes no register
// through the loop around it.
__device__ __forceinline__ int anew(int v) {
    asm volatile("" : "+r"(v));
    return v;
}

__device__ __forceinline__ int add(int* counter, int value) { return atomicAdd(counter, value); }
__device__ __forceinline__ void fence() { __threadfence(); }

struct alignas(16) Words { uint32_t at[4]; };
struct alignas(8) Pair { float x, y; };
struct alignas(16) Four { float at[4]; };
struct alignas(16) Eight { uint64_t at[2]; }; // scales
template <> __device__ __forceinline__ Eight read<Eight>(const Eight* at) {
    const ulonglong2 v = __ldg(reinterpret_cast<const ulonglong2*>(at));
    return {v.x, v.y};
}

} // namespace llmcompress::skinny
