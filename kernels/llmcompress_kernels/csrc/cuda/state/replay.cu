// The kernels of update.cuh and read.cuh for replay windows on a GPU.
#include "../common/device.cuh"

#include "kernel.cuh"

#include "read.cuh"

#include "replay.h"

LLMCOMPRESS_EXPORT const char* llmcompress_replay_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

// The library has its own copy of CUDA's run time, which shares the device's context with PyTorch's.
LLMCOMPRESS_EXPORT int llmcompress_replay_device(int device) { return int(cudaSetDevice(device)); }
