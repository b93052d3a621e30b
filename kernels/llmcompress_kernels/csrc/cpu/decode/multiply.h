// Matrix products of one decode step: a few tokens against rows of a matrix, without threads of their own.
// Packed rows are the work of lowbit.h; this adds dense ones, biases, and rows that do not fill a block.
#pragma once

#include "engine.h"
#include "vec.h"

namespace LLMCOMPRESS_ISA {

// Activations of up to MAX_BATCH tokens; one per thread. Fixed-point forms are made when a matrix first asks.
class Input {
  public:
    Input(std::vector<char>& memory, int planes) : memory_(memory), planes_(planes) {}

    // Token t is row index[t] (t itself where index is null) of `rows`, `stride` floats apart.
    void set(const float* rows, int64_t stride, int tokens, const int64_t* index = nullptr) {
        rows_ = rows, stride_ = stride, tokens_ = tokens, index_ = index, bits_ = 0, below_.made = nullptr;
    }
    int tokens() const { return tokens_; }
    int planes() const { return planes_; }
    const float* row(int t) const { return rows_ + (index_ ? index_[t] : t) * stride_; }

    const Activations& fixed_point(const Weight& w, const std::vector<Chunk>& parts, int planes) {
        if (bits_ != w.bits || group_ != w.group || fixed_.planes != planes) {
            fixed_ = place_activations(w, tokens_, planes, memory_.data());
            for (int64_t i = 0; i < fixed_.blocks(); ++i)
                variant().quantize(w, parts.data(), int64_t(parts.size()), rows_, FP32, stride_, index_, fixed_, i);
            bits_ = w.bits, group_ = w.group;
        }
        return fixed_;
    }

    // Room for what an adapter makes of these.
    struct Adapter {
        std::vector<float> low, high;
        std::vector<char> memory;
        std::unique_ptr<Input> input;
        const void* made = nullptr;  // data of the U that made `low`, which products may share
    };
    Adapter& adapter(const Operand& o) {
        if (below_.input == nullptr) below_.input = std::make_unique<Input>(below_.memory, planes_);
        grow(below_.low, size_t(MAX_BATCH * padded(o.low->m.rows)));
        grow(below_.high, size_t(MAX_BATCH * padded(o.high->m.rows)));
        if (o.high->m.kind == PACKED) grow(below_.memory, activation_bytes(o.high->first, MAX_BATCH, 3));
        return below_;
    }

    // Whose tokens these are, for trees; null without a family.
    void of_members(const int32_t* members) { members_ = members; }
    int32_t member(int t) const { return members_ == nullptr ? 0 : members_[index_ ? index_[t] : t]; }

    const TreeActivations& natural(const TreeShape& s) {
        if (bits_ != TREE_BITS || group_ != s.units || columns_ != s.columns || one_bit_ < s.one_bit) {
            tree_ = place_tree_activations(s, tokens_, planes_ < 2 ? 2 : planes_, memory_.data());
            for (int t = 0; t < tokens_; ++t) tree_variant.quantize(s, row(t), tree_, t);
            bits_ = TREE_BITS, group_ = s.units, columns_ = s.columns, one_bit_ = s.one_bit;
        }
        return tree_;
    }

