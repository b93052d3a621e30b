// Choice of the instance and the launch; included by update.cu and emulate.cpp after update.cuh.
#pragma once

namespace llmcompress::gpu {

template <class S> int launch(const StateCall& call, void* stream) {
    // the device's own limit does not change; asked once per instance
    static const int most = at_once(update_kernel<S>, S::THREADS, S::bytes(0));
    if (most <= 0) return most < 0 ? -most : -1;
    return start_early(update_kernel<S>, unsigned(call.units < most ? call.units : most), 1, S::THREADS, S::bytes(0), call, stream);
}

template <int BITS, int N, bool FIXED, bool DITHER> int launch(const StateCall& call, int variant, void* stream) {
    if (variant == 1) return launch<StateShape<BITS, N, 4, 8, FIXED, 4, DITHER>>(call, stream);
    if (variant == 2) return launch<StateShape<BITS, N, 4, 4, FIXED, 4, DITHER>>(call, stream);
#ifdef LLMCOMPRESS_TUNE
    // candidates of kernels/bench/gpu_candidates.py, which nothing else picks
    if constexpr (!DITHER) {
        if (variant == 0) return launch<StateShape<BITS, N, 2, 4, FIXED, 4>>(call, stream);
    }
    if constexpr (BITS == 4 && N == 128) {
        if (variant == 3) return launch<StateShape<4, N, 4, 8, FIXED, 4, DITHER, false, true>>(call, stream);
        if (variant == 4) return launch<StateShape<4, N, 4, 4, FIXED, 4, DITHER, false, true>>(call, stream);
        if (variant == 5) return launch<StateShape<4, N, 4, 4, FIXED, MANY, DITHER, false, true>>(call, stream);
        if (variant == 6) return launch<StateShape<4, N, 4, 4, FIXED, MANY, DITHER>>(call, stream);
    }
#endif
    return -3;
}

template <int BITS, int N> int launch(const StateCall& call, int variant, void* stream) {
    if (call.dither) return call.fixed ? launch<BITS, N, true, true>(call, variant, stream) : launch<BITS, N, false, true>(call, variant, stream);
    return call.fixed ? launch<BITS, N, true, false>(call, variant, stream) : launch<BITS, N, false, false>(call, variant, stream);
}

} // namespace llmcompress::gpu

// 0, or the error of the launch.
LLMCOMPRESS_EXPORT int llmcompress_state_update(const llmcompress::gpu::StateCall* call, int variant, void* stream) {
    using namespace llmcompress::gpu;
    if (call->states == 128) return call->bits == 4 ? launch<4, 128>(*call, variant, stream) : launch<8, 128>(*call, variant, stream);
    if (call->states == 64) return call->bits == 4 ? launch<4, 64>(*call, variant, stream) : launch<8, 64>(*call, variant, stream);
    return -3;
}
