// The kernel of update.cuh on the host: for tests of its indices, barriers and arithmetic, thousands of times slower.
// All instances, those of benches too.
#define LLMCOMPRESS_TUNE
#include "../common/emulate.h"

#include "kernel.cuh"

#include "launch.h"

// Whether copies arrive late, and the order of blocks and lanes.
LLMCOMPRESS_EXPORT void llmcompress_state_emulation(int late, unsigned seed) {
    llmcompress::gpu::machine.late = late != 0;
    llmcompress::gpu::machine.order.seed(seed);
}

// per_state of update.cuh.
LLMCOMPRESS_EXPORT float llmcompress_state_per_state(float scale, int bits) {
    using namespace llmcompress::gpu;
    return bits == 4 ? per_state<StateShape<4, 128, 2, 4, false, 1>>(scale) : per_state<StateShape<8, 128, 2, 4, false, 1>>(scale);
}
