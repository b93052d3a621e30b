// The kernels for Arm processors with dot products of bytes. Headers come before the pragma, see avx2.cpp.
#include "llmcompress/lowbit.h"
#include "llmcompress/target.h"
#include "llmcompress/types.h"

#include <arm_neon.h>

#include <cmath>

LLMCOMPRESS_TARGET("arch=armv8.2-a+dotprod")
namespace llmcompress {
namespace neon {
#include "llmcompress/lanes_neon.h"
#include "llmcompress/lowbit.inc"
}  // namespace neon
const Variant llmcompress_products = neon::products;
}  // namespace llmcompress
LLMCOMPRESS_TARGET_END