  private:
    static constexpr int TREE_BITS = -1;
    const int32_t* members_ = nullptr;
    TreeActivations tree_{};
    int64_t columns_ = 0;
    bool one_bit_ = false;  // whether tree_ has tables
    std::vector<char>& memory_;
    const int planes_;
    const float* rows_ = nullptr;
    int64_t stride_ = 0;
    int tokens_ = 0;
    const int64_t* index_ = nullptr;
    Activations fixed_{};
    Adapter below_;
    int bits_ = 0;
    int64_t group_ = 0;
};

// ROWS dense rows against TOKENS tokens from `token` on; out[t * stride + r].
template <class T, int ROWS, int TOKENS>
inline void dense_rows(const T* w, int64_t columns, const Input& in, int token, float* out, int64_t stride) {
    F16 acc[ROWS][TOKENS] = {};
    const float* x[TOKENS];
    for (int t = 0; t < TOKENS; ++t) x[t] = in.row(token + t);
    int64_t c = 0;
    for (; c + 16 <= columns; c += 16)
        LLMCOMPRESS_UNROLL for (int r = 0; r < ROWS; ++r) {
            // the same place of the next rows, into the second-level cache: what lies ahead in this one is read already, and
            // the first level has few places for lines on their way
            __builtin_prefetch(w + (ROWS + r) * columns + c, 0, 2);
            const F16 v = load_float(w + r * columns + c);
            LLMCOMPRESS_UNROLL for (int t = 0; t < TOKENS; ++t) acc[r][t] += v * load_float(x[t] + c);
        }
    for (int r = 0; r < ROWS; ++r)
        for (int t = 0; t < TOKENS; ++t) {
            float total = sum(acc[r][t]);
            for (int64_t k = c; k < columns; ++k) total += widen(w[r * columns + k]) * x[t][k];
            out[t * stride + r] = total;
        }
}

template <class T, int ROWS>
void dense_tokens(const T* w, int64_t columns, const Input& in, float* out, int64_t stride) {
    int t = 0;
    if constexpr (LLMCOMPRESS_LEVEL >= 4) {
        for (; t + 4 <= in.tokens(); t += 4) dense_rows<T, ROWS, 4>(w, columns, in, t, out + t * stride, stride);
        if (t + 2 <= in.tokens()) dense_rows<T, ROWS, 2>(w, columns, in, t, out + t * stride, stride), t += 2;
    } else {
        // as many sums as registers hold
        constexpr int SOME = ROWS > 2 ? 2 : ROWS;
        for (; t + 2 <= in.tokens(); t += 2)
            for (int r = 0; r < ROWS; r += SOME)
                dense_rows<T, SOME, 2>(w + r * columns, columns, in, t, out + t * stride + r, stride);
    }
    if (t < in.tokens()) dense_rows<T, ROWS, 1>(w, columns, in, t, out + t * stride, stride);
}

template <class T>
void dense_blocks(const T* w, const Matrix& m, const Input& in, int64_t first, int64_t last, float* out, int64_t stride) {
    const int64_t end = std::min(last * LANES, m.rows);
    int64_t row = first * LANES;
    for (; row + 4 <= end; row += 4) dense_tokens<T, 4>(w + row * m.columns, m.columns, in, out + row, stride);
    for (; row < end; ++row) dense_tokens<T, 1>(w + row * m.columns, m.columns, in, out + row, stride);
}

inline void packed_blocks(const Operand& o, int64_t expert, Input& in, int64_t first, int64_t last, float* out,
                          int64_t stride) {
    const Weight w = o.weight(expert);
    const int planes = o.planes(in.planes());
    const std::vector<Chunk>& parts = o.chunks(planes);
    const Activations& a = in.fixed_point(w, parts, planes);
    const int64_t count = int64_t(parts.size()), whole = o.m.rows / LANES;
    const auto rows = variant().rows;
    if (first < std::min(last, whole)) rows(w, parts.data(), count, a, first, std::min(last, whole), out, FP32, stride);
    if (last <= whole) return;
    // the last block has rows that do not exist
    float full[MAX_BATCH * LANES];
    rows(w.from(whole * LANES), parts.data(), count, a, 0, 1, full, FP32, LANES);
    for (int t = 0; t < in.tokens(); ++t)
        std::memcpy(out + t * stride + whole * LANES, full + t * LANES, size_t(o.m.rows - whole * LANES) * 4);
}

// The sum of the nodes above each token's member; their tokens are neighbours.
inline void tree_blocks(const Operand& o, Input& in, int64_t first, int64_t last, float* out, int64_t stride) {
    const TreeActivations& a = in.natural(o.tree);
    const TreeVariant& v = tree_variant;
    const int64_t row = first * LANES, size = (last - first) * LANES;
    for (int t = 0; t < in.tokens(); ++t) std::fill_n(out + t * stride + row, size, 0.f);
    for (int n = 0; n < o.m.bits; ++n) {
        const TreeNode& node = o.nodes()[n];
        for (int low = 0; low < in.tokens();) {
            const auto below = [&](int t) { return (node.members >> in.member(t) & 1) != 0; };
            int high = low;
            while (high < in.tokens() && below(high)) ++high;
            if (high > low) v.add(node, o.tree, a, low, high, first, last, out, stride);
            low = high + 1;
        }
    }
}

// What a product's rows [first, last) still lack: the bias of an expert or a member, and factors.
inline void finish(const Matrix& m, int64_t whose, int64_t first, int64_t last, float* out) {
    const float* bias = m.bias + whose * m.rows;
    for (int64_t row = first; m.bias != nullptr && row < last; ++row) out[row] += bias[row];
    for (int64_t row = first; m.factors != nullptr && row < last; ++row) out[row] *= m.factors[row];
}

inline void multiply(const Operand& o, Input& in, int64_t expert, int64_t first, int64_t last, float* out, int64_t stride);

// What an adapter adds to row blocks [first, last). Every thread makes all of the few numbers between its two matrices: that costs
// less than to wait for others.
inline void adapt(const Operand& o, Input& in, int64_t first, int64_t last, float* out, int64_t stride) {
    Input::Adapter& a = in.adapter(o);
    const int64_t low = o.low->m.rows, rows = o.high->m.rows;
    if (a.made != o.low->m.data) {
        multiply(*o.low, in, 0, 0, o.low->blocks(), a.low.data(), low);
        a.input->set(a.low.data(), low, in.tokens());
        a.made = o.low->m.data;
    }
    multiply(*o.high, *a.input, 0, first, last, a.high.data(), rows);
    for (int t = 0; t < in.tokens(); ++t) {
        const float* from = a.high.data() + t * rows;
        for (int64_t row = first * LANES; row < std::min(last * LANES, rows); ++row) out[t * stride + row] += from[row];
    }
}

// Row blocks [first, last) of factors (W x + bias) for every token of `in`: out[t * stride + row].
inline void multiply(const Operand& o, Input& in, int64_t expert, int64_t first, int64_t last, float* out, int64_t stride) {
    if (first >= last) return;
    const Matrix& m = o.m;
    const int64_t begin = expert * m.expert_rows * m.columns;
    if (m.kind == DENSE_FP32)
        dense_blocks(static_cast<const float*>(m.data) + begin, m, in, first, last, out, stride);
    else if (m.kind == DENSE_BF16)
        dense_blocks(static_cast<const uint16_t*>(m.data) + begin, m, in, first, last, out, stride);
    else if (m.kind == TREE) tree_blocks(o, in, first, last, out, stride);
    else packed_blocks(o, expert, in, first, last, out, stride);
    for (int t = 0; t < in.tokens(); ++t)
        finish(m, m.kind == TREE ? in.member(t) : expert, first * LANES, std::min(last * LANES, m.rows), out + t * stride);
    if (o.low != nullptr) adapt(o, in, first, last, out, stride);
}

}  // namespace LLMCOMPRESS_ISA
