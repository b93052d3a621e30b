// Choice of the instance and the launch; included by skinny.cu and emulate.cpp after skinny.cuh.
#pragma once

namespace llmcompress::skinny {

template <int BITS, bool BF16, int NT> int launch(const Call& call, void* stream) {
    if (call.height > 0) {
        const Task<BITS, NT> task(call);
        return start_early(strips_kernel<BITS, BF16, NT>, unsigned(call.blocks), 1, 32 * call.warps, task.places.bytes, task, stream);
    }
    const int bytes = Memory<BITS, NT>(call).bytes;
    return start_early(skinny_kernel<BITS, BF16, NT>, unsigned(call.blocks), 1, 32 * call.warps, bytes, call, stream);
}

template <int BITS> int launch(const Call& call, bool bf16, int tiles, void* stream) {
    if (tiles == 1) return bf16 ? launch<BITS, true, 1>(call, stream) : launch<BITS, false, 1>(call, stream);
    return bf16 ? launch<BITS, true, 2>(call, stream) : launch<BITS, false, 2>(call, stream);
}

} // namespace llmcompress::skinny

// Entries for one width: a launch, which returns 0 or its error (`tiles`: 1 or 2 times 8 slots of a job), and the bytes
// of shared memory of a block.
#define LLMCOMPRESS_SKINNY(BITS)                                                                                           \
    LLMCOMPRESS_EXPORT int llmcompress_skinny_##BITS(const llmcompress::skinny::Call* call, int bf16, int tiles, void* stream) { \
        return llmcompress::skinny::launch<BITS>(*call, bf16, tiles, stream);                                              \
    }                                                                                                                      \
    LLMCOMPRESS_EXPORT int llmcompress_skinny_shared_##BITS(const llmcompress::skinny::Call* call, int tiles) {            \
        using namespace llmcompress::skinny;                                                                               \
        if (call->height > 0) return tiles == 1 ? Places<BITS, 1>(*call).bytes : Places<BITS, 2>(*call).bytes;             \
        return tiles == 1 ? Memory<BITS, 1>(*call).bytes : Memory<BITS, 2>(*call).bytes;                                   \
    }
