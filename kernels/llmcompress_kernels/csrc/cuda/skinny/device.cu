// The CUDA run time of this library, which shares the device's context with PyTorch's.
#include "../common/device.cuh"

LLMCOMPRESS_EXPORT const char* llmcompress_skinny_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

LLMCOMPRESS_EXPORT int llmcompress_skinny_device(int device) { return int(cudaSetDevice(device)); }
