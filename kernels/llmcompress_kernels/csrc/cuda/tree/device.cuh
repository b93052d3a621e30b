// The instructions that tree.cuh is written in, besides those of common/device.cuh, for a GPU of compute capability 8.0 or
// more. emulate.h has the same names for the host.
#pragma once

#include "../common/device.cuh"

namespace llmcompress::gpu {

struct alignas(8) Pair { uint32_t x, y; };

// d[r][c] = how many of 128 places have a bit in row r of a and in column c of b: 16 rows, 8 columns, fragments as in PTX's
// mma.m16n8k128 for single bits.
__device__ __forceinline__ void count_common(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    asm("mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%7,%7,%7};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a0), "r"(a1), "r"(b), "r"(0));
}

// Addresses in shared memory: kept, since the compiler would rather compute them anew for every copy.
__device__ __forceinline__ SharedAddress shared_address(void* at) {
    auto out = static_cast<unsigned>(__cvta_generic_to_shared(at));
    asm volatile("" : "+r"(out));
    return out;
}

// 4 bytes from global to shared memory, BEYOND bytes behind the address.
template <int BEYOND> __device__ __forceinline__ void copy_word_async(SharedAddress shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0+%2], [%1], 4;" ::"r"(shared), "l"(global), "n"(BEYOND) : "memory");
}

// Four matrices of 8 rows of 16 bytes; lane i gives the address of row i % 8 of matrix i / 8 and gets word i % 4 of row i / 4
// of each.
__device__ __forceinline__ Words load_matrices(SharedAddress address) {
    Words out;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out.at[0]), "=r"(out.at[1]), "=r"(out.at[2]), "=r"(out.at[3])
                 : "r"(address)
                 : "memory");
    return out;
}

__device__ __forceinline__ Four read_written_four(const float* at) {
    const float4 v = __ldcg(reinterpret_cast<const float4*>(at));
    return {{v.x, v.y, v.z, v.w}};
}

} // namespace llmcompress::gpu
