// The products in use. They are a library of their own for each instruction set (cpu/products); whoever loads this one hands
// them over before anything is multiplied (cpu.py).
#include "llmcompress/lowbit.h"

namespace llmcompress {
namespace {

const Variant* chosen = nullptr;

}  // namespace

const Variant& variant() { return *chosen; }

}  // namespace llmcompress

extern "C" __attribute__((visibility("default"))) void llmcompress_use_products(const llmcompress::Variant* products) {
    llmcompress::chosen = products;
}
