// Products with group-quantized weights: the types and the functions that other families may call.
//
// A weight is the canonical LSB-first bit stream (see schemas.py) with the 32-bit words of 16 consecutive
// rows interleaved: word w of row 16*b + lane lies at packed[(b * words + w) * 16 + lane]. Scales and packed
// zero points are interleaved the same way. It holds the very same bytes as the canonical form in another
// order; a 512-bit load yields the same columns of 16 rows, one row to a lane, so sums need no shuffles.
//
// Activations become fixed-point numbers of `planes` signed bytes with one scale to a chunk of at most 256
// columns that lies inside one weight group. A plane costs one byte-wise dot product:
//   1 plane   int8, scaled by the chunk's maximum; changes results by about 0.5 %, so callers opt in
//   2 planes  bf16 and fp16: power-of-two scales, so every value within 1/64 of the chunk's maximum is exact in bf16
//   3 planes  fp32: 21 bits below the chunk's maximum, as exact as fp32 sums are
// Codes are integers, so a chunk's sum is exact; chunks are added in fp32 in a fixed order. Every output is
// computed by one thread and does not depend on the number of threads or on its neighbours in a batch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "llmcompress/isa.h"

namespace llmcompress {

constexpr int LANES = 16;
constexpr int MAX_CHUNK = 256;   // columns; the integer sums of 8-bit codes and two planes just fit 32 bits
constexpr int INT8_CHUNK = 64;   // with one plane; keeps the error of rounding to int8 near 0.6 %

enum Type : int { FP32 = 0, BF16 = 1, FP16 = 2 };

struct Weight {
    const uint32_t* packed;  // [rows/16][words][16]
    const uint16_t* scale;   // [rows/16][groups][16] fp16
    const uint32_t* zero;    // [rows/16][zero_words][16], null on a symmetric grid
    int64_t rows;            // a multiple of 16
    int64_t columns;
    int64_t group;           // columns to a scale
    int bits;                // 2, 3, 4, 8

    int64_t words() const { return (columns * bits + 31) / 32; }
    int64_t groups() const { return (columns + group - 1) / group; }
    int64_t zero_words() const { return (groups() * bits + 31) / 32; }
    int64_t blocks() const { return rows / LANES; }
    // With the streams of rows from `first` on, a multiple of 16; as many rows are said to follow as before.
    Weight from(int64_t first) const {
        Weight w = *this;
        w.packed += first * words();
        w.scale += first * groups();
        if (w.zero) w.zero += first * zero_words();
        return w;
    }
};

// Columns that one step of the inner loop takes, and the words that hold them.
constexpr int step_columns(int bits) { return bits == 2 ? 16 : bits == 3 ? 32 : bits == 4 ? 8 : 4; }
constexpr int step_words(int bits) { return bits == 3 ? 3 : 1; }

// A group has to begin at a step; null or the reason why the kernel declines.
inline const char* declined(int bits, int64_t group, int64_t columns) {
    if (bits != 2 && bits != 3 && bits != 4 && bits != 8) return "bits must be 2, 3, 4 or 8";
    if (group < 1 || columns < 1) return "empty rows or groups";
    if (group < columns && group % step_columns(bits) != 0) return "groups do not begin at a word";
    return nullptr;
}

struct Chunk {
    int32_t steps;  // of the inner loop
    int32_t width;  // columns
    int64_t group;
    int64_t first;  // first column
};

// Chunks of one row.
inline int64_t chunk_count(int64_t group, int64_t columns, int planes = 2) {
    const int64_t limit = planes == 1 ? INT8_CHUNK : MAX_CHUNK;
    return columns / group * ((group + limit - 1) / limit) + (columns % group + limit - 1) / limit;
}

// Fill in chunk_count() chunks.
inline void chunks(int bits, int64_t group, int64_t columns, Chunk* out, int planes = 2) {
    const int64_t limit = planes == 1 ? INT8_CHUNK : MAX_CHUNK;
    for (int64_t begin = 0, g = 0; begin < columns; begin += group, ++g) {
        const int64_t end = begin + group < columns ? begin + group : columns;
        for (int64_t at = begin; at < end; at += limit) {
            const int64_t width = end - at < limit ? end - at : limit;
            const int64_t steps = (width + step_columns(bits) - 1) / step_columns(bits);
            *out++ = {int32_t(steps), int32_t(width), g, at};
        }
    }
}

// Tokens of block `i` out of `tokens`, where `most` share one unpacking of the weight: the last block has 1, 4 or
// `most` places, some of them empty.
inline int token_block(int64_t tokens, int64_t i, int most) {
    const int64_t left = tokens - i * most;
    return left > 4 ? most : left > 1 ? 4 : 1;
}

// Lines of a stream that one token fetches ahead.
constexpr int FETCH_AHEAD = 32;

// Blocks of tokens up to which each unpacks the weight again, next to its products; more share a panel (panel_avx512.h).
// Filling panels for two blocks takes a fifth to a third of a product's time on Zen 4, whose byte products leave room
// for unpacking beside them.
constexpr int64_t FEW_BLOCKS = 2;

// AMD's cores multiply in two of four vector units, so that unpacking 2, 4 and 8 bits takes nothing from two planes' products:
// there up to as many blocks as an expert's go without panels. Some operations on 3 bits do take from them.
constexpr int64_t blocks_beside(int bits) { return bits == 3 ? 4 : 8; }
inline const bool unpacks_beside = is_amd();

// Whether steps, one to a row, come after all chunks are added: int8 products with 8-bit rows of one scale then take one
// multiplication to a chunk instead of two.
inline bool steps_last(const Weight& w, int planes) { return planes == 1 && w.bits == 8 && w.groups() == 1; }

// Quantized activations of `tokens` rows. Bytes lie as [token block][quad][plane][token][4], a quad being four
// columns in the order in which the weight's words yield them.
struct Activations {
    int8_t* bytes;
    float* scale;  // [token block][chunk][token]: value = scale * fixed-point number; of several planes as kept_scale() has it
    float* sum;    // same shape: sum of the numbers, times the scale with several planes
    int64_t tokens;
    int planes;
    int most;  // tokens to a block, a property of the variant
    bool biased = false;  // bytes are unsigned, 128 too large: one plane, many tokens, see panel_avx512.h

