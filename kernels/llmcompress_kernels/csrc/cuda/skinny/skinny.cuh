// Products of a few tokens with 2-, 3- and 4-bit weights in the stored order, dense and routed: y = W x.
//
// What limits them is reading W, so everything else has to fit beside that. At 3 TB/s an H100 issues 2.8 instructions
// of a thread per 2-bit weight, 4.0 per 3-bit and 5.3 per 4-bit weight; cuda/aot.py counts what the machine code needs.
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

template <int BITS, bool BF16, int NT> struct Sums {
    using S = Shape<BITS>;
    float total[2][NT][4]; // [16-row half][8 slots]: rows g, g, g + 8, g + 8 and slots 2 t, 2 t + 1, 2 t, 2 t + 1

    __device__ __forceinline__ void clear() { clear(total); }
    template <int N> static __device__ __forceinline__ void clear(float (&all)[N][NT][4]) {
#pragma unroll
        for (int r = 0; r < N; ++r)
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) all[r][n][i] = 0;
    }

    // Step i of the unit's products, columns of two pairs of every lane, for either half of the rows.
    template <int I>
    static __device__ __forceinline__ void multiply(float (&part)[2][NT][4], const uint32_t (&code)[2][2], const uint32_t (&b)[NT][S::PAIRS]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t a[4] = {pair_of<BITS, BF16, 2 * I>(code[r][0]), pair_of<BITS, BF16, 2 * I>(code[r][1]),
                                   pair_of<BITS, BF16, 2 * I + 1>(code[r][0]), pair_of<BITS, BF16, 2 * I + 1>(code[r][1])};
#pragma unroll
            for (int n = 0; n < NT; ++n) mma<BF16>(part[r][n], a, b[n][2 * I], b[n][2 * I + 1]);
        }
    }

    // Add the products of one step. `PER`: units of a span, over which the scales are the same. `x`: this lane's activations
    // of the step, by 8 slots; `prepared`: the sums of its spans.
    template <int PER>
    __device__ __forceinline__ void step(const unsigned char* stage, const unsigned char* const (&x)[NT], const unsigned char* prepared, int g, int t) {
        const unsigned char* words = stage + g * S::STRIDE;
        const Pair* scales = Pipeline<BITS, BF16, NT>::scales_of(const_cast<unsigned char*>(stage)) + g;
        constexpr int AT_ONCE = PER < 4 ? PER : 4; // units whose loads may come early; more do not fit the registers
#pragma unroll 1
        for (int span = 0; span < S::UNITS / PER; ++span) {
            float part[2][NT][4], all[NT][2];
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                const Four four = *reinterpret_cast<const Four*>(prepared + (span * NT + n) * SUMS_BYTES + 16 * t);
                all[n][0] = four.at[0], all[n][1] = four.at[1];
#pragma unroll
                for (int i = 0; i < 4; ++i) part[0][n][i] = part[1][n][i] = four.at[2 + i % 2];
            }
#pragma unroll AT_ONCE
            for (int v = 0; v < PER; ++v) {
                const int u = span * PER + v;
                uint32_t b[NT][S::PAIRS], code[2][2];
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int i = 0; i < S::PAIRS / 4; ++i) {
                        const Words w = reinterpret_cast<const Words*>(x[n] + u * 2 * S::UNIT)[i];
#pragma unroll
                        for (int j = 0; j < 4; ++j) b[n][4 * i + j] = w.at[j];
                    }
#pragma unroll
                for (int r = 0; r < 4; ++r) code[r / 2][r % 2] = codes_of<BITS>(words + 8 * r * S::STRIDE + u * S::UNIT_BYTES, t);
                multiply<0>(part, code, b);
                multiply<1>(part, code, b);
                if constexpr (S::PAIRS == 8) {
                    multiply<2>(part, code, b);
                    multiply<3>(part, code, b);
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const Pair low = scales[span * LANES + 16 * r], high = scales[span * LANES + 16 * r + 8];
#pragma unroll
                for (int n = 0; n < NT; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const Pair s = i < 2 ? low : high;
                        total[r][n][i] = fmaf(s.y, all[n][i % 2], fmaf(s.x, part[r][n][i], total[r][n][i]));
                    }
            }
        }
    }
};

