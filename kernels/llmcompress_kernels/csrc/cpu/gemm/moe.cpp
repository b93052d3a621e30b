#include "moe.h"

#include <omp.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

namespace llmcompress {
namespace {

constexpr int64_t UNIT_TOKENS = 64;         // slots of one expert that are worked on together
constexpr int64_t PASS_SLOTS = 2048;        // slots in flight, which bounds the intermediate memory
constexpr int64_t TASKS = 4;                // tasks to a thread, if they can be large enough
constexpr int64_t LEAST_BLOCKS = 4, MOST_BLOCKS = 128;  // of 16 rows in a task
constexpr int64_t GATED_BLOCKS = 32;        // of gate and as many of up, for many tokens: half of a second-level cache
constexpr int64_t PIECE = 256;              // columns of a token that are summed up together
constexpr size_t KEPT_BYTES = size_t(8) << 20;

// Slots of one expert, next to each other in expert order.
struct Unit {
    int64_t expert, first, count;
    Activations activations;
};

struct Pass {
    std::vector<int64_t> token;   // of every live slot, in expert order
    std::vector<float> weight;    // the same
    std::vector<int64_t> begin;   // first entry of `places` of every token
    std::vector<int64_t> places;  // live slots of a token, in expert order
    std::vector<Unit> units;