    int64_t blocks() const { return (tokens + most - 1) / most; }
    bool many() const { return blocks() > FEW_BLOCKS; }
    static int64_t quads(int bits, int64_t columns, int64_t group) {
        const int64_t step = step_columns(bits);
        const auto of = [step](int64_t width) { return (width + step - 1) / step * (step / 4); };
        return columns / group * of(group) + of(columns % group);
    }
};

// Bytes that `Activations` needs for the three arrays together, 64-byte aligned parts included.
inline size_t activation_bytes(const Weight& w, int64_t tokens, int planes) {
    const int64_t padded = (tokens + 7) / 8 * 8;
    const int64_t quads = Activations::quads(w.bits, w.columns, w.group);
    const int64_t n = chunk_count(w.group, w.columns, planes);
    return size_t(padded * quads * 4 * planes + 2 * padded * n * int64_t(sizeof(float)) + 4 * 64);
}

enum Activation : int { SILU = 0, GELU = 1, GELU_TANH = 2, GPT_OSS = 3, RELU2 = 4 };
// Rows of an expert's first projection: gate and up, or up alone where there is no gate.
inline int64_t first_rows(Activation a, int64_t inner) { return a == RELU2 ? inner : 2 * inner; }

// Parts of one block of memory, each beginning on a cache line.
class Parts {
public:
    explicit Parts(void* memory) : at_(reinterpret_cast<uintptr_t>(memory)) {}

    template <class T>
    T* take(int64_t count) {
        at_ = (at_ + 63) / 64 * 64;
        T* const begin = reinterpret_cast<T*>(at_);
        at_ += uintptr_t(count) * sizeof(T);
        return begin;
    }

private:
    uintptr_t at_;
};

// Lay the three arrays out in `memory` of at least activation_bytes(), for a variant with blocks of `most` tokens.
inline Activations place_activations(const Weight& w, int64_t tokens, int planes, void* memory, int most) {
    const int64_t padded = (tokens + 7) / 8 * 8;
    const int64_t count = chunk_count(w.group, w.columns, planes);
    Parts parts(memory);
    Activations a;
    a.bytes = parts.take<int8_t>(padded * Activations::quads(w.bits, w.columns, w.group) * 4 * planes);
    a.scale = parts.take<float>(padded * count);
    a.sum = parts.take<float>(padded * count);
    a.tokens = tokens;
    a.planes = planes;
    a.most = most;
    // 8-bit codes fit a signed byte less a zero point in the middle, and less that one only
    a.biased = most == 8 && planes == 1 && (w.bits < 8 || w.zero == nullptr) && a.many();
    return a;
}

// Products of one instruction set; a library each (cpu/products), of which cpu.py chooses one.
struct Variant {
    int token_block;  // 4 or 8
    int streams;      // ranges of rows that one token reads at once, of equal length
    // Quantize token block `block`; `x` holds rows of `type`, row t of the call at x + index[t] * stride elements
    // (index null: t itself).
    void (*quantize)(const Weight& w, const Chunk* parts, int64_t count, const void* x, Type type, int64_t stride,
                     const int64_t* index, const Activations& a, int64_t block);
    // Rows [first, last) in blocks of 16 for all token blocks: out[t * stride + row] in `type`.
    void (*rows)(const Weight& w, const Chunk* parts, int64_t count, const Activations& a, int64_t first, int64_t last,
                 void* out, Type type, int64_t stride);
    // Rows [first, last) of a dense weight [.., columns] of `weight_type` and fp32 inputs [tokens, columns]; out in fp32.
    // `row` is scratch for one row.
    void (*dense_rows)(const void* weight, Type weight_type, int64_t columns, const float* x, int64_t tokens, int64_t first,
                       int64_t last, float* row, float* out, int64_t stride);
    // Activation: out[i] from hidden[i] (gate) and hidden[width + i] (up), or from hidden[i] alone where there is no gate.
    void (*gate)(const float* hidden, int64_t width, Activation activation, float alpha, float limit, float* out);
    void (*convert)(const void* x, int64_t first, int64_t count, Type type, float* out);      // to fp32
    void (*convert_back)(const float* x, int64_t count, Type type, void* out);                // from fp32
};

// What such a library exports.
extern "C" {
extern const __attribute__((visibility("default"))) Variant llmcompress_products;
}

const Variant& variant();  // the one in use
inline Activations place_activations(const Weight& w, int64_t tokens, int planes, void* memory) {
    return place_activations(w, tokens, planes, memory, variant().token_block);
}

}  // namespace llmcompress
