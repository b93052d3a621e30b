// The kernels of skinny.cuh on the host: for tests of their indices, barriers and arithmetic, thousands of times slower.
#include "emulate.h"

#include "skinny.cuh"
#include "strips.cuh"

#include "launch.h"

LLMCOMPRESS_SKINNY(2)
LLMCOMPRESS_SKINNY(3)
LLMCOMPRESS_SKINNY(4)

// Whether copies arrive late, and the order of blocks and lanes.
LLMCOMPRESS_EXPORT void llmcompress_skinny_emulation(int late, unsigned seed) {
    llmcompress::skinny::machine.late = late != 0;
    llmcompress::skinny::machine.order.seed(seed);
}
