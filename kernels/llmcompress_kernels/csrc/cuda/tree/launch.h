// Choice of the instance and the launch; included by tree.cu and emulate.cpp after tree.cuh.
#pragma once

namespace llmcompress::gpu {

template <class S> int launch(const TreeCall& call, void* stream) {
    const int widths = (call.widths & 1) + (call.widths >> 1 & 1) + (call.widths >> 2 & 1);
    const unsigned tiles = unsigned((call.rows + S::ROWS - 1) / S::ROWS);
    return start(tree_kernel<S>, tiles, unsigned(call.splits), S::THREADS, S::bytes(widths, call.each), call, stream);
}

template <bool BF16, int NT> int launch(const TreeCall& call, int warps, int stages, void* stream) {
    if (warps == 8 && stages == 6) return launch<TreeShape<BF16, NT, 8, 6>>(call, stream);
#ifdef LLMCOMPRESS_TUNE
    if (warps == 8 && stages == 4) return launch<TreeShape<BF16, NT, 8, 4>>(call, stream);
    if (warps == 8 && stages == 8) return launch<TreeShape<BF16, NT, 8, 8>>(call, stream);
    if (warps == 4 && stages == 6) return launch<TreeShape<BF16, NT, 4, 6>>(call, stream);
    if (warps == 4 && stages == 4) return launch<TreeShape<BF16, NT, 4, 4>>(call, stream);
    if (warps == 16 && stages == 3) return launch<TreeShape<BF16, NT, 16, 3>>(call, stream);
    if (warps == 16 && stages == 4) return launch<TreeShape<BF16, NT, 16, 4>>(call, stream);
#endif
    return -3;
}

template <bool BF16> int launch(const TreeCall& call, int warps, int stages, void* stream) {
    return call.tokens <= TILE ? launch<BF16, 1>(call, warps, stages, stream) : launch<BF16, 2>(call, warps, stages, stream);
}

} // namespace llmcompress::gpu

// 0, or the error of the launch.
LLMCOMPRESS_EXPORT int llmcompress_tree(const llmcompress::gpu::TreeCall* call, int bf16, int warps, int stages, void* stream) {
    using namespace llmcompress::gpu;
    return bf16 ? launch<true>(*call, warps, stages, stream) : launch<false>(*call, warps, stages, stream);
}

// Bytes of shared memory of a block.
LLMCOMPRESS_EXPORT int llmcompress_tree_shared(int warps, int stages, int tiles, int widths, int each) {
    using namespace llmcompress::gpu;
    if (warps != 8 || stages != 6) return -1;
    return tiles == 1 ? TreeShape<true, 1, 8, 6>::bytes(widths, each) : TreeShape<true, 2, 8, 6>::bytes(widths, each);
}
