// What a file per width includes, so that they compile side by side on a GPU's compiler.
#pragma once

#include "device.cuh"

#include "skinny.cuh"
#include "strips.cuh"

#include "launch.h"
