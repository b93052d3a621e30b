// The kernels of skinny.cuh for 2 bits.
#include "start.cuh"

LLMCOMPRESS_SKINNY(2)
