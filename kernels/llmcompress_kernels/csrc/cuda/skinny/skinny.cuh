// Products of a few tokens with 2-, 3- and 4-bit weights in the stored order, dense and routed: y = W x.
//
// What limits them is reading W, so everything else has to fit beside that. At 3 TB/s an H100 issues 2.8 instructions
// of a thread per 2-bit weight, 4.0 per 3-bit and 5.3 per 4-bit weight; cuda/aot.py counts what the machine code needs.
//
// Two forms: here blocks share strips; in strips.cuh, for groups of 128 columns and more, they take whole ones.
//
// Work. A warp owns a strip of 32 rows and walks its columns in steps of 256 (2 bits: 512); the strips of a block's warps
// are a tile. All steps of a launch are numbered, expert by expert, tile by tile, and every block takes an equal run of
// them, whatever the routing, so that no multiprocessor waits for another one's second tile (schedule.cuh). A strip that
// several blocks share is summed by the last of them in a fixed order: results do not depend on scheduling.
//
// Memory. cp.async brings a warp's words into its own part of shared memory, several steps ahead and across the ends of
// tiles, so that no barrier of the block stands in the loop; 96 or 128 bytes of a row come together, and the scales of eight
// groups, because what a multiprocessor may ask of L2 is limited by the number of requests. Activations lie in shared memory
// for as many columns as fit.
//
// Arithmetic. A warp multiplies 2 x 16 rows by mma.m16n8k16: weights are the left operand, tokens the 8 columns of the
// right one. The order of the columns inside a dot product is free as long as both operands agree, so a lane owns the 8
// (2 bits: 16) neighbouring columns that the word it reads holds, and the stored stream needs no second layout. Two codes
// of a word that lie 16 bits apart become two numbers by one LOP3 and at most one shift: a code in the mantissa under the
// right exponent is the number 2^e + code, exactly, where 2^e, at most 128, depends on where in the mantissa it lies. The
// activations are brought into the same pairs by byte permutations, once for all warps of the block.
// Scales and zero points act on the fp32 sums of a group, scale (part - sum(2^e x) - zero sum(x)). Both sums over x belong to
// no row, so they are prepared with the activations; the tensor core delivers them as the product with a matrix of such
// numbers.
//
// For experts a block finds the slots of each itself: gate, up and activation are one launch, down projection and the
// weighted sum over slots another.
#pragma once

#include "results.cuh"

namespace llmcompress::skinny {

template <int BITS, bool BF16, int NT>
__global__ void __launch_bounds__(32 * MOST_WARPS<NT>, 1) skinny_kernel(const __grid_constant__ Call call) {
    using S = Shape<BITS>;
    Block<BITS, BF16, NT> block(call, shared_memory());
    // routing is an activation of the launch in front of gate and up; down's is older, since gate and up waited for it
    if (call.mode == GATE_UP) previous_launch();
    block.plan();
    if (call.mode == DOWN && block.schedule.jobs == 0) {
        previous_launch();
        block.clear_out(block.number);
    }
    const Schedule& schedule = block.schedule;
    if (block.number >= schedule.blocks) return;
    unsigned now = schedule.begin(block.number);
    const unsigned end = schedule.begin(block.number + 1);

    Pipeline<BITS, BF16, NT> pipeline(block);
    Place place = schedule.place(now);
    pipeline.begin(place);
    for (int ahead = 0; ahead < call.stages - 1; ++ahead) {
        pipeline.store_scales(); // of the step fetched before
        if (now + ahead < end)
            pipeline.fetch();
        else
            pipeline.group = -1;
        commit();
    }
    if (call.mode != GATE_UP) previous_launch();
    next_launch();

    Sums<BITS, BF16, NT> sums;
    sums.clear();
    const unsigned char* x[NT];
    int stage = 0, summed = 0;
    for (; now < end; ++now) {
        if (!block.has_x(place)) {
            block.load_x(place, end - now);
            block.template lanes_of_x<4 * S::PAIRS>(x);
        }
        wait_for_step<6>(call.stages);
        pipeline.store_scales();
        sync_warp(); // the step is there, and no lane reads the one before any more
        if (now + call.stages - 1 < end)
            pipeline.fetch();
        else
            pipeline.group = -1;
        commit();
        const unsigned char* at[NT];
#pragma unroll
        for (int n = 0; n < NT; ++n) at[n] = x[n] + (place.step - block.x_first) * S::X_BYTES;
        const unsigned char* words = pipeline.stage_of(stage);
        const unsigned char* prepared = block.bytes + block.sums + (place.step - block.x_first) * pipeline.spans * NT * SUMS_BYTES;
        if (pipeline.spans == 1)
            sums.template step<S::UNITS>(words, at, prepared, block.g, block.t);
        else if (pipeline.spans == 2)
            sums.template step<S::UNITS / 2>(words, at, prepared, block.g, block.t);
        else if (pipeline.spans == 4)
            sums.template step<S::UNITS / 4>(words, at, prepared, block.g, block.t);
        else
            sums.template step<1>(words, at, prepared, block.g, block.t);
        ++summed;
        stage = stage + 1 == call.stages ? 0 : stage + 1;
        if (place.step == schedule.steps - 1 || now + 1 == end) {
            end_strip<BITS, BF16, NT>(block, sums, place, summed);
            sums.clear();
            summed = 0;
        }
        place.next(schedule);
    }
}

} // namespace llmcompress::skinny
