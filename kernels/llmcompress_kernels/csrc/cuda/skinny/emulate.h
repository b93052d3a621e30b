// The instructions of device.cuh on the host, so that the kernel's own code runs under test without a GPU.
//
// The lanes of a block are fibers that run one after another, in an order that changes from block to block, until each
// waits at a barrier, of the block or of its warp, or in a matrix product; then all go on. What a missing barrier would break, breaks here:
//  - shared memory begins as NaN;
//  - asynchronous copies arrive either at once (what still reads the old data is caught) or not before the wait that
//    guarantees them (what does not wait is caught); LATE chooses;
//  - a matrix product that not all lanes of a warp take part in never ends, which is reported.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace llmcompress::skinny {

struct Triple { unsigned x, y, z; };

struct Lane {
    enum State { READY, BARRIER, WARP, MATRIX, DONE };
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(96 << 10);
    State state = READY;
    Triple thread{};
    // of the matrix product it waits in
    float* d;
    const uint32_t* a;
    uint32_t b[2];
    bool bf16;
    bool voted, agreed; // at the warp's barrier
    // asynchronous copies: the group being filled, then the committed ones, oldest first
    struct Copy { void* to; const void* from; };
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
};

struct Machine {
    std::vector<Lane> lanes;
    std::vector<unsigned char> memory;
    ucontext_t scheduler;
    Lane* now = nullptr;
    Triple block{}, grid{}, size{};
    std::function<void()> body;
    bool late = true;
    std::mt19937 order{0};
};

inline Machine machine;

#define threadIdx (machine.now->thread)
#define blockIdx (machine.block)
#define gridDim (machine.grid)
#define blockDim (machine.size)

inline void pause(Lane::State state) {
    Lane* lane = machine.now;
    lane->state = state;
    swapcontext(&lane->context, &machine.scheduler);
}

inline unsigned char* shared_memory() { return machine.memory.data(); }
inline void sync() { pause(Lane::BARRIER); }
inline void fence() {}

inline bool any_of_warp(bool mine) {
    machine.now->voted = mine;
    pause(Lane::WARP);
    return machine.now->agreed;
}

inline void sync_warp() { any_of_warp(false); }
inline void previous_launch() {}
inline void next_launch() {}

using SharedAddress = unsigned char*;
inline SharedAddress shared_address(void* at) { return static_cast<unsigned char*>(at); }

template <int BEYOND> inline void copy_async(SharedAddress shared, const void* global) {
    if (machine.late)
        machine.now->open.push_back({shared + BEYOND, global});
    else
        std::memcpy(shared + BEYOND, global, 16);
}

inline void commit() {
    machine.now->groups.push_back(std::move(machine.now->open));
    machine.now->open.clear();
}

template <int LEFT> inline void wait() {
    auto& groups = machine.now->groups;
    while (groups.size() > LEFT) {
        for (const auto& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
        groups.erase(groups.begin());
    }
}

inline float from_half(uint16_t v) {
    const int exponent = v >> 10 & 31, mantissa = v & 1023;
    const float sign = v >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1.0f + mantissa / 1024.0f, exponent - 15) : std::ldexp(mantissa / 1024.0f, -14));
}

inline uint16_t to_half(float v) {
    const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
    const float size = std::fabs(v);
    if (std::isnan(v)) return 0x7E00;
    if (size >= 65520.0f) return sign | 0x7C00;
    int exponent = size == 0 ? -14 : std::max(-14, std::ilogb(size));
    // in units of the last place, rounded to nearest, ties to even; a carry runs into the exponent as it should
    const int units = int(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return sign | uint16_t(units + ((exponent + 14) << 10));
}

inline float from_bfloat(uint16_t v) {
    const uint32_t bits = uint32_t(v) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

inline uint16_t to_bfloat(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (std::isnan(v)) return 0x7FC0;
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

template <bool BF16> inline float widen(uint16_t v) { return BF16 ? from_bfloat(v) : from_half(v); }
template <bool BF16> inline uint16_t narrow(float v) { return BF16 ? to_bfloat(v) : to_half(v); }

template <bool BF16> inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Lane& lane = *machine.now;
    lane.d = d, lane.a = a, lane.b[0] = b0, lane.b[1] = b1, lane.bf16 = BF16;
    pause(Lane::MATRIX);
}

// mma.m16n8k16 for 32 lanes, by PTX's tables of fragments.
inline void multiply(Lane* lanes) {
    float a[16][16], b[16][8];
    const auto value = [&](uint32_t word, int half) {
        const auto bits = uint16_t(word >> 16 * half);
        return lanes[0].bf16 ? from_bfloat(bits) : from_half(bits);
    };
    for (int lane = 0; lane < 32; ++lane)
        for (int half = 0; half < 2; ++half) {
            const int g = lane / 4, k = lane % 4 * 2 + half;
            for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][k + i / 2 * 8] = value(lanes[lane].a[i], half);
            for (int i = 0; i < 2; ++i) b[k + 8 * i][g] = value(lanes[lane].b[i], half);
        }
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float sum = 0;
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            lanes[lane].d[i] += sum;
        }
}

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t which) {
    const uint64_t both = uint64_t(b) << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) out |= uint32_t(both >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
    return out;
}

