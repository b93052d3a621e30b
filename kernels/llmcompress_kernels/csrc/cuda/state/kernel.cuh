// The loop of a block over heads, by the arithmetic of update.cuh or that of nibbles.cuh.
#pragma once

#include "nibbles.cuh"
#include "update.cuh"

namespace llmcompress::gpu {

// One head. In units of the old step its inputs are prepared; `far`: all of it by the definition.
template <class S> __device__ __forceinline__ void update(Head<S>& head, std::conditional_t<S::UNITS, Nibbles<S>, Tile<S>>& tile, bool far) {
    float by[S::R];
    if constexpr (!S::UNITS) {
        tile.fill(head), tile.rows(head, by), tile.divide_rows(head, by);
    } else if (far) {
        tile.exact_rows(head);
    } else {
        tile.fill(head), tile.rows(head, by), tile.divide(head, by);
    }
    sync();
    head.find_place();
    if constexpr (S::UNITS) {
        const float worst = largest_of_block(head, columns(head, tile.all, far));
        head.find_place();
        tile.round(head, worst);
    } else {
        const bool careful = sync_or(columns(head));
        head.find_place();
        tile.round(head, careful);
    }
}

// Grid: as many blocks as run at once, at most one per head of a sequence.
template <class S> __global__ void __launch_bounds__(S::THREADS, S::BLOCKS) update_kernel(const __grid_constant__ typename S::Call call) {
    constexpr int EACH = (S::N + S::THREADS - 1) / S::THREADS;
    Head<S> head(call, shared_memory());
    uint16_t scale[EACH] = {};
    const auto take = [&](int unit) {
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (i * S::THREADS + head.thread < S::N) scale[i] = call.scale[int64_t(unit) * S::N + i * S::THREADS + head.thread];
    };
    const auto give = [&](int stage) {
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (i * S::THREADS + head.thread < S::N)
                head.template at<float>(S::PER_STATE)[stage * S::N + i * S::THREADS + head.thread] = per_state<S>(widen<false>(scale[i]));
    };
    previous_launch();
    next_launch(); // which sees all that was written before this launch
    // most launches of a model's windows find none: to look for all at once takes a load's time, one after the other many
    if constexpr (S::UNITS && S::KEPT)
        if (!sync_or(any_due(call, head.thread, S::THREADS))) return;
    std::conditional_t<S::KEPT, DueUnit, Unit> next(call, head.unit);
    if constexpr (S::KEPT) {
        if (next.at >= call.units) return;
        head.unit = next.at;
    }
    head.fetch(0, next);
    commit();
    take(next.at);
    head.decay = read(call.decay + next.at);
    give(0);
    const int steps = int(gridDim.x), heads = steps % call.heads, sequences = steps / call.heads;
    while (true) {
        next.advance(call, steps, heads, sequences);
        wait<0>();
        sync(); // this head is there, and nobody needs the last one any more
        float next_decay = 0;
        head.find_place();
        std::conditional_t<S::UNITS, Nibbles<S>, Tile<S>> tile;
        bool far = false;
        if constexpr (S::UNITS) {
            far = sync_or(tile.prepare(head));
            head.find_place();
        }
        if (next.at < call.units) {
            head.fetch(head.stage ^ 1, next);
            take(next.at);
            next_decay = read(call.decay + next.at);
        }
        commit();
        head.find_place();
        update(head, tile, far);
        if (next.at >= call.units) return;
        head.find_place();
        head.stage ^= 1, head.unit = next.at, head.decay = next_decay;
        give(head.stage);
    }
}

} // namespace llmcompress::gpu
