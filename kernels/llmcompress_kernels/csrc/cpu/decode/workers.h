// What one thread does of a step or a prompt, by instruction set.
#pragma once

#include "engine.h"
#include "llmcompress/barrier.h"
#include "prompt_room.h"

namespace llmcompress::decode {

struct Workers {
    void (*step)(Engine&, const Cache&, const Step&, Barrier&, int thread);
    void (*prompt)(Engine&, const Cache&, const Prompt&, PromptRoom&, Barrier&, int thread);
};
extern const Workers portable_workers;
#ifdef __x86_64__
extern const Workers avx2_workers, avx512_workers;
#endif

}  // namespace llmcompress::decode
