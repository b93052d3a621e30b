// The kernels of skinny.cuh for 3 bits.
#include "start.cuh"

LLMCOMPRESS_SKINNY(3)