// Write what a warp has summed of a strip: the result if it is all of it, else its part.
template <int BITS, bool BF16, int NT>
__device__ void store(Block<BITS, BF16, NT>& block, const Sums<BITS, BF16, NT>& sums, const Place& place, bool whole, int piece) {
    const Call& call = block.call;
    const auto out = static_cast<uint16_t*>(call.out);
    const int64_t all = int64_t(call.tokens) * call.slots, first_row = block.first_row(place.job);
    const int begin = block.strip(place.tile, anew(block.warp)) + anew(block.g), first_entry = 2 * anew(block.t);
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int entry = n * TILE + first_entry + i % 2, low = begin + i / 2 * 8;
            if (entry >= block.count) continue;
            const int64_t slot = block.slot(entry);
            if (call.mode == GATE_UP) {
                if (low >= call.rows) continue;
                if (whole) {
                    const float gate = sums.total[0][n][i] + bias_of<BF16>(call, first_row + low);
                    const float up = sums.total[1][n][i] + bias_of<BF16>(call, first_row + call.rows + low);
                    out[slot * call.rows + low] = narrow<BF16>(activated(call, gate, up));
                } else {
                    float* part = call.parts + (piece * all + slot) * 2 * call.rows + low;
                    part[0] = sums.total[0][n][i], part[call.rows] = sums.total[1][n][i];
                }
                continue;
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = low + 16 * r;
                if (row >= call.rows) continue;
                if (whole)
                    out[slot * call.rows + row] = narrow<BF16>(sums.total[r][n][i]);
                else
                    call.parts[(piece * all + slot) * call.rows + row] = sums.total[r][n][i];
            }
        }
}

// Whether this warp brings the last of `all` steps of a strip; what the others wrote is then visible to it.
__device__ inline bool last_of(int* counter, int steps, int all, int lane) {
    fence();
    sync_warp();
    bool last = false;
    if (lane == 0) {
        last = add(counter, steps) + steps == all;
        if (last) *counter = 0; // ready for the next launch
    }
    if (!any_of_warp(last)) return false;
    fence();
    return true;
}

// Add the pieces of a strip of one job and write its results.
template <int BITS, bool BF16, int NT> __device__ void finish(Block<BITS, BF16, NT>& block, const Place& place) {
    constexpr int MOST = NT * TILE;
    const Call& call = block.call;
    const auto out = static_cast<uint16_t*>(call.out);
    const int64_t all = int64_t(call.tokens) * call.slots;
    const int pieces = block.schedule.pieces(place.job, place.tile);
    if (call.mode == DENSE) {
        const int row = block.strip(place.tile, anew(block.warp)) + anew(block.lane);
        if (row >= call.rows) return;
        float sum[MOST] = {};
        for (int p = 0; p < pieces; ++p)
#pragma unroll
            for (int e = 0; e < MOST; ++e)
                if (e < block.count) sum[e] += read_written(call.parts + (p * all + block.slot(e)) * call.rows + row);
#pragma unroll
        for (int e = 0; e < MOST; ++e)
            if (e < block.count) out[block.slot(e) * call.rows + row] = narrow<BF16>(sum[e]);
        return;
    }
    // half a warp per slot
    const int lane = anew(block.lane), channel = block.strip(place.tile, anew(block.warp)) + lane % 16, half = lane / 16;
    if (channel >= call.rows) return;
    float gate[MOST / 2] = {}, up[MOST / 2] = {};
    for (int p = 0; p < pieces; ++p)
#pragma unroll
        for (int i = 0; i < MOST / 2; ++i)
            if (2 * i + half < block.count) {
                const float* part = call.parts + (p * all + block.slot(2 * i + half)) * 2 * call.rows + channel;
                gate[i] += read_written(part), up[i] += read_written(part + call.rows);
            }
    const int64_t first_row = block.first_row(place.job);
    const float gate_bias = bias_of<BF16>(call, first_row + channel), up_bias = bias_of<BF16>(call, first_row + call.rows + channel);
#pragma unroll
    for (int i = 0; i < MOST / 2; ++i)
        if (2 * i + half < block.count)
            out[block.slot(2 * i + half) * call.rows + channel] = narrow<BF16>(activated(call, gate[i] + gate_bias, up[i] + up_bias));
}

