// Everything that the step uses and that must not be compiled for its instruction set: the linker keeps one copy of
// an inline function, and it has to be one that any machine can run.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "clock.h"
#include "decode.h"
#include "engine.h"
#include "llmcompress/barrier.h"
#include "llmcompress/packed_row.h"
#include "llmcompress/types.h"
#include "prompt_room.h"
#include "workers.h"

// vectors of sixteen floats pass between inlined functions only, so their calling convention does not matter
#pragma GCC diagnostic ignored "-Wpsabi"
