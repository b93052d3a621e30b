// The instructions that kernels are written in, for a GPU of compute capability 8.0 or more. emulate.h has the same names
// for the host.
#pragma once

#include <cstdint>
#include <cuda_runtime.h>

namespace llmcompress::gpu {

__device__ __forceinline__ unsigned char* shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
}

// 16 bytes from global to shared memory past the registers and past L1; 4 bytes through L1, whose sector holds the next.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_word_async(void* shared, const void* global) {
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(global) : "memory");
}

// 16 bytes likewise, BEYOND bytes behind an address that comes from a family's shared_address; the rest of their 128 bytes
// comes into L2, since a warp reads a row in pieces of 96 or 128 bytes. Asking for 256 is no faster (H200).
using SharedAddress = unsigned;
template <int BEYOND> __device__ __forceinline__ void copy_async(SharedAddress shared, const void* global) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0+%2], [%1], 16;" ::"r"(shared), "l"(global), "n"(BEYOND) : "memory");
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most LEFT of the committed groups of this thread are on their way.
template <int LEFT> __device__ __forceinline__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

__device__ __forceinline__ void sync() { __syncthreads(); }
__device__ __forceinline__ bool sync_or(bool v) { return __syncthreads_or(v) != 0; }

// All lanes of a warp take part in each of these.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ float swap(float v, int with) { return __shfl_xor_sync(~0u, v, with); }
__device__ __forceinline__ uint32_t ballot(bool v) { return __ballot_sync(~0u, v); }
__device__ __forceinline__ bool any_of_warp(bool mine) { return __any_sync(~0u, mine); }
__device__ __forceinline__ uint32_t largest(uint32_t v) { return __reduce_max_sync(~0u, v); }
__device__ __forceinline__ int first_of(uint32_t mask) { return __ffs(int(mask)) - 1; }
__device__ __forceinline__ int count_of(uint32_t mask) { return __popc(mask); }

// d = a b + c for 16 rows, 16 columns and 8 tokens; rows and tokens as in PTX's fragments of mma.m16n8k16.
template <bool BF16>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
    if constexpr (BF16)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// Each rounded by itself: nothing of these is ever fused with its neighbours.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float root(float v) { return __fsqrt_rn(v); }
__device__ __forceinline__ float nearest(float v) { return rintf(v); }
__device__ __forceinline__ float size_of(float v) { return fabsf(v); }
__device__ __forceinline__ float more_of(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ float less_of(float a, float b) { return fminf(a, b); }
// The same, and NaN where one of them is.
__device__ __forceinline__ float more_or_nan(float a, float b) {
    float out;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
    return out;
}
__device__ __forceinline__ float less_or_nan(float a, float b) {
    float out;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
    return out;
}

// Of numbers that are not negative, whose order is that of their bits, NaN last: one instruction from compute capability 9.0 on.
__device__ __forceinline__ float most_of_three(float a, float b, float c) {
    return __int_as_float(__vimax3_s32(__float_as_int(a), __float_as_int(b), __float_as_int(c)));
}

// 1 / v off by no more than its last bit.
__device__ __forceinline__ float about_inverse(float v) {
    float out;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
    return out;
}

// The root of v that is not negative, likewise.
__device__ __forceinline__ float about_root(float v) {
    float out;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
    return out;
}

__device__ __forceinline__ uint32_t bits_of(float v) { return __float_as_uint(v); }
__device__ __forceinline__ float float_of(uint32_t v) { return __uint_as_float(v); }
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t which) { return __byte_perm(a, b, which); }

// (v & mask) | set, which the compiler does not always find to be one instruction
__device__ __forceinline__ uint32_t mask_set(uint32_t v, uint32_t mask, uint32_t set) {
    uint32_t out;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(v), "r"(mask), "r"(set));
    return out;
}

// (v & mask) ^ turn
__device__ __forceinline__ uint32_t mask_turn(uint32_t v, uint32_t mask, uint32_t turn) {
    uint32_t out;
    asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(out) : "r"(v), "r"(mask), "r"(turn));
    return out;
}

// The smaller of both halves of two words.
__device__ __forceinline__ uint32_t less_halves(uint32_t a, uint32_t b) { return __vminu2(a, b); }

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

// Both halves of a word times both of another, exact for powers of two.
template <bool BF16> __device__ __forceinline__ uint32_t multiply_pair(uint32_t a, uint32_t b) {
    uint32_t out;
    if constexpr (BF16)
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(0x80008000u));
    else
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(0x80008000u));
    return out;
}

// Read-only data that no other block writes; and what other blocks of the launch wrote.
template <typename T> __device__ __forceinline__ T read(const T* at) { return __ldg(at); }
__device__ __forceinline__ float read_written(const float* at) { return __ldcg(at); }

// The compiler moves no access to memory across this: loads that it would like to begin early cost registers.
__device__ __forceinline__ void in_order() { asm volatile("" ::: "memory"); }

// The thread's number, read anew: what is computed from it is computed again and takes no register until then.
__device__ __forceinline__ int thread_again() {
    int out;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(out));
    return out;
}

// The same number, but the compiler does not know: what is computed from it is computed where it stands, and takes no register
// through the loop around it.
__device__ __forceinline__ int anew(int v) {
    asm volatile("" : "+r"(v));
    return v;
}

__device__ __forceinline__ int count_up(int* counter) { return atomicAdd(counter, 1); }
__device__ __forceinline__ void fence() { __threadfence(); }

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

struct alignas(16) Words { uint32_t at[4]; };
struct alignas(16) Four { float at[4]; };
struct alignas(8) Two { float x, y; };

// The largest shared memory of a kernel has to be asked for; asking again costs less than remembering per device.
template <typename Kernel, typename Call>
int start(Kernel kernel, unsigned x, unsigned y, int threads, int bytes, const Call& call, void* stream) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return int(error);
    kernel<<<dim3(x, y), threads, size_t(bytes), static_cast<cudaStream_t>(stream)>>>(call);
    return int(cudaGetLastError());
}

// Likewise, and where the call asks for it before the launch in front has ended, which previous_launch waits for.
template <typename Kernel, typename Call>
int start_early(Kernel kernel, unsigned x, unsigned y, int threads, int bytes, const Call& call, void* stream) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return int(error);
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(x, y);
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &overlap;
    config.numAttrs = call.overlap ? 1 : 0;
    return int(cudaLaunchKernelEx(&config, kernel, call));
}

// Blocks that the device runs at once, or a negative error.
template <typename Kernel> int at_once(Kernel kernel, int threads, int bytes) {
    int device = 0, processors = 0, each = 0;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, size_t(bytes));
    return error == cudaSuccess ? each * processors : -int(error);
}

} // namespace llmcompress::gpu

#define LLMCOMPRESS_EXPORT extern "C" __attribute__((visibility("default")))
