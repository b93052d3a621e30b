// The kernels of skinny.cuh for 4 bits.
#include "start.cuh"

LLMCOMPRESS_SKINNY(4)
