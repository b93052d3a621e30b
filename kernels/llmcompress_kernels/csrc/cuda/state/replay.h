// Choice of the instances and the two launches of a token within replay windows; included after update.cuh and read.cuh.
#pragma once

namespace llmcompress::gpu {

// The heads of sequences that are due, by as many blocks as run at once.
template <class S> int launch_rounding(const ReplayCall& call, void* stream) {
    const int bytes = S::bytes(call.rows);
    // by rows: the device's own limit does not change
    static int known[MOST_ROWS + 1] = {};
    int& most = known[call.rows];
    if (most <= 0) most = at_once(update_kernel<S>, S::THREADS, bytes);
    if (most <= 0) return most < 0 ? -most : -1;
    return start_early(update_kernel<S>, unsigned(call.units < most ? call.units : most), 1, S::THREADS, bytes, call, stream);
}

// All others. It advances the windows, so it comes last.
template <class S> int launch_reading(const ReplayCall& call, void* stream) {
    const int blocks = call.groups * ((call.share + S::WARPS - 1) / S::WARPS);
    return start_early(read_kernel<S>, unsigned(blocks), unsigned(call.sequences), S::THREADS, S::bytes(call.rows), call, stream);
}

template <int N, bool FIXED, bool DITHER> int launch_rounding(const ReplayCall& call, int variant, void* stream) {
    if (variant == 1) return launch_rounding<StateShape<4, N, 4, 8, FIXED, 4, DITHER, true>>(call, stream);
    if (variant == 2) return launch_rounding<StateShape<4, N, 4, 4, FIXED, 4, DITHER, true>>(call, stream);
#ifdef LLMCOMPRESS_TUNE
    // candidates of kernels/bench/gpu_candidates.py, which nothing else picks
    if constexpr (N == 128) {
        if (variant == 3) return launch_rounding<StateShape<4, N, 4, 8, FIXED, 4, DITHER, true, true>>(call, stream);
        if (variant == 4) return launch_rounding<StateShape<4, N, 4, 4, FIXED, 4, DITHER, true, true>>(call, stream);
        if (variant == 5) return launch_rounding<StateShape<4, N, 4, 4, FIXED, MANY, DITHER, true, true>>(call, stream);
        if (variant == 6) return launch_rounding<StateShape<4, N, 4, 4, FIXED, MANY, DITHER, true>>(call, stream);
    }
#endif
    return -3;
}

template <int N, bool FIXED, bool DITHER> int launch_replay(const ReplayCall& call, int variant, int warps, void* stream) {
    const int code = launch_rounding<N, FIXED, DITHER>(call, variant, stream);
    if (code != 0) return code;
    if (warps == 4) return launch_reading<ReadShape<N, 4, 5>>(call, stream);
    if (warps == 8) return launch_reading<ReadShape<N, 8, 2>>(call, stream);
#ifdef LLMCOMPRESS_TUNE
    // likewise: 4 warps that ask for everything early, five or four blocks at once
    if constexpr (N == 128) {
        if (warps == 45) return launch_reading<ReadShape<N, 4, 5, true>>(call, stream);
        if (warps == 44) return launch_reading<ReadShape<N, 4, 4, true>>(call, stream);
    }
#endif
    return -3;
}

template <int N> int launch_replay(const ReplayCall& call, int variant, int warps, void* stream) {
    if (call.dither)
        return call.fixed ? launch_replay<N, true, true>(call, variant, warps, stream) : launch_replay<N, false, true>(call, variant, warps, stream);
    return call.fixed ? launch_replay<N, true, false>(call, variant, warps, stream) : launch_replay<N, false, false>(call, variant, warps, stream);
}

} // namespace llmcompress::gpu

// 0, or the error of a launch; variants as llmcompress_state_update has them, and 4 or 8 warps that read.
LLMCOMPRESS_EXPORT int llmcompress_replay_update(const llmcompress::gpu::ReplayCall* call, int variant, int warps, void* stream) {
    using namespace llmcompress::gpu;
    if (call->bits != 4 || call->rows < 1 || call->rows > MOST_ROWS) return -3;
    if (call->states == 128) return launch_replay<128>(*call, variant, warps, stream);
    return call->states == 64 ? launch_replay<64>(*call, variant, warps, stream) : -3;
}
