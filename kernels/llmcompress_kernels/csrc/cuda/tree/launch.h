// Choice of the instance and the launch; included by tree.cu and emulate.cpp after tree.cuh.
#pragma once

namespace llmcompress::gpu {

template <class S> int launch(const TreeCall& call, void* stream) {
    if (call.strips != (call.rows + S::ROWS - 1) / S::ROWS) return -4;
    return start_early(tree_kernel<S>, unsigned(call.blocks), unsigned(call.slabs), S::THREADS, S::bytes(call.tokens, call.forms), call, stream);
}

template <bool BF16, int NT> int launch(const TreeCall& call, int tiles, int warps, int stages, int spread, void* stream) {
#if defined(LLMCOMPRESS_TUNE) || defined(LLMCOMPRESS_SPREAD)
    if constexpr (BF16 && NT == 1) {
        if (tiles == 2 && warps == 8 && stages == 2 && spread) return launch<TreeShape<BF16, NT, 2, 8, 2, 2, true>>(call, stream);
    }
#endif
#ifdef LLMCOMPRESS_TUNE
    if constexpr (BF16 && NT == 1) {
        if (tiles == 2 && warps == 12 && stages == 2 && spread) return launch<TreeShape<BF16, NT, 2, 12, 2, 1, true>>(call, stream);
        if (tiles == 2 && warps == 12 && stages == 3 && spread) return launch<TreeShape<BF16, NT, 2, 12, 3, 1, true>>(call, stream);
    }
#endif
    if (spread) return -3;
    if (tiles == 2 && warps == 8 && stages == 2) return launch<TreeShape<BF16, NT, 2, 8, 2, 2>>(call, stream);
    if (tiles == 2 && warps == 12 && stages == 2) return launch<TreeShape<BF16, NT, 2, 12, 2, 1>>(call, stream);
#ifdef LLMCOMPRESS_TUNE
    if constexpr (BF16 && NT == 1) {
        if (tiles == 1 && warps == 8 && stages == 3) return launch<TreeShape<BF16, NT, 1, 8, 3, 2>>(call, stream);
        if (tiles == 1 && warps == 16 && stages == 4) return launch<TreeShape<BF16, NT, 1, 16, 4, 1>>(call, stream);
        if (tiles == 2 && warps == 8 && stages == 4) return launch<TreeShape<BF16, NT, 2, 8, 4, 1>>(call, stream);
        if (tiles == 2 && warps == 12 && stages == 3) return launch<TreeShape<BF16, NT, 2, 12, 3, 1>>(call, stream);
        if (tiles == 2 && warps == 16 && stages == 2) return launch<TreeShape<BF16, NT, 2, 16, 2, 1>>(call, stream);
    }
#endif
    return -3;
}

template <bool BF16> int launch(const TreeCall& call, int tiles, int warps, int stages, int spread, void* stream) {
    return call.tokens <= TILE ? launch<BF16, 1>(call, tiles, warps, stages, spread, stream)
                               : launch<BF16, 2>(call, tiles, warps, stages, spread, stream);
}

} // namespace llmcompress::gpu

// 0, or the error of the launch.
LLMCOMPRESS_EXPORT int llmcompress_tree(const llmcompress::gpu::TreeCall* call, int bf16, int tiles, int warps, int stages, int spread, void* stream) {
    using namespace llmcompress::gpu;
    return bf16 ? launch<true>(*call, tiles, warps, stages, spread, stream) : launch<false>(*call, tiles, warps, stages, spread, stream);
}

// Bytes of shared memory of a block.
LLMCOMPRESS_EXPORT int llmcompress_tree_shared(int warps, int tokens, int forms) {
    using namespace llmcompress::gpu;
    if (warps == 8) return tokens <= TILE ? TreeShape<true, 1, 2, 8, 2, 2>::bytes(tokens, forms) : TreeShape<true, 2, 2, 8, 2, 2>::bytes(tokens, forms);
    return tokens <= TILE ? TreeShape<true, 1, 2, 12, 2, 1>::bytes(tokens, forms) : TreeShape<true, 2, 2, 12, 2, 1>::bytes(tokens, forms);
}
