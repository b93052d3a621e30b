// How words and scales come.
#pragma once

#include "activations.cuh"

namespace llmcompress::skinny {

// The words and scales of a warp on their way through shared memory.
template <int BITS, bool BF16, int NT> struct Pipeline {
    using S = Shape<BITS>;
    const Call& call;
    const Block<BITS, BF16, NT>& block;
    unsigned char* stages;
    int bytes; // of a stage
    int spans; // of a step
    int stage = 0; // that is filled next
    Place place;   // the step that is fetched next
    const uint16_t* scale_row; // of this lane's row
    const uint32_t* zero_row;
    // scales and zero points of eight groups of this lane's row, as stored
    int held; // which eight
    uint64_t scales[2];
    uint32_t zeros[2];
    int group; // first one of the step fetched last, or -1: there was none
    // this lane's first piece of the step fetched next, bytes of the row that are left, which of the lane's pieces are rows of the
    // matrix, and where they lie
    const unsigned char* next;
    int left;
    unsigned there;
    SharedAddress base;
    static constexpr int PIECES = S::COPIES / 2;
    static constexpr bool REGULAR = LANES % S::CHUNKS == 0; // a lane's pieces lie as far apart in memory as rows do
    static constexpr int PLACES = REGULAR ? 1 : PIECES;
    int from_at[PLACES], to_at[PLACES];
    int far_rows; // REGULAR: bytes from one piece to the next

    __device__ Pipeline(const Block<BITS, BF16, NT>& b) : call(b.call), block(b), spans(b.memory.spans) {
        bytes = b.memory.stage;
        stages = b.bytes + b.memory.stages + b.warp * call.stages * bytes;
        group = -1;
        base = shared_address(stages);
        // the compiler would rather compute these for every copy than hold them
        far_rows = anew(LANES / S::CHUNKS * 4 * int(call.words));
#pragma unroll
        for (int i = 0; i < PLACES; ++i) {
            const int chunk = block.lane + i * LANES, j = chunk / S::CHUNKS, at = chunk % S::CHUNKS * 16;
            from_at[i] = anew(j * int(call.words) * 4 + at), to_at[i] = anew(j * S::STRIDE + at);
        }
    }

    __device__ __forceinline__ unsigned char* stage_of(int number) const { return stages + number * bytes; }
    static __device__ __forceinline__ Pair* scales_of(unsigned char* stage) {
        return reinterpret_cast<Pair*>(stage + LANES * S::STRIDE);
    }

    __device__ void begin(const Place& at) {
        place = at;
        enter();
    }

    // Addresses for another strip.
    __device__ __forceinline__ void enter() {
        const int64_t first = block.first_row(place.job), stride = call.words * 4;
        const int row = block.strip(place.tile, anew(block.warp)), rows = call.rows - row;
        const int64_t mine = first + block.weight_row(row, anew(block.lane));
        scale_row = call.scale + mine * call.groups;
        zero_row = call.zero + mine * call.zero_words;
        held = -1;
        next = reinterpret_cast<const unsigned char*>(call.weight + first * call.words) + row * stride + place.step * S::ROW_BYTES;
        if constexpr (REGULAR) next += block.lane / S::CHUNKS * stride + block.lane % S::CHUNKS * 16;
        left = int(unsigned(call.columns) * BITS / 8) - place.step * S::ROW_BYTES;
        there = 0;
#pragma unroll
        for (int i = 0; i < PIECES; ++i) {
            const int j = (block.lane + i * LANES) / S::CHUNKS;
            there |= unsigned(j < rows) << i | unsigned(j < rows - (call.mode == GATE_UP ? 0 : 16)) << (PIECES + i);
        }
    }

    // Copy one half of the rows. Rows that are not there are not filled, and beyond a row's end nothing is: the codes left there
    // give results that are dropped, or multiply activations of zero.
    template <int HALF, int I> __device__ __forceinline__ void pieces(SharedAddress to, const unsigned char* from, unsigned mine) const {
        constexpr unsigned BIT = 1u << (HALF * PIECES + I);
        if constexpr (REGULAR) {
            if (mine & BIT) copy_async<HALF * 16 * S::STRIDE + I * (LANES / S::CHUNKS) * S::STRIDE>(to + to_at[0], from);
            from += far_rows;
        } else if (mine & BIT && (block.lane + I * LANES) % S::CHUNKS * 16 < left) {
            copy_async<HALF * 16 * S::STRIDE>(to + to_at[I], from + from_at[I]);
        }
        if constexpr (I + 1 < PIECES) pieces<HALF, I + 1>(to, from, mine);
    }

    // Start copying the step at `place`, and go to the next one.
    __device__ __forceinline__ void fetch() {
        const SharedAddress to = base + unsigned(stage * bytes);
        const unsigned mine = REGULAR && block.lane % S::CHUNKS * 16 >= left ? 0 : there;
        pieces<0, 0>(to, next, mine);
        pieces<1, 0>(to, next + (call.mode == GATE_UP ? call.rows : 16) * (call.words * 4), mine);
        load_scales();
        stage = stage + 1 == call.stages ? 0 : stage + 1;
        next += S::ROW_BYTES, left -= S::ROW_BYTES;
        if (place.next(block.schedule)) enter();
    }

    __device__ __forceinline__ void load_scales() {
        group = place.step * spans;
        if (call.group > S::COLUMNS) group = int(unsigned(place.step) / (unsigned(call.group) / S::COLUMNS));
        const int eight = group / 8;
        if (eight == held) return;
        held = eight;
        const uint16_t* from = scale_row + 8 * eight;
        if (unsigned(call.groups) % 8 == 0) {
            const Eight found = read(reinterpret_cast<const Eight*>(from));
            scales[0] = found.at[0], scales[1] = found.at[1];
        } else {
            scales[0] = scales[1] = 0;
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (8 * eight + i < int(call.groups)) scales[i / 4] |= uint64_t(read(from + i)) << (16 * (i % 4));
        }
        if (call.zero == nullptr) return;
        const int word = 8 * BITS * eight / 32;
        zeros[0] = read(zero_row + word);
        zeros[1] = BITS == 3 && word + 1 < call.zero_words ? read(zero_row + word + 1) : 0;
    }

    // (scale, -scale zero) of this lane's row for the step fetched last.
    __device__ __forceinline__ void store_scales() {
        if (group < 0) return;
        if (spans == 1)
            store_scales<1>();
        else if (spans == 2)
            store_scales<2>();
        else if (spans == 4)
            store_scales<4>();
        else
            store_scales<8>();
    }

    // The same for SPANS of them, a power of two. Groups beyond the last one have a scale of 0.
    template <int SPANS> __device__ __forceinline__ void store_scales() const {
        Pair* to = scales_of(stage_of(stage == 0 ? call.stages - 1 : stage - 1)) + block.lane;
        const unsigned within = unsigned(group) % 8;
        const uint64_t four = (within >= 4 ? scales[1] : scales[0]) >> (SPANS < 4 ? 16 * (within % 4) : 0);
        const unsigned first = within * BITS + unsigned(group) / 8 * 8 * BITS % 32;
        const bool stored = call.zero != nullptr;
        const auto codes = uint32_t((uint64_t(zeros[1]) << 32 | zeros[0]) >> first);
#pragma unroll
        for (int i = 0; i < SPANS; ++i) {
            const uint32_t middle = stored ? codes >> (i * BITS) & ((1u << BITS) - 1) : 1u << (BITS - 1);
            const float value = widen<false>(uint16_t((i < 4 ? four : scales[1]) >> 16 * (i % 4)));
            to[i * LANES] = {value, -value * float(middle)};
        }
    }
};

} // namespace llmcompress::skinny
