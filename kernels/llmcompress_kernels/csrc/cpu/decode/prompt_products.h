// What the threads of a prompt share out: pieces of its tokens, tasks, and the products of many tokens. The base of prompt.h.
//
// Threads take tasks from a counter, a few tokens or a few blocks of rows each, and meet at a barrier when those of a kind are
// done, ten times a layer and piece. Tokens are rounded once for all products that read them alike (lowbit.h, many tokens).
#pragma once

#include <initializer_list>

#include "elementwise.h"
#include "multiply.h"

namespace LLMCOMPRESS_ISA {

// rounded tokens that a task multiplies stay in a core's second-level cache
constexpr int64_t PASS_BYTES = int64_t(1) << 20;
// blocks of tokens that a pass has at least: fewer are multiplied in another way, and a product takes one way for all
constexpr int64_t PASS_BLOCKS = 4;
constexpr int64_t TOGETHER = 2;  // blocks of rows that the kernels work on together
constexpr int64_t TREE_BLOCKS = 4;  // likewise of a tree's one-bit nodes

class PromptProducts {
  public:
    PromptProducts(Engine& engine, const Cache& cache, const Prompt& prompt, PromptRoom& room, Barrier& barrier, int thread)
        : e_(engine), m_(engine.m), c_(cache), p_(prompt), room_(room), barrier_(barrier), thread_(thread),
          clock_(thread == 0 ? prompt.seconds : nullptr) {
        scratch_.resize(e_.activation_size());
    }

  protected:
    void took(Phase phase) { clock_.took(phase); }

    // For every piece, to whose tokens the methods below belong.
    template <class F>
    void pieces(F&& work) {
        const int64_t size = piece_of(e_);
        for (first_ = 0; first_ < p_.count; first_ += size) {
            count_ = std::min(size, p_.count - first_);
            work();
        }
    }

    struct Product {
        const Operand* o;
        float* out;  // [tokens, rows]
    };

    // tasks 0 to n - 1, shared by all threads
    template <class F>
    void each(int64_t n, F&& work) {
        std::atomic<int64_t>& next = room_.next[kind_];
        kind_ ^= 1;
        // nobody takes tasks by the other counter until all have met
        if (thread_ == 0) room_.next[kind_].store(0, std::memory_order_relaxed);
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) work(i);
        barrier_.wait();
    }

    // blocks of tokens that are rounded together
    int64_t most() const { return variant().token_block; }
    int64_t blocks() const { return (count_ + most() - 1) / most(); }
    int64_t begin(int64_t block) const { return block * most(); }
    int64_t end(int64_t block) const { return std::min(count_, (block + 1) * most()); }

    int64_t position(int64_t t) const { return p_.start + first_ + t; }
    float* hidden(int64_t t) { return room_.hidden.data() + (first_ + t) * m_.hidden; }
    float* delta(int64_t t) { return room_.delta.data() + (first_ + t) * m_.hidden; }
    float* row_of(std::vector<float>& rows, int64_t t) { return rows.data() + (first_ + t) * m_.hidden; }
    // experts read them once all pieces are routed
    float* normed(int64_t t) { return room_.normed.data() + ((e_.experts > 0 ? first_ : 0) + t) * m_.hidden; }

    // What the layer before this one has said.
    void add_before(int64_t t, int index) {
        if (index == 0) return;
        const LayerOperands& before = e_.layers[size_t(index - 1)];
        if (!before.aside.present()) add_delta(t, before.after());
        if (before.l.output_scale != 1) scale_all(hidden(t), m_.hidden, before.l.output_scale);
    }
    void add_delta(int64_t t, const float* after) { add_to(m_, delta(t), after, p_.member, hidden(t)); }

    void norm_hidden(const Layer& l, int64_t t, const float* weight, const float* bias, float keeps) {
        norm(m_, hidden(t), weight, bias, p_.member, normed(t));
        for (int i = 0; l.replaces != 0 && i < m_.hidden; ++i) hidden(t)[i] = keeps * normed(t)[i];
    }

    // As each(), for `together` blocks of rows of every product, and that `times` over: work(time, product, begin, end).
    template <class F>
    void each_rows(const Product* first, const Product* last, int64_t together, int64_t times, F&& work) {
        const auto tasks = [&](const Product& p) { return (p.o->blocks() + together - 1) / together; };
        int64_t all = 0;
        for (const Product* p = first; p != last; ++p) all += tasks(*p);
        each(times * all, [&](int64_t i) {
            const int64_t time = i / all;
            const Product* p = first;
            for (i %= all; i >= tasks(*p); ++p) i -= tasks(*p);
            work(time, *p, i * together, std::min((i + 1) * together, p->o->blocks()));
        });
    }

    // Products of all tokens, whose inputs are rows of `from` once make(token) has run; all but the first may be ABSENT.
    template <class F>
    void project(std::initializer_list<Product> products, const float* from, Phase phase, F&& make) {
        const auto alike = [](const Operand& a, const Operand& b) {
            return a.m.kind == b.m.kind && a.wide == b.wide && a.m.input_bytes == b.m.input_bytes &&
                   a.tree.parts == b.tree.parts && a.tree.one_bit == b.tree.one_bit;
        };
        const void* made_low = nullptr;
        for (const Product* i = products.begin(); i != products.end();) {
            const Product* j = i;
            while (j != products.end() && (!j->o->present() || alike(*i->o, *j->o))) ++j;
            const auto made = [&](int64_t b) {
                for (int64_t t = begin(b); i == products.begin() && t < end(b); ++t) make(t);
            };
            if (i->o->m.kind == TREE) by_tree(i, j, from, phase, made);
            else by_groups(i, j, from, phase, made);
            for (; i != j; ++i)
                if (i->o->low != nullptr) adapt(*i, from, phase, made_low);
        }
    }

