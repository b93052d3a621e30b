// LLMCOMPRESS_TARGET("avx2,fma") ... LLMCOMPRESS_TARGET_END: functions between are compiled with these instructions.
//
// Headers that other files share come before: what they define would otherwise need a processor with them.
#pragma once

#define LLMCOMPRESS_PRAGMA(...) _Pragma(#__VA_ARGS__)
#ifdef __clang__
// GCC's pragma is one that clang passes over
#define LLMCOMPRESS_TARGET(names) \
    LLMCOMPRESS_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define LLMCOMPRESS_TARGET_END LLMCOMPRESS_PRAGMA(clang attribute pop)
#else
#define LLMCOMPRESS_TARGET(names) LLMCOMPRESS_PRAGMA(GCC push_options) LLMCOMPRESS_PRAGMA(GCC target(names))
#define LLMCOMPRESS_TARGET_END LLMCOMPRESS_PRAGMA(GCC pop_options)
#endif
