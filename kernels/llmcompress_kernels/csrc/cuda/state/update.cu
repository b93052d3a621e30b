// The kernel of update.cuh for a GPU.
#include "../common/device.cuh"

#include "kernel.cuh"

#include "launch.h"

LLMCOMPRESS_EXPORT const char* llmcompress_state_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

// The library has its own copy of CUDA's run time, which shares the device's context with PyTorch's.
LLMCOMPRESS_EXPORT int llmcompress_state_device(int device) { return int(cudaSetDevice(device)); }