    int64_t live() const { return int64_t(token.size()); }
};

Pass sort_slots(const Routing& r, int64_t first, int64_t last) {
    Pass pass;
    std::vector<int64_t> start(size_t(r.experts + 1), 0);
    for (int64_t i = first * r.slots; i < last * r.slots; ++i) {
        if (r.index[i] < 0) throw std::out_of_range("moe_group_gemm: a negative expert index");
        if (r.index[i] < r.experts) ++start[size_t(r.index[i] + 1)];
    }
    for (int64_t e = 0; e < r.experts; ++e) start[size_t(e + 1)] += start[size_t(e)];
    pass.units.reserve(size_t(std::min(r.experts, (last - first) * r.slots)));
    for (int64_t e = 0; e < r.experts; ++e) {
        const int64_t end = start[size_t(e + 1)];
        for (int64_t at = start[size_t(e)]; at < end; at += UNIT_TOKENS)
            pass.units.push_back({e, at, std::min(UNIT_TOKENS, end - at), {}});
    }
    const size_t live = size_t(start[size_t(r.experts)]);
    pass.token.resize(live);
    pass.weight.resize(live);
    pass.places.reserve(live);
    pass.begin.reserve(size_t(last - first + 1));
    for (int64_t t = first; t < last; ++t) {
        pass.begin.push_back(int64_t(pass.places.size()));
        for (int64_t i = t * r.slots; i < (t + 1) * r.slots; ++i) {
            if (r.index[i] >= r.experts) continue;
            const int64_t place = start[size_t(r.index[i])]++;
            pass.token[size_t(place)] = t;
            variant().convert(r.weight, i, 1, r.weight_type, &pass.weight[size_t(place)]);
            pass.places.push_back(place);
        }
        std::sort(pass.places.begin() + pass.begin.back(), pass.places.end());
    }
    pass.begin.push_back(int64_t(pass.places.size()));
    return pass;
}

// Memory for the quantized activations of every unit.
void place_units(std::vector<Unit>& units, const Side& side, int planes, Scratch& scratch) {
    const Weight w = side.packed.weight();
    size_t total = 0;
    for (const Unit& u : units) total += activation_bytes(w, u.count, planes) + 64;
    char* at = static_cast<char*>(scratch.get(total));
    for (Unit& u : units) {
        u.activations = place_activations(w, u.count, planes, at);
        at += activation_bytes(w, u.count, planes) + 64;
    }
}

// Quantize the inputs of one unit: `x` is [.., columns] of `type`, slot s reading row index[s] (null: s).
void quantize(const Side& side, const Plan& plan, const Unit& u, const void* x, Type type, const int64_t* index) {
    const Weight shape = side.packed.weight();
    const int64_t skipped = index ? 0 : u.first * shape.columns * (type == FP32 ? 4 : 2);
    for (int64_t b = 0; b < u.activations.blocks(); ++b)
        variant().quantize(shape, plan.parts.data(), plan.count(), static_cast<const char*>(x) + skipped, type, shape.columns,
                           index ? index + u.first : nullptr, u.activations, b);
}

// Inputs of a projection: packed sides read the quantized ones of the units, or `shared` where they all have the same one;
// dense sides read `x` as quantize() does.
struct Inputs {
    const Activations* shared;
    const void* x;
    Type type;
    const int64_t* index;
};

// Rows [first, first + count) of one expert for the slots of a unit: to[slot * stride + row] in fp32, bias included.
void project_rows(const Side& side, const Plan& plan, const Unit& u, const Inputs& in, int64_t first, int64_t count, float* to,
                  int64_t stride) {
    const Variant& v = variant();
    const int64_t rows = side.packed.rows, columns = side.packed.columns;
    if (side.dense) {
        static thread_local Scratch scratch;
        float* values = static_cast<float*>(scratch.get(size_t((u.count + 1) * columns) * 4));
        for (int64_t t = 0; t < u.count; ++t)
            v.convert(in.x, (in.index ? in.index[u.first + t] : u.first + t) * columns, columns, in.type, values + t * columns);
        const size_t size = side.dense_type == FP32 ? 4 : 2;
        v.dense_rows(static_cast<const char*>(side.dense) + size_t((u.expert * rows + first) * columns) * size, side.dense_type,
                     columns, values, u.count, 0, count, values + u.count * columns, to, stride);
    } else {
        const Activations& a = in.shared ? *in.shared : u.activations;
        operand_rows(side.part(u.expert, first, count), plan, a, 0, blocks_of(count), to, FP32, stride);
    }
    for (int64_t row = 0; side.bias && row < count; ++row) {
        float bias;
        v.convert(side.bias, u.expert * rows + first + row, 1, side.bias_type, &bias);
        for (int64_t t = 0; t < u.count; ++t) to[t * stride + row] += bias;
    }
}

// Blocks of rows in a task: long tasks read long streams; there are enough of them to keep the threads equally busy.
int64_t task_blocks(int64_t units, int64_t blocks, int64_t most) {
    return std::clamp(units * blocks / (TASKS * omp_get_num_threads()), LEAST_BLOCKS, most);
}

// One projection for all units, inside a parallel region: out[slot, row] in fp32.
void project(const Side& side, const Plan& plan, const std::vector<Unit>& units, const Inputs& in, float* out) {
    const int64_t rows = side.packed.rows, count = int64_t(units.size());
    const int64_t each = task_blocks(count, blocks_of(rows), MOST_BLOCKS) * LANES, tasks = (rows + each - 1) / each;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < count * tasks; ++task) {
        const Unit& u = units[size_t(task / tasks)];
        const int64_t first = task % tasks * each;
        project_rows(side, plan, u, in, first, std::min(each, rows - first), out + u.first * rows + first, rows);
    }
}

// The first projection and its activation: out[slot, column]. A task makes the same columns of gate and up, which are used
// while they lie in this core's caches.
void project_gated(const Side& side, const Plan& plan, const std::vector<Unit>& units, const Inputs& in, int64_t inner,
                   Activation activation, float alpha, float limit, float* out) {
    static thread_local Scratch scratch;
    const int64_t count = int64_t(units.size()), sides = first_rows(activation, inner) / inner;
    const int64_t most = in.shared ? MOST_BLOCKS : GATED_BLOCKS;
    // gate and up begin at whole blocks only where the width is made of them
    const int64_t each = inner % LANES ? inner : task_blocks(count, blocks_of(inner), most) * LANES;
    const int64_t tasks = (inner + each - 1) / each;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < count * tasks; ++task) {
        const Unit& u = units[size_t(task / tasks)];
        const int64_t first = task % tasks * each, width = std::min(each, inner - first), stride = sides * width;
        float* hidden = static_cast<float*>(scratch.get(size_t(u.count * stride) * 4));
        if (width == inner) {
            project_rows(side, plan, u, in, 0, stride, hidden, stride);
        } else {
            for (int64_t s = 0; s < sides; ++s)
                project_rows(side, plan, u, in, s * inner + first, width, hidden + s * width, stride);
        }
        for (int64_t t = 0; t < u.count; ++t)
            variant().gate(hidden + t * stride, width, activation, alpha, limit, out + (u.first + t) * inner + first);
    }
}

