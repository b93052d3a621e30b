// How a GPU starts the kernels of skinny.cuh; a file per width includes it, so that they compile side by side.
#pragma once

#include "device.cuh"

#include "skinny.cuh"
#include "strips.cuh"

namespace llmcompress::skinny {

template <typename Kernel, typename Told>
int start(Kernel kernel, unsigned blocks, int threads, int bytes, const Told& call, void* stream) {
    // more than 48 KB of shared memory have to be asked for; asking again costs less than remembering per device
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return int(error);
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &overlap;
    config.numAttrs = call.overlap ? 1 : 0;
    return int(cudaLaunchKernelEx(&config, kernel, call));
}

} // namespace llmcompress::skinny

#include "launch.h"
