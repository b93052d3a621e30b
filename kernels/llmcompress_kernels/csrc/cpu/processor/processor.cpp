// Which instruction sets this processor runs, by the names of cpu.py. A family of its own: it has to be asked before it is
// known what to compile.
#include <cstring>

#include "llmcompress/isa.h"

extern "C" __attribute__((visibility("default"))) int llmcompress_runs(const char* name) {
    using namespace llmcompress;
    struct {
        const char* name;
        bool (*runs)();
    } const known[] = {
#ifdef __x86_64__
        {"avx512", has_avx512},
#ifdef LLMCOMPRESS_AVXVNNI
        {"avxvnni", has_avxvnni},
#endif
        {"avx2", has_avx2},
#endif
#ifdef __aarch64__
        {"neon", has_neon},
#endif
        {"portable", always},
    };
    for (const auto& isa : known)
        if (std::strcmp(name, isa.name) == 0) return isa.runs();
    return 0;
}