// Tokens [first, first + pass.begin.size() - 1): the weighted sums of their slots. A piece of a token's columns is a task.
void combine(const Pass& pass, const float* slots, int64_t width, int64_t first, Type type, void* out) {
    const int64_t tokens = int64_t(pass.begin.size()) - 1, pieces = (width + PIECE - 1) / PIECE;
    const size_t size = type == FP32 ? 4 : 2;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tokens * pieces; ++task) {
        const int64_t t = task / pieces, at = task % pieces * PIECE, columns = std::min(PIECE, width - at);
        float total[PIECE] = {};
        for (int64_t i = pass.begin[size_t(t)]; i < pass.begin[size_t(t + 1)]; ++i) {
            const int64_t place = pass.places[size_t(i)];
            const float weight = pass.weight[size_t(place)];
            const float* from = slots + place * width + at;
            for (int64_t h = 0; h < columns; ++h) total[h] += weight * from[h];
        }
        variant().convert_back(total, columns, type, static_cast<char*>(out) + size_t((first + t) * width + at) * size);
    }
}

}  // namespace

void experts(const Side& gate_up, const Side& down, const Routing& routing, const void* x, Type type, int planes,
             Activation activation, float alpha, float limit, void* out) {
    static thread_local Scratch first_scratch, second_scratch, inner_scratch, slot_scratch;
    const int64_t inner = down.packed.columns, width = down.packed.rows, rows = first_rows(activation, inner);
    const Plan first_plan(gate_up.packed, planes), second_plan(down.packed, planes);
    const int64_t step = std::max<int64_t>(1, PASS_SLOTS / std::max<int64_t>(1, routing.slots));
    for (int64_t begin = 0; begin < routing.tokens; begin += step) {
        Pass pass = sort_slots(routing, begin, std::min(begin + step, routing.tokens));
        const int64_t live = pass.live(), count = int64_t(pass.units.size());
        // the experts of one token all read the same input, which every thread quantizes for itself: no wait, no traffic
        const bool alone = pass.begin.size() == 2 && live > 0 && live == count && !gate_up.dense;
        std::vector<Unit> again = pass.units;
        if (!gate_up.dense && !alone) place_units(pass.units, gate_up, planes, first_scratch);
        if (!down.dense) place_units(again, down, planes, second_scratch);
        float* gated = static_cast<float*>(inner_scratch.get(size_t(live * inner) * 4 + 64));
        float* slots = static_cast<float*>(slot_scratch.get(size_t(live * width) * 4 + 64));
        const int threads = threads_for((rows + inner) * width * live);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            Activations own{};
            if (alone) {
                static thread_local Scratch scratch;
                const Weight shape = gate_up.packed.weight();
                own = place_activations(shape, 1, planes, scratch.get(activation_bytes(shape, 1, planes)));
                variant().quantize(shape, first_plan.parts.data(), first_plan.count(), x, type, shape.columns, pass.token.data(),
                                   own, 0);
            } else if (!gate_up.dense) {
#pragma omp for schedule(dynamic, 1)
                for (int64_t i = 0; i < count; ++i)
                    quantize(gate_up, first_plan, pass.units[size_t(i)], x, type, pass.token.data());
            }
            const Inputs inputs{alone ? &own : nullptr, x, type, pass.token.data()};
            project_gated(gate_up, first_plan, pass.units, inputs, inner, activation, alpha, limit, gated);
            if (!down.dense) {
#pragma omp for schedule(dynamic, 1)
                for (int64_t i = 0; i < count; ++i) quantize(down, second_plan, again[size_t(i)], gated, FP32, nullptr);
            }
            project(down, second_plan, again, {nullptr, gated, FP32, nullptr}, slots);
            combine(pass, slots, width, begin, type, out);
        }
    }
    for (Scratch* s : {&first_scratch, &second_scratch, &inner_scratch, &slot_scratch}) s->trim(KEPT_BYTES);
}

}  // namespace llmcompress
