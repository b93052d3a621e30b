// The kernels of skinny.cuh for a GPU.
#include "device.cuh"

#include "skinny.cuh"

namespace llmcompress::skinny {

template <typename Kernel>
int start(Kernel kernel, unsigned x, unsigned y, unsigned z, int threads, int bytes, const Call& call, void* stream) {
    // more than 48 KB of shared memory have to be asked for; asking again costs less than remembering per device
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return int(error);
    kernel<<<dim3(x, y, z), threads, size_t(bytes), static_cast<cudaStream_t>(stream)>>>(call);
    return int(cudaGetLastError());
}

} // namespace llmcompress::skinny

#include "launch.h"

LLMCOMPRESS_EXPORT const char* llmcompress_skinny_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

// The library has its own copy of CUDA's run time, which shares the device's context with PyTorch's.
LLMCOMPRESS_EXPORT int llmcompress_skinny_device(int device) { return int(cudaSetDevice(device)); }
