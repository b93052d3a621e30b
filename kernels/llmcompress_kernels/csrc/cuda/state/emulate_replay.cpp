// The kernels of replay windows on the host: for tests, as emulate.cpp.
#define LLMCOMPRESS_TUNE
#include "../common/emulate.h"

#include "kernel.cuh"

#include "read.cuh"

#include "replay.h"

// Whether copies arrive late, and the order of blocks and lanes.
LLMCOMPRESS_EXPORT void llmcompress_replay_emulation(int late, unsigned seed) {
    llmcompress::gpu::machine.late = late != 0;
    llmcompress::gpu::machine.order.seed(seed);
}
