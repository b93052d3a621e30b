// Which instruction set runs, and where quantized activations lie in memory.
#include "llmcompress/isa.h"
#include "llmcompress/lowbit.h"

namespace llmcompress {
namespace {

const Candidate<Variant> candidates[] = {
#ifdef __x86_64__
    {&avx512_variant, has_avx512},
    {&avx2_variant, has_avx2},
#endif
    {&portable_variant, always},
};

Choice choice(candidates);

}  // namespace

bool select_variant(const char* name) { return choice.select(name); }

const Variant& variant() { return choice.get(); }

Activations place_activations(const Weight& w, int64_t tokens, int planes, void* memory) {
    const int64_t padded = (tokens + 7) / 8 * 8;
    const int64_t count = chunks(w.bits, w.group, w.columns, nullptr, planes);
    Parts parts(memory);
    Activations a;
    a.bytes = parts.take<int8_t>(padded * Activations::quads(w.bits, w.columns, w.group) * 4 * planes);
    a.scale = parts.take<float>(padded * count);
    a.sum = parts.take<float>(padded * count);
    a.tokens = tokens;
    a.planes = planes;
    a.most = variant().token_block;
    return a;
}

}  // namespace llmcompress

extern "C" __attribute__((visibility("default"))) int llmcompress_select_isa(const char* name) {
    return llmcompress::select_variant(name) ? 1 : 0;
}
extern "C" __attribute__((visibility("default"))) const char* llmcompress_isa() { return llmcompress::variant().name; }
