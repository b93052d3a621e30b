// The instructions of device.cuh on the host, so that a kernel's own code runs under test without a GPU.
//
// The lanes of a block are fibers that run one after another, in an order that changes from block to block, until each
// waits at a barrier or for the other lanes of its warp; then all go on. What a missing barrier would break, breaks here:
//  - shared memory begins as NaN;
//  - asynchronous copies arrive either at once (what still reads the old data is caught) or not before the wait that
//    guarantees them (what does not wait is caught); `late` chooses;
//  - an exchange or product that not all lanes of a warp take part in, and the same one, never ends, which is reported.
// Approximate instructions are off by as much as they may be.
#pragma once

// first of all: the check that this adds to longjmp takes a lane's stack for a wrong one
#undef _FORTIFY_SOURCE

#include <setjmp.h>
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

namespace llmcompress::gpu {

struct Place { unsigned x, y, z; };
enum class Waits { NOTHING, BARRIER, SYNC, SWAP, BALLOT, LARGEST, PRODUCT, DONE };

struct Lane {
    ucontext_t context; // where it begins; afterwards it goes on at `here`
    jmp_buf here;
    bool begun = false;
    std::vector<char> stack = std::vector<char>(128 << 10);
    Waits waits = Waits::NOTHING;
    Place thread{};
    uint32_t value = 0; // given to the other lanes, then what they give
    int with = 0;
    // of the product it waits in
    float* d = nullptr;
    const float* c = nullptr;
    const uint32_t* a = nullptr;
    uint32_t b[2]{};
    bool bf16 = false;
    // asynchronous copies: the group being filled, then the committed ones, oldest first
    struct Copy { void* to; const void* from; size_t bytes; };
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
};

struct Machine {
    std::vector<Lane> lanes;
    std::vector<unsigned char> memory;
    jmp_buf scheduler;
    Lane* now = nullptr;
    Place block{}, grid{}, size{};
    std::function<void()> body;
    bool late = true;
    std::mt19937 order{0};
};

inline Machine machine;

#define threadIdx (llmcompress::gpu::machine.now->thread)
#define blockIdx (llmcompress::gpu::machine.block)
#define gridDim (llmcompress::gpu::machine.grid)

// Lanes and scheduler change places by jumps, which ask nothing of the system, as swapcontext does twice.
inline void leave(Lane& lane) {
    if (_setjmp(lane.here) == 0) _longjmp(machine.scheduler, 1);
}
inline void go_on(Lane& lane) {
    machine.now = &lane;
    if (_setjmp(machine.scheduler) != 0) return;
    if (lane.begun) _longjmp(lane.here, 1);
    lane.begun = true;
    setcontext(&lane.context);
}

inline uint32_t pause(Waits what, uint32_t value = 0, int with = 0) {
    Lane* lane = machine.now;
    lane->waits = what, lane->value = value, lane->with = with;
    leave(*lane);
    return lane->value;
}

inline uint32_t bits_of(float v) {
    uint32_t out;
    std::memcpy(&out, &v, 4);
    return out;
}
inline float float_of(uint32_t v) {
    float out;
    std::memcpy(&out, &v, 4);
    return out;
}

inline unsigned char* shared_memory() { return machine.memory.data() + (16 - reinterpret_cast<uintptr_t>(machine.memory.data()) % 16) % 16; }
inline void sync() { pause(Waits::BARRIER); }
inline bool sync_or(bool v) { return pause(Waits::BARRIER, v) != 0; }
inline void sync_warp() { pause(Waits::SYNC); }
inline float swap(float v, int with) { return float_of(pause(Waits::SWAP, bits_of(v), with)); }
inline uint32_t ballot(bool v) { return pause(Waits::BALLOT, v); }
inline bool any_of_warp(bool mine) { return ballot(mine) != 0; }
inline uint32_t largest(uint32_t v) { return pause(Waits::LARGEST, v); }
inline int first_of(uint32_t mask) { return __builtin_ffs(int(mask)) - 1; }
inline int count_of(uint32_t mask) { return __builtin_popcount(mask); }
inline void fence() {}

inline void copy(void* shared, const void* global, size_t bytes) {
    if (machine.late)
        machine.now->open.push_back({shared, global, bytes});
    else
        std::memcpy(shared, global, bytes);
}
inline void copy_async(void* shared, const void* global) { copy(shared, global, 16); }
inline void copy_word_async(void* shared, const void* global) { copy(shared, global, 4); }
using SharedAddress = unsigned char*;
template <int BEYOND> inline void copy_async(SharedAddress shared, const void* global) { copy(shared + BEYOND, global, 16); }

inline void commit() {
    machine.now->groups.push_back(std::move(machine.now->open));
    machine.now->open.clear();
}

template <int LEFT> inline void wait() {
    auto& groups = machine.now->groups;
    while (groups.size() > LEFT) {
        for (const auto& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
        groups.erase(groups.begin());
    }
}

inline float from_half(uint16_t v) {
    const int exponent = v >> 10 & 31, mantissa = v & 1023;
    const float sign = v >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1.0f + float(mantissa) / 1024.0f, exponent - 15) : std::ldexp(float(mantissa), -24));
}

