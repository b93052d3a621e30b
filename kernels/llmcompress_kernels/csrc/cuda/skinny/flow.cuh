// How words and scales of whole strips come.
#pragma once

#include "visits.cuh"

namespace llmcompress::skinny {

// The words and scales of a warp on their way through shared memory.
template <int BITS, bool BF16, int NT> struct Flow {
    using S = Span<BITS>;
    const Task<BITS, NT>& call;
    const Crew<BITS, BF16, NT>& crew;
    unsigned char* stages;
    SharedAddress base;
    int stage = 0;            // that is filled next
    int step, round = 0;      // that is fetched next
    Visit visit;              // of which tile
    const unsigned char* row; // this lane's first piece in the first row's first step
    const uint16_t* scale_row;
    const uint32_t* zero_row;
    unsigned there;           // which of the lane's four rows are rows of the matrix
    int to_at[2];             // where the first row's groups of even and of odd number go
    bool fetched = false;     // the last turn
    // scales and zero points of the spans of the step fetched last, as stored
    int first_group;
    uint32_t scales[S::SPANS / 2], zeros[2];

    __device__ explicit Flow(const Crew<BITS, BF16, NT>& c) : call(c.call), crew(c) {
        stages = c.bytes + c.places.stages + c.warp * call.stages * S::STAGE;
        base = shared_address(stages);
#pragma unroll
        for (int i = 0; i < 2; ++i) to_at[i] = anew(c.g * S::PITCH + S::piece_at(c.g, i, c.t));
    }

    __device__ __forceinline__ unsigned char* stage_of(int number) const { return stages + number * S::STAGE; }
    static __device__ __forceinline__ Pair* scales_of(unsigned char* stage) { return reinterpret_cast<Pair*>(stage + STRIP * S::PITCH); }

    __device__ void begin(const Visit& at) {
        visit = at, step = crew.member;
        enter();
    }

    // Addresses for another visit.
    __device__ __forceinline__ void enter() {
        const int first = crew.first_of(visit.tile, crew.team), width = crew.width(), rows = call.rows - first;
        const int used = rows < width ? rows : width;
        const int64_t bank = crew.first_row(visit.job) + first;
        row = reinterpret_cast<const unsigned char*>(call.weight + (bank + crew.g) * call.words) + 16 * crew.t;
        const int in_half = call.mode == GATE_UP ? crew.lane % 16 : crew.lane;
        const int64_t mine = bank + (in_half < used ? in_half : used - 1) + (call.mode == GATE_UP && crew.lane >= 16 ? call.rows : 0);
        scale_row = call.scale + mine * call.groups;
        zero_row = call.zero + mine * call.zero_words;
        const unsigned half = unsigned(crew.g < used) | unsigned(crew.g + 8 < used) << 1;
        there = half | (call.mode == GATE_UP ? half : unsigned(crew.g + 16 < used) | unsigned(crew.g + 24 < used) << 1) << 2;
    }

    // Copy a lane's pieces of its row I. WHOLE: the step does not end beyond the row; what lies there is not copied, and codes left
    // there multiply activations of zero. Rows that are not there are not copied, and their results are dropped.
    template <bool WHOLE, int I, int GROUP> __device__ __forceinline__ void pieces(SharedAddress (&to)[2], const unsigned char* from, int left) const {
        constexpr int AT = I * 8 * S::PITCH + (BITS == 3 ? 64 * GROUP : GROUP / 2 * 128);
        if (WHOLE || 64 * GROUP + 16 * crew.t < left) copy_async<AT>(to[BITS == 3 ? 0 : GROUP % 2], from + 64 * GROUP);
        if constexpr (GROUP + 1 < S::GROUPS) pieces<WHOLE, I, GROUP + 1>(to, from, left);
    }
    template <bool WHOLE> __device__ __forceinline__ void copy(const unsigned char* from, int left) const {
        SharedAddress to[2] = {base + unsigned(stage * S::STAGE) + to_at[0], base + unsigned(stage * S::STAGE) + to_at[1]};
        const int64_t stride = call.words * 4, eight = 8 * stride, far = (call.mode == GATE_UP ? call.rows : 16) * stride;
        if (there & 1) pieces<WHOLE, 0, 0>(to, from, left);
        if (there & 2) pieces<WHOLE, 1, 0>(to, from + eight, left);
        if (there & 4) pieces<WHOLE, 2, 0>(to, from + far, left);
        if (there & 8) pieces<WHOLE, 3, 0>(to, from + far + eight, left);
    }

    // Start copying the warp's next step, if there is one before the tile ends, and go on. `last`: of the block.
    __device__ __forceinline__ void fetch(bool last) {
        const int left = int(unsigned(call.columns) * BITS / 8) - step * S::ROW_BYTES;
        fetched = left > 0;
        if (fetched) {
            const unsigned char* from = row + step * S::ROW_BYTES;
#if LLMCOMPRESS_WITHOUT != 2
            if (left >= S::ROW_BYTES)
                copy<true>(from, left);
            else
                copy<false>(from, left);
#endif
            load_scales();
        }
        stage = stage + 1 == call.stages ? 0 : stage + 1;
        step += crew.members;
        if (++round == call.rounds) {
            round = 0, step = crew.member;
            crew.next(visit);
            if (!last) enter();
        }
    }

    __device__ __forceinline__ bool simple() const { return call.group == SPAN && unsigned(call.groups) % S::SPANS == 0; }
    __device__ __forceinline__ int group_of(int span) const {
        return call.group == SPAN ? first_group + span : int((unsigned(first_group) + unsigned(span)) / (unsigned(call.group) / SPAN));
    }

    __device__ __forceinline__ void load_scales() {
        first_group = step * S::SPANS;
        int word = first_group * BITS / 32;
        if (simple()) {
            const uint64_t four = read(reinterpret_cast<const uint64_t*>(scale_row + first_group));
            scales[0] = uint32_t(four), scales[1] = uint32_t(four >> 32);
        } else {
            word = group_of(0) * BITS / 32;
#pragma unroll
            for (int s = 0; s < S::SPANS; ++s) {
                const int group = group_of(s);
                const uint32_t value = group < int(call.groups) ? read(scale_row + group) : 0;
                if (s % 2 == 0) scales[s / 2] = 0;
                scales[s / 2] |= value << (16 * (s % 2));
            }
        }
        if (call.zero == nullptr) return;
        zeros[0] = read(zero_row + word);
        if (BITS == 3 || !simple()) zeros[1] = word + 1 < int(call.zero_words) ? read(zero_row + word + 1) : 0;
    }

    // (scale, -zero) of this lane's row for the step fetched last. Groups beyond the last one have a scale of 0.
    __device__ __forceinline__ void store_scales() const {
        if (!fetched) return;
        Pair* to = scales_of(stage_of(stage == 0 ? call.stages - 1 : stage - 1)) + crew.lane;
        const bool stored = call.zero != nullptr;
        if (simple()) {
            const unsigned from = unsigned(first_group) * BITS % 32;
            const uint32_t codes = BITS == 3 ? funnel(zeros[0], zeros[1], from) : zeros[0] >> from;
#pragma unroll
            for (int s = 0; s < S::SPANS; ++s) store_scale(to, s, stored ? codes >> (s * BITS) & ((1u << BITS) - 1) : 1u << (BITS - 1));
        } else {
            const int first = group_of(0);
            const uint32_t codes = funnel(zeros[0], zeros[1], unsigned(first) * BITS % 32);
#pragma unroll
            for (int s = 0; s < S::SPANS; ++s)
                store_scale(to, s, stored ? codes >> ((group_of(s) - first) * BITS) & ((1u << BITS) - 1) : 1u << (BITS - 1));
        }
    }
    __device__ __forceinline__ void store_scale(Pair* to, int s, uint32_t middle) const {
        to[s * LANES] = {widen<false>(uint16_t(scales[s / 2] >> 16 * (s % 2))), -float(middle)};
    }
};

} // namespace llmcompress::skinny