// Add the pieces of a strip of all jobs, weighted over the slots of each token.
template <int BITS, bool BF16, int NT> __device__ void combine(Block<BITS, BF16, NT>& block, int tile) {
    const Call& call = block.call;
    const auto out = static_cast<uint16_t*>(call.out);
    const int64_t all = int64_t(call.tokens) * call.slots;
    // every lane counts the pieces of some jobs
    const int warp = anew(block.warp), lane = anew(block.lane);
    uint8_t* pieces = block.bytes + block.memory.pieces + warp * block.memory.most_jobs;
    for (int job = lane; job < block.schedule.jobs; job += LANES) pieces[job] = uint8_t(block.schedule.pieces(job, tile));
    sync_warp();
    const int64_t row = block.strip(tile, warp) + lane;
    if (row < call.rows)
        for (int first = 0; first < call.tokens; first += TILE) {
            float sum[TILE] = {};
            for (int k = 0; k < call.slots; ++k) {
                float value[TILE];
                int count[TILE];
#pragma unroll
                for (int i = 0; i < TILE; ++i) {
                    const int slot = (first + i) * call.slots + k;
                    const int job = first + i < call.tokens ? block.job_of(slot) : NONE;
                    count[i] = job == NONE ? 0 : pieces[job];
                    value[i] = job == NONE ? 0.0f : bias_of<BF16>(call, block.first_row(job) + row);
                }
                for (int p = 0; p < call.pieces; ++p)
#pragma unroll
                    for (int i = 0; i < TILE; ++i)
                        if (p < count[i]) value[i] += read_written(call.parts + (p * all + (first + i) * call.slots + k) * call.rows + row);
#pragma unroll
                for (int i = 0; i < TILE; ++i)
                    if (count[i] > 0) sum[i] += call.share[(first + i) * call.slots + k] * value[i];
            }
#pragma unroll
            for (int i = 0; i < TILE; ++i)
                if (first + i < call.tokens) out[(first + i) * call.rows + row] = narrow<BF16>(sum[i]);
        }
    sync_warp(); // before the table is written again
}

// A warp has come to the end of a strip, or of its block's share of one, of which it has summed `steps` steps.
template <int BITS, bool BF16, int NT>
__device__ void end_strip(Block<BITS, BF16, NT>& block, const Sums<BITS, BF16, NT>& sums, const Place& place, int steps) {
    const Call& call = block.call;
    const Schedule& schedule = block.schedule;
    const bool whole = call.mode != DOWN && steps == schedule.steps;
    const int piece = whole ? 0 : block.number - schedule.owner(schedule.first(place.job, place.tile));
    store(block, sums, place, whole, piece);
    if (whole) return;
    const int strip = place.tile * call.warps + anew(block.warp);
    if (call.mode == DOWN) {
        if (last_of(call.arrived + strip, steps, schedule.jobs * schedule.steps, block.lane)) combine<BITS, BF16, NT>(block, place.tile);
    } else if (last_of(call.arrived + place.job * schedule.tiles * call.warps + strip, steps, schedule.steps, block.lane)) {
        finish<BITS, BF16, NT>(block, place);
    }
}

template <int BITS, bool BF16, int NT>
__global__ void __launch_bounds__(32 * MOST_WARPS<NT>, 1) skinny_kernel(const __grid_constant__ Call call) {
    using S = Shape<BITS>;
    Block<BITS, BF16, NT> block(call, shared_memory());
    // routing is an activation of the launch in front of gate and up; down's is older, since gate and up waited for it
    if (call.mode == GATE_UP) previous_launch();
    block.plan();
    if (call.mode == DOWN && block.schedule.jobs == 0) {
        previous_launch();
        block.clear_out();
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
            block.lanes_of_x(x);
        }
        if (call.stages == 2)
            wait<0>();
        else if (call.stages == 3)
            wait<1>();
        else if (call.stages == 4)
            wait<2>();
        else if (call.stages == 5)
            wait<3>();
        else
            wait<4>();
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