inline uint16_t to_half(float v) {
    const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
    const float size = std::fabs(v);
    if (std::isnan(v)) return 0x7E00;
    if (size >= 65520.0f) return uint16_t(sign | 0x7C00);
    const int exponent = size == 0 ? -14 : std::max(-14, std::ilogb(size));
    // in units of the last place, rounded to nearest, ties to even; a carry runs into the exponent as it should
    const int units = int(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return uint16_t(sign | (units + ((exponent + 14) << 10)));
}

inline uint16_t to_bfloat(float v) {
    const uint32_t bits = bits_of(v);
    if (std::isnan(v)) return 0x7FC0;
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

template <bool BF16> inline float widen(uint16_t v) { return BF16 ? float_of(uint32_t(v) << 16) : from_half(v); }
template <bool BF16> inline uint16_t narrow(float v) { return BF16 ? to_bfloat(v) : to_half(v); }

template <bool BF16> inline uint32_t multiply_pair(uint32_t a, uint32_t b) {
    const uint32_t low = narrow<BF16>(widen<BF16>(uint16_t(a)) * widen<BF16>(uint16_t(b)));
    return low | uint32_t(narrow<BF16>(widen<BF16>(uint16_t(a >> 16)) * widen<BF16>(uint16_t(b >> 16)))) << 16;
}

template <bool BF16> inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
    Lane& lane = *machine.now;
    lane.d = d, lane.c = c, lane.a = a, lane.b[0] = b0, lane.b[1] = b1, lane.bf16 = BF16;
    pause(Waits::PRODUCT);
}

// mma.m16n8k16 for 32 lanes, by PTX's tables of fragments.
inline void product(Lane* lanes) {
    float a[16][16], b[16][8];
    const auto value = [&](uint32_t word, int half) {
        const auto bits = uint16_t(word >> 16 * half);
        return lanes[0].bf16 ? widen<true>(bits) : from_half(bits);
    };
    for (int lane = 0; lane < 32; ++lane)
        for (int half = 0; half < 2; ++half) {
            const int g = lane / 4, k = lane % 4 * 2 + half;
            for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][k + i / 2 * 8] = value(lanes[lane].a[i], half);
            for (int i = 0; i < 2; ++i) b[k + 8 * i][g] = value(lanes[lane].b[i], half);
        }
    for (int lane = 0; lane < 32; ++lane) {
        float d[4];
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float sum = 0;
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            d[i] = lanes[lane].c[i] + sum;
        }
        std::copy(d, d + 4, lanes[lane].d);
    }
}

// What 32 lanes that wait for one another give each other.
inline void exchange(Lane* lanes) {
    uint32_t given[32], most = 0, votes = 0;
    for (int i = 0; i < 32; ++i) {
        given[i] = lanes[i].value;
        most = std::max(most, given[i]);
        votes |= uint32_t(given[i] != 0) << i;
    }
    if (lanes[0].waits == Waits::PRODUCT) product(lanes);
    for (int i = 0; i < 32; ++i) {
        if (lanes[i].waits == Waits::SWAP) lanes[i].value = given[i ^ lanes[i].with];
        if (lanes[i].waits == Waits::BALLOT) lanes[i].value = votes;
        if (lanes[i].waits == Waits::LARGEST) lanes[i].value = most;
    }
}

inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline float divide(float a, float b) { return a / b; }
inline float root(float v) { return std::sqrt(v); }
inline float nearest(float v) { return std::nearbyint(v); }
inline float size_of(float v) { return std::fabs(v); }
inline float more_of(float a, float b) { return std::fmax(a, b); }
inline float less_of(float a, float b) { return std::fmin(a, b); }
inline float more_or_nan(float a, float b) { return a != a || b != b ? NAN : more_of(a, b); }
inline float less_or_nan(float a, float b) { return a != a || b != b ? NAN : less_of(a, b); }
inline float most_of_three(float a, float b, float c) { return more_or_nan(a, more_or_nan(b, c)); }
inline float about(float v) { return std::nextafter(v, machine.order() % 2 ? INFINITY : 0.0f); }
inline float about_inverse(float v) { return about(1.0f / v); }
inline float about_root(float v) { return v == 0 ? 0 : about(std::sqrt(v)); }

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t which) {
    const uint64_t both = uint64_t(b) << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) out |= uint32_t(both >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
    return out;
}

