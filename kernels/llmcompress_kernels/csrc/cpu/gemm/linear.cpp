#include "linear.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace llmcompress {
namespace {

// quantized activations of one pass stay in a core's second-level cache
constexpr size_t PASS_BYTES = size_t(1) << 20;
// multiply-adds below which a second thread costs more than it saves
constexpr int64_t SERIAL_WORK = 1 << 17;

// Sixteen canonical rows from `first` on, interleaved into `to`; rows that do not exist become zeros.
void interleave(const uint32_t* from, int64_t words, int64_t first, int64_t rows, uint32_t* to) {
    for (int64_t lane = 0; lane < LANES; ++lane) {
        const uint32_t* row = from + (first + lane) * words;
        const bool real = first + lane < rows;
        for (int64_t i = 0; i < words; ++i) to[i * LANES + lane] = real ? row[i] : 0;
    }
}

void interleave(const uint16_t* from, int64_t words, int64_t first, int64_t rows, uint16_t* to) {
    for (int64_t lane = 0; lane < LANES; ++lane) {
        const uint16_t* row = from + (first + lane) * words;
        const bool real = first + lane < rows;
        for (int64_t i = 0; i < words; ++i) to[i * LANES + lane] = real ? row[i] : 0;
    }
}

// One block of a canonical weight, interleaved in this thread's scratch.
Weight interleaved_block(const Operand& w, int64_t block) {
    static thread_local Scratch scratch;
    Weight one = w.weight();
    one.rows = LANES;
    const int64_t words = one.words(), groups = one.groups(), zero_words = one.zero_words();
    auto* packed = static_cast<uint32_t*>(scratch.get(size_t(LANES * (words + zero_words) * 4 + LANES * groups * 2)));
    uint32_t* zero = packed + LANES * words;
    auto* scale = reinterpret_cast<uint16_t*>(zero + LANES * zero_words);
    interleave(w.packed, words, block * LANES, w.rows, packed);
    interleave(w.scale, groups, block * LANES, w.rows, scale);
    if (w.zero) interleave(w.zero, zero_words, block * LANES, w.rows, zero);
    one.packed = packed;
    one.scale = scale;
    one.zero = w.zero ? zero : nullptr;
    return one;
}

// The chunks of the shapes that this thread met last. A model has few, and laying them out takes as long as quantizing.
const Plan& plan_for(const Operand& w, int planes) {
    struct Entry {
        int bits = 0, planes = 0;
        int64_t group = 0, columns = 0;
        Plan plan;
    };
    static thread_local Entry entries[16];
    Entry& e = entries[size_t(w.columns / 16 + w.columns / 1024 + w.bits * 3 + planes) % 16];
    if (e.bits != w.bits || e.planes != planes || e.group != w.group || e.columns != w.columns)
        e = {w.bits, planes, w.group, w.columns, Plan(w, planes)};
    return e.plan;
}

// What one token reads first of row blocks [first, last). Memory is at work then while the token is quantized.
void fetch_first(const Weight& w, int64_t first, int64_t last) {
    const int64_t streams = variant().streams, apart = (last - first) / streams;
    const int64_t words = w.words() * LANES, most = std::min<int64_t>(FETCH_AHEAD, apart * w.words());
    for (int64_t line = 0; line < most; ++line)
        for (int64_t s = 0; s < streams; ++s)
            __builtin_prefetch(w.packed + (first + s * apart) * words + line * LANES, 0, 2);
}

// Every thread quantizes the token for itself: that takes less than fetching what another core has written, and leaves
// the end of the region as the only place where threads wait for each other.
void one_token(const Operand& w, const Plan& plan, const void* x, Type type, int planes, void* out) {
    const Weight shape = w.weight();
    const int64_t blocks = blocks_of(w.rows);
    const size_t bytes = activation_bytes(shape, 1, planes);
    const auto part = [&](int64_t i, int64_t parts) {
        static thread_local Scratch scratch;
        const int64_t first = blocks * i / parts, last = blocks * (i + 1) / parts;
        if (first == last) return;
        if (w.interleaved) fetch_first(shape, first, last);
        const Activations a = place_activations(shape, 1, planes, scratch.get(bytes));
        variant().quantize(shape, plan.parts.data(), plan.count(), x, type, w.columns, nullptr, a, 0);
        operand_rows(w, plan, a, first, last, out, type, w.rows);
    };
    const int threads = threads_for(w.rows * w.columns);
    if (threads == 1) return part(0, 1);
#pragma omp parallel num_threads(threads)
    part(omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace

void* Scratch::get(size_t bytes) {
    if (bytes > size_) {
        std::free(memory_);
        size_ = (bytes + 4095) / 4096 * 4096;
        memory_ = std::aligned_alloc(64, size_);
        if (!memory_) {
            size_ = 0;
            throw std::bad_alloc();
        }
    }
    return memory_;
}

void Scratch::trim(size_t most) {
    if (size_ <= most) return;
    std::free(memory_);
    memory_ = nullptr;
    size_ = 0;
}

Scratch::~Scratch() { std::free(memory_); }

int threads_for(int64_t work) { return work < SERIAL_WORK ? 1 : omp_get_max_threads(); }

// Part `i` of `parts` of the chunks of tokens that fill one block.
static void quantize_part(const Weight& w, const Plan& plan, const void* x, Type type, const Activations& a, int64_t i,
                          int64_t parts) {
    const int64_t from = plan.count() * i / parts, to = plan.count() * (i + 1) / parts;
    const int64_t places = token_block(a.tokens, 0, a.most), per_step = step_columns(w.bits) / 4;
    Activations part = a;
    for (int64_t c = 0; c < from; ++c) part.bytes += plan.parts[size_t(c)].steps * per_step * places * 4 * a.planes;
    part.scale += from * places;
    part.sum += from * places;
    variant().quantize(w, plan.parts.data() + from, to - from, x, type, w.columns, nullptr, part, 0);
}

void operand_rows(const Operand& w, const Plan& plan, const Activations& a, int64_t first, int64_t last, void* out,
                  Type type, int64_t stride) {
    const Variant& v = variant();
    const Chunk* parts = plan.parts.data();
    if (w.interleaved) return v.rows(w.weight(), parts, plan.count(), a, first, last, out, type, stride);
    static thread_local Scratch scratch;
    const size_t size = type == FP32 ? 4 : 2;
    for (int64_t block = first; block < last; ++block) {
        const Weight one = interleaved_block(w, block);
        char* const to = static_cast<char*>(out) + size_t(block) * LANES * size;
        const int64_t real = std::min<int64_t>(LANES, w.rows - block * LANES);
        if (real == LANES) {
            v.rows(one, parts, plan.count(), a, 0, 1, to, type, stride);
            continue;
        }
        char* const full = static_cast<char*>(scratch.get(size_t(a.tokens) * LANES * size));
        v.rows(one, parts, plan.count(), a, 0, 1, full, type, LANES);
        for (int64_t t = 0; t < a.tokens; ++t)
            std::memcpy(to + size_t(t * stride) * size, full + size_t(t) * LANES * size, size_t(real) * size);
    }
}

void linear(const Operand& w, const void* x, Type type, int64_t tokens, int planes, void* out) {
    static thread_local Scratch scratch;
    const Plan& plan = plan_for(w, planes);
    if (tokens == 1) return one_token(w, plan, x, type, planes, out);
    const Weight shape = w.weight();
    const size_t size = type == FP32 ? 4 : 2;
    const int64_t each = int64_t(activation_bytes(shape, 8, planes));
    const int64_t pass = std::max<int64_t>(1, int64_t(PASS_BYTES) / each) * 8;
    const int64_t blocks = blocks_of(w.rows);
    for (int64_t first = 0; first < tokens; first += pass) {
        const int64_t now = std::min(pass, tokens - first);
        const Activations a =
            place_activations(shape, now, planes, scratch.get(activation_bytes(shape, now, planes)));
        const char* from = static_cast<const char*>(x) + size_t(first * w.columns) * size;
        char* to = static_cast<char*>(out) + size_t(first * w.rows) * size;
        const int64_t token_blocks = a.blocks();
        const int threads = threads_for(w.rows * w.columns * now);
        // Few tokens read long streams; many are spread finely, since other programs may slow a thread down. Blocks stay in
        // pairs, which the kernels work on together, where there are enough for all threads.
        const int64_t unit = blocks >= 2 * threads ? 2 : 1, units = (blocks + unit - 1) / unit;
        const int64_t each = unit * (token_blocks == 1 ? (units + threads - 1) / threads : std::max<int64_t>(1, units / (8 * threads)));
        const int64_t tasks = (blocks + each - 1) / each;
        const auto quantize = [&](int64_t i) {
            variant().quantize(shape, plan.parts.data(), plan.count(), from, type, w.columns, nullptr, a, i);
        };
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            if (token_blocks == 1) {
#pragma omp for schedule(static, 1)
                for (int i = 0; i < threads; ++i) quantize_part(shape, plan, from, type, a, i, threads);
            } else {
#pragma omp for schedule(dynamic, 1)
                for (int64_t i = 0; i < token_blocks; ++i) quantize(i);
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < tasks; ++i)
                operand_rows(w, plan, a, i * each, std::min(blocks, (i + 1) * each), to, type, w.rows);
        }
    }
}

}  // namespace llmcompress

// For families that are not built with these kernels (cpu/call).
extern "C" __attribute__((visibility("default"))) void llmcompress_linear(const llmcompress::Operand& w, const void* x,
                                                                          llmcompress::Type type, int64_t tokens,
                                                                          int planes, void* out) {
    llmcompress::linear(w, x, type, tokens, planes, out);
}
