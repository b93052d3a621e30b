// The decode step for any machine.
#include "standard.h"

#define LLMCOMPRESS_ISA decode_portable
#define LLMCOMPRESS_LEVEL 0
#include "step.h"

namespace llmcompress::decode {
void work_portable(Engine& engine, const Cache& cache, const Step& step, Barrier& barrier, int thread) {
    decode_portable::Worker(engine, cache, step, barrier, thread).run();
}
}  // namespace llmcompress::decode