inline uint32_t mask_set(uint32_t v, uint32_t mask, uint32_t set) { return (v & mask) | set; }
inline uint32_t mask_turn(uint32_t v, uint32_t mask, uint32_t turn) { return (v & mask) ^ turn; }
inline uint32_t less_halves(uint32_t a, uint32_t b) { return std::min(a & 0xFFFF, b & 0xFFFF) | std::min(a >> 16, b >> 16) << 16; }
template <typename T> inline T read(const T* at) { return *at; }
inline float read_written(const float* at) { return *at; }
inline void in_order() {}
inline int thread_again() { return int(machine.now->thread.x); }
inline int anew(int v) { return v; }
inline void previous_launch() {}
inline void next_launch() {}

inline int count_up(int* counter) { return (*counter)++; }

struct alignas(16) Words { uint32_t at[4]; };
struct alignas(16) Four { float at[4]; };
struct alignas(8) Two { float x, y; };

inline void enter() {
    machine.body();
    machine.now->waits = Waits::DONE;
    leave(*machine.now);
}

inline size_t waiting(size_t first, size_t count, Waits what) {
    const auto begin = machine.lanes.begin() + std::ptrdiff_t(first);
    return size_t(std::count_if(begin, begin + std::ptrdiff_t(count), [&](const Lane& l) { return l.waits == what; }));
}

// Let go the warps whose lanes all wait for the same, and the block if all do; false if nobody can go on.
inline bool let_go() {
    const size_t all = machine.lanes.size();
    bool moved = false;
    for (size_t first = 0; first < all; first += 32) {
        const Waits what = machine.lanes[first].waits;
        if (what == Waits::NOTHING || what == Waits::BARRIER || what == Waits::DONE || waiting(first, 32, what) < 32) continue;
        exchange(&machine.lanes[first]);
        for (size_t i = first; i < first + 32; ++i) machine.lanes[i].waits = Waits::NOTHING;
        moved = true;
    }
    // a barrier that some lanes never reach is an error
    if (waiting(0, all, Waits::BARRIER) == all) {
        uint32_t any = 0;
        for (const Lane& lane : machine.lanes) any |= lane.value;
        for (Lane& lane : machine.lanes) lane.value = any, lane.waits = Waits::NOTHING;
        moved = true;
    }
    return moved;
}

// Run one block; false if its lanes wait for one another for ever.
inline bool run_block(int threads, int bytes) {
    machine.memory.assign(size_t(bytes) + 16, 0xFF);
    machine.lanes.resize(size_t(threads));
    std::vector<size_t> order(machine.lanes.size());
    for (size_t i = 0; i < order.size(); ++i) {
        Lane& lane = machine.lanes[i];
        order[i] = i;
        lane.waits = Waits::NOTHING, lane.begun = false, lane.thread = {unsigned(i), 0, 0};
        lane.open.clear(), lane.groups.clear();
        getcontext(&lane.context);
        lane.context.uc_stack.ss_sp = lane.stack.data();
        lane.context.uc_stack.ss_size = lane.stack.size();
        lane.context.uc_link = nullptr;
        makecontext(&lane.context, enter, 0);
    }
    std::shuffle(order.begin(), order.end(), machine.order);
    while (waiting(0, order.size(), Waits::DONE) < order.size()) {
        for (size_t i : order)
            if (machine.lanes[i].waits == Waits::NOTHING) go_on(machine.lanes[i]);
        if (!let_go() && waiting(0, order.size(), Waits::DONE) < order.size()) return false;
    }
    return true;
}

template <typename Kernel, typename Call>
int start(Kernel kernel, unsigned x, unsigned y, int threads, int bytes, const Call& call, void*) {
    machine.grid = {x, y, 1}, machine.size = {unsigned(threads), 1, 1};
    machine.body = [&] { kernel(call); };
    std::vector<Place> blocks;
    for (unsigned i = 0; i < x; ++i)
        for (unsigned j = 0; j < y; ++j) blocks.push_back({i, j, 0});
    std::shuffle(blocks.begin(), blocks.end(), machine.order);
    for (const Place& block : blocks) {
        machine.block = block;
        if (!run_block(threads, bytes)) return -2;
    }
    return 0;
}

template <typename Kernel, typename Call>
int start_early(Kernel kernel, unsigned x, unsigned y, int threads, int bytes, const Call& call, void* stream) {
    return start(kernel, x, y, threads, bytes, call, stream);
}

// Few, so that a block has several things to do.
template <typename Kernel> int at_once(Kernel, int, int) { return 3; }

} // namespace llmcompress::gpu

#define LLMCOMPRESS_EXPORT extern "C" __attribute__((visibility("default")))