inline uint32_t funnel(uint32_t low, uint32_t high, uint32_t by) { return uint32_t((uint64_t(high) << 32 | low) >> (by & 31)); }
inline uint32_t mask_set(uint32_t v, uint32_t mask, uint32_t set) { return (v & mask) | set; }
template <typename T> inline T read(const T* at) { return *at; }
inline float read_written(const float* at) { return *at; }

inline int anew(int v) { return v; }

inline int add(int* counter, int value) {
    const int before = *counter;
    *counter += value;
    return before;
}

struct alignas(16) Words { uint32_t at[4]; };
struct alignas(8) Pair { float x, y; };
struct alignas(16) Four { float at[4]; };
struct alignas(16) Eight { uint64_t at[2]; }; // scales

inline void enter() {
    machine.body();
    machine.now->state = Lane::DONE;
    swapcontext(&machine.now->context, &machine.scheduler);
}

// Run one block; false if its lanes wait for one another for ever.
inline bool run_block(int threads, int bytes) {
    machine.memory.assign(size_t(bytes), 0xFF);
    machine.lanes.resize(size_t(threads));
    std::vector<int> order(machine.lanes.size());
    for (size_t i = 0; i < order.size(); ++i) {
        Lane& lane = machine.lanes[i];
        order[i] = int(i);
        lane.state = Lane::READY, lane.thread = {unsigned(i), 0, 0};
        lane.open.clear(), lane.groups.clear();
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack.data();
        lane.context.uc_stack.ss_size = lane.stack.size();
        lane.context.uc_link = nullptr;
        makecontext(&lane.context, enter, 0);
    }
    std::shuffle(order.begin(), order.end(), machine.order);
    const auto count = [&](size_t first, size_t lanes, Lane::State state) {
        return size_t(std::count_if(&machine.lanes[first], &machine.lanes[first] + lanes, [&](const Lane& l) { return l.state == state; }));
    };
    while (count(0, order.size(), Lane::DONE) < order.size()) {
        for (int i : order)
            if (machine.lanes[size_t(i)].state == Lane::READY) {
                machine.now = &machine.lanes[size_t(i)];
                swapcontext(&machine.scheduler, &machine.now->context);
            }
        bool moved = false;
        for (size_t first = 0; first < order.size(); first += 32)
            if (count(first, 32, Lane::MATRIX) == 32) {
                multiply(&machine.lanes[first]);
                for (size_t i = first; i < first + 32; ++i) machine.lanes[i].state = Lane::READY;
                moved = true;
            } else if (count(first, 32, Lane::WARP) == 32) {
                const bool any = std::any_of(&machine.lanes[first], &machine.lanes[first] + 32, [](const Lane& l) { return l.voted; });
                for (size_t i = first; i < first + 32; ++i) machine.lanes[i].state = Lane::READY, machine.lanes[i].agreed = any;
                moved = true;
            }
        const size_t waiting = count(0, order.size(), Lane::BARRIER), done = count(0, order.size(), Lane::DONE);
        if (waiting > 0 && waiting + done == order.size()) {
            if (done > 0) return false; // a barrier that some lanes never reach
            for (Lane& lane : machine.lanes) lane.state = Lane::READY;
            moved = true;
        }
        if (!moved && done < order.size()) return false;
    }
    return true;
}

template <typename Kernel, typename Call>
int start(Kernel kernel, unsigned x, int threads, int bytes, const Call& call, void*) {
    machine.grid = {x, 1, 1}, machine.size = {unsigned(threads), 1, 1};
    machine.body = [&] { kernel(call); };
    std::vector<Triple> blocks;
    for (unsigned i = 0; i < x; ++i) blocks.push_back({i, 0, 0});
    std::shuffle(blocks.begin(), blocks.end(), machine.order);
    for (const Triple& block : blocks) {
        machine.block = block;
        if (!run_block(threads, bytes)) return -2;
    }
    return 0;
}

} // namespace llmcompress::skinny
