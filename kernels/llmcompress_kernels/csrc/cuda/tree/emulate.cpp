// The kernel of tree.cuh on the host: for tests of its indices, barriers and arithmetic, thousands of times slower.
// With one of the instances that only benches have and whose parts are spread.
#define LLMCOMPRESS_SPREAD
#include "emulate.h"

#include "tree.cuh"

#include "launch.h"

// Whether copies arrive late, and the order of blocks and lanes.
LLMCOMPRESS_EXPORT void llmcompress_tree_emulation(int late, unsigned seed) {
    llmcompress::gpu::machine.late = late != 0;
    llmcompress::gpu::machine.order.seed(seed);
}
