// Choice of the instance and the launch; included by skinny.cu and emulate.cpp after skinny.cuh.
#pragma once

namespace llmcompress::skinny {

template <int BITS, bool BF16, int NT> int launch(const Call& call, void* stream) {
    const int width = call.mode == GATE_UP ? CHANNELS : ROWS;
    const unsigned tiles = unsigned((call.rows + width - 1) / width);
    const int bytes = Memory<BITS, NT>::bytes(groups_per_step(Shape<BITS>::COLUMNS, call.group), call.at_once);
    return start(skinny_kernel<BITS, BF16, NT>, tiles, unsigned(call.experts), unsigned(call.splits), THREADS, bytes, call, stream);
}

template <int BITS> int launch(const Call& call, bool bf16, int tiles, void* stream) {
    if (tiles == 1) return bf16 ? launch<BITS, true, 1>(call, stream) : launch<BITS, false, 1>(call, stream);
    return bf16 ? launch<BITS, true, 2>(call, stream) : launch<BITS, false, 2>(call, stream);
}

} // namespace llmcompress::skinny

#define LLMCOMPRESS_EXPORT extern "C" __attribute__((visibility("default")))

// 0, or the error of the launch. `tiles`: 1 or 2 times 8 tokens at once.
LLMCOMPRESS_EXPORT int llmcompress_skinny(const llmcompress::skinny::Call* call, int bits, int bf16, int tiles, void* stream) {
    using namespace llmcompress::skinny;
    if (bits == 2) return launch<2>(*call, bf16, tiles, stream);
    if (bits == 3) return launch<3>(*call, bf16, tiles, stream);
    return bits == 4 ? launch<4>(*call, bf16, tiles, stream) : -1;
}

namespace llmcompress::skinny {

template <int BITS> int shared(int at_once, int group) {
    const int groups = groups_per_step(Shape<BITS>::COLUMNS, group);
    return at_once <= TILE ? Memory<BITS, 1>::bytes(groups, at_once) : Memory<BITS, 2>::bytes(groups, at_once);
}

} // namespace llmcompress::skinny

// Bytes of shared memory of a block.
LLMCOMPRESS_EXPORT int llmcompress_skinny_shared(int bits, int at_once, int group) {
    using namespace llmcompress::skinny;
    return bits == 2 ? shared<2>(at_once, group) : bits == 3 ? shared<3>(at_once, group) : shared<4>(at_once, group);
}
