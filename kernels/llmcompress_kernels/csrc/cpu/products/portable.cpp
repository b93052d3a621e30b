// The kernels without any instruction set in mind; also what other processors than x86 run.
#include <cmath>

#include "llmcompress/lowbit.h"
#include "llmcompress/types.h"

namespace llmcompress {
namespace portable {
#include "llmcompress/lanes_portable.h"
#include "llmcompress/lowbit.inc"
}  // namespace portable
const Variant llmcompress_products = portable::products;
}  // namespace llmcompress
