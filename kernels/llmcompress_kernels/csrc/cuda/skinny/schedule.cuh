// Which steps of a launch are whose.
#pragma once

#include "call.h"

namespace llmcompress::skinny {

// Steps are numbered: jobs, their tiles, the steps of a row. Block b takes those from `begin(b)` to `begin(b + 1)`. The
// host sees to it that products of steps and blocks stay below 2^32.
struct Schedule {
    int jobs, tiles, steps; // steps: of a row
    unsigned total, blocks;

    __device__ Schedule() {}
    __device__ Schedule(int j, int t, int s, int least, unsigned most) : jobs(j), tiles(t), steps(s) {
        total = unsigned(jobs) * unsigned(tiles) * unsigned(steps);
        blocks = (total + unsigned(least) - 1) / unsigned(least);
        if (blocks > most) blocks = most;
    }

    __device__ unsigned begin(int block) const { return total * unsigned(block) / blocks; }
    __device__ unsigned first(int job, int tile) const { return (unsigned(job) * unsigned(tiles) + unsigned(tile)) * unsigned(steps); }
    __device__ int owner(unsigned step) const { return int(((step + 1) * blocks - 1) / total); }

    // Blocks that share a strip.
    __device__ int pieces(int job, int tile) const {
        const unsigned at = first(job, tile);
        return owner(at + unsigned(steps) - 1) - owner(at) + 1;
    }

    struct Place {
        int job, tile, step;

        // Go to the next step; true if it is another strip's.
        __device__ __forceinline__ bool next(const Schedule& schedule) {
            if (++step < schedule.steps) return false;
            step = 0;
            if (++tile == schedule.tiles) {
                tile = 0;
                if (++job == schedule.jobs) job = 0; // the end: nobody goes on, but addresses stay within the bank
            }
            return true;
        }
    };

    __device__ Place place(unsigned number) const {
        const unsigned strip = number / unsigned(steps);
        return {int(strip / unsigned(tiles)), int(strip % unsigned(tiles)), int(number % unsigned(steps))};
    }
};

using Place = Schedule::Place;

} // namespace llmcompress::skinny