    // Add what a product's adapter makes of the same inputs; `made` is the data of the U that did so last.
    void adapt(const Product& p, const float* from, Phase phase, const void*& made) {
        const auto nothing = [](int64_t) {};
        const Product low{p.o->low, room_.ranks.data()}, high{p.o->high, room_.adapted.data()};
        if (made != low.o->m.data) by_groups(&low, &low + 1, from, phase, nothing);
        made = low.o->m.data;
        by_groups(&high, &high + 1, low.out, phase, nothing);
        const int64_t rows = p.o->m.rows;
        each(blocks(), [&](int64_t b) {
            for (int64_t i = begin(b) * rows; i < end(b) * rows; ++i) p.out[i] += high.out[i];
        });
        took(phase);
    }

    template <class F>
    void by_groups(const Product* first, const Product* last, const float* from, Phase phase, F&& made) {
        const Weight& w = first->o->first;
        const int planes = first->o->planes(p_.planes);
        const std::vector<Chunk>& parts = first->o->chunks(planes);
        const Activations a = place_activations(w, count_, planes, room_.activations.data());
        each(a.blocks(), [&](int64_t b) {
            made(b);
            variant().quantize(w, parts.data(), int64_t(parts.size()), from, FP32, w.columns, nullptr, a, b);
        });
        took(NORM);
        multiply_rows(first, last, a);
        took(phase);
    }

    // The sum of the nodes above the member.
    template <class F>
    void by_tree(const Product* first, const Product* last, const float* from, Phase phase, F&& made) {
        const TreeShape& shape = first->o->tree;
        const TreeActivations a = place_tree_activations(shape, count_, std::max(2, p_.planes), room_.activations.data());
        each(blocks(), [&](int64_t b) {
            made(b);
            for (int64_t t = begin(b); t < end(b); ++t) tree_variant.quantize(shape, from + t * shape.columns, a, t);
        });
        took(NORM);
        each_rows(first, last, TREE_BLOCKS, 1,
                  [&](int64_t, const Product& p, int64_t begin, int64_t end) { tree_rows(p, a, begin, end); });
        took(phase);
    }

    void tree_rows(const Product& p, const TreeActivations& a, int64_t first, int64_t last) {
        const int64_t rows = p.o->m.rows, row = first * LANES, size = (last - first) * LANES;
        for (int64_t t = 0; t < count_; ++t) std::fill_n(p.out + t * rows + row, size, 0.f);
        for (int n = 0; n < p.o->m.bits; ++n) {
            const TreeNode& node = p.o->nodes()[n];
            if (node.members >> p_.member & 1) tree_variant.add(node, p.o->tree, a, 0, count_, first, last, p.out, rows);
        }
        finish_rows(p, p_.member, p.out, count_, first, last);
    }

    // Some blocks of rows of `out` [tokens, rows]; biases are those of an expert or a member.
    static void finish_rows(const Product& p, int64_t whose, float* out, int64_t tokens, int64_t first, int64_t last) {
        const Matrix& m = p.o->m;
        for (int64_t t = 0; t < tokens; ++t) finish(m, whose, first * LANES, last * LANES, out + t * m.rows);
    }

    void multiply_rows(const Product* first, const Product* last, const Activations& a) {
        const int64_t size = std::max<int64_t>(1, int64_t(activation_bytes(first->o->first, most(), a.planes)));
        const int64_t passes = std::max<int64_t>(1, a.blocks() / std::max(PASS_BLOCKS, PASS_BYTES / size));
        each_rows(first, last, TOGETHER, passes, [&](int64_t pass, const Product& p, int64_t begin, int64_t end) {
            multiply_pass(p, a, a.blocks() * pass / passes, a.blocks() * (pass + 1) / passes, begin, end);
        });
    }

    // Blocks of rows [begin, end) of a product for blocks of tokens [from, to).
    void multiply_pass(const Product& p, const Activations& all, int64_t from, int64_t to, int64_t begin, int64_t end) {
        const Operand& o = *p.o;
        const std::vector<Chunk>& parts = o.chunks(all.planes);
        const int64_t count = int64_t(parts.size()), rows = o.m.rows, places = most();
        const int64_t quads = Activations::quads(o.first.bits, o.first.columns, o.first.group);
        Activations a = all;
        a.bytes += from * places * quads * 4 * a.planes;
        a.scale += from * places * count;
        a.sum += from * places * count;
        a.tokens = std::min(to * places, count_) - from * places;
        float* const out = p.out + from * places * rows;
        variant().rows(o.first, parts.data(), count, a, begin, end, out, FP32, rows);
        finish_rows(p, 0, out, a.tokens, begin, end);
    }

    Engine& e_;
    const Model& m_;
    const Cache& c_;
    const Prompt& p_;
    PromptRoom& room_;
    Barrier& barrier_;
    const int thread_;
    int kind_ = 0;
    int64_t first_ = 0, count_ = 0;  // tokens of this piece
    Clock clock_;
    std::vector<char> scratch_;
};

}  // namespace LLMCOMPRESS_ISA
