// What one thread does of a step or a prompt.
#pragma once

#include "engine.h"
#include "llmcompress/barrier.h"
#include "prompt_room.h"

namespace llmcompress::decode {

struct Workers {
    void (*step)(Engine&, const Cache&, const Step&, Barrier&, int thread);
    void (*prompt)(Engine&, const Cache&, const Prompt&, PromptRoom&, Barrier&, int thread);
};
extern const Workers workers;  // of the instruction set that this library is compiled for

}  // namespace llmcompress::decode
