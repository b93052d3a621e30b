// A prompt through all layers: many tokens share every reading of a weight.
//
// Layer by layer, a piece of the prompt after the other. A layer's experts begin when all its tokens have chosen, for somebody
// may then change the choice. Threads take tasks from a counter, a few tokens or a few blocks of rows each, and meet at a
// barrier when those of a kind are done, ten times a layer and piece. Tokens are rounded once for all products that read them
// alike (lowbit.h, many tokens). Attention goes by heads and eight tokens, over the keys and values that the cache holds by then.
#pragma once

#include <initializer_list>

#include "attention.h"
#include "convolution.h"
#include "delta.h"
#include "elementwise.h"
#include "latent.h"
#include "multiply.h"
#include "routing.h"

namespace LLMCOMPRESS_ISA {

// rounded tokens that a task multiplies stay in a core's second-level cache
constexpr int64_t PASS_BYTES = int64_t(1) << 20;
// blocks of tokens that a pass has at least: fewer are multiplied in another way, and a product takes one way for all
constexpr int64_t PASS_BLOCKS = 4;
constexpr int64_t TOGETHER = 2;  // blocks of rows that the kernels work on together
constexpr int64_t TREE_BLOCKS = 4;  // likewise of a tree's one-bit nodes
constexpr int64_t QUERIES = 8;   // tokens that attend together
constexpr int64_t ATTENDING = 16;  // tokens to a task
constexpr int64_t CHANNELS = 64;   // of a convolution, to a task

class PromptWorker {
  public:
    PromptWorker(Engine& engine, const Cache& cache, const Prompt& prompt, PromptRoom& room, Barrier& barrier, int thread)
        : e_(engine), m_(engine.m), c_(cache), p_(prompt), room_(room), barrier_(barrier), thread_(thread),
          clock_(thread == 0 ? prompt.seconds : nullptr) {
        const Widths w = widths(m_);
        queries_.resize(size_t(QUERIES * w.row()));
        weights_.resize(size_t(QUERIES * (padded(p_.start + p_.count) + 2 * LANES)));
        parts_.resize(size_t(QUERIES * w.part()));
        sums_.resize(size_t(QUERIES * m_.latents));
        scratch_.resize(e_.activation_size());
        ranked_.resize(2 * size_t(e_.experts));
        delta_.resize(size_t(e_.delta_room));
    }

    void run() {
        const Matrix& words = m_.member_embeddings == nullptr ? m_.embedding : m_.member_embeddings[p_.member];
        pieces([&] {
            each(blocks(), [&](int64_t b) {
                for (int64_t t = begin(b); t < end(b); ++t) {
                    embedding_row(words, p_.tokens[first_ + t], m_.hidden, m_.embedding_scale, hidden(t));
                    if (e_.lays_aside) std::copy_n(hidden(t), m_.hidden, row_of(room_.words, t));
                }
            });
        });
        took(NORM);
        for (int i = 0; i < m_.layer_count; ++i) layer(e_.layers[size_t(i)], i);
        if (thread_ != 0) return;
        first_ = 0;
        add_before(p_.count - 1, m_.layer_count);
        std::copy_n(hidden(p_.count - 1), m_.hidden, p_.hidden);
    }

  private:
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

    void layer(const LayerOperands& o, int index) {
        if (o.l.mixes != 0) mixer(o.l, index);
        pieces([&] {
            if (o.l.delta != nullptr) delta_rule(o, index);
            else if (o.conv_in.present()) convolution(o, index);
            else if (o.attends()) attention(o, index);
            if (o.router.present()) choose_experts(o, index);
            else if (o.has_mlp()) gated_mlp(o, index);
            if (o.aside.present()) project({{&o.aside, row_of(room_.aside, 0)}}, delta(0), OUTPUT, [](int64_t) {});
        });
        if (!o.router.present()) return;
        if (p_.reroute != nullptr) {
            Routed& r = room_.routed;
            if (thread_ == 0) p_.reroute(index, r.scores.data(), r.weights.data(), r.chosen.data());
            barrier_.wait();
            took(ROUTER);
        }
        pieces([&] { experts(o); });
    }

    // All tokens at once: a state passes through them.
    void mixer(const Layer& l, int index) {
        const bool more = l.reads_aside != 0;
        pieces([&] {
            each(blocks(), [&](int64_t b) {
                for (int64_t t = begin(b); t < end(b); ++t) {
                    add_before(t, index);
                    for (int i = 0; more && i < m_.hidden; ++i) row_of(room_.aside, t)[i] += hidden(t)[i];
                }
            });
        });
        const BoundMixers& x = *p_.mixers;
        const float* from = more ? room_.aside.data() : room_.hidden.data();
        const Mixers::Prompt all{from, room_.delta.data(), p_.count, p_.slot, p_.start == 0, p_.last};
        x.run->prompt(x.engine, x.states, l.mixer, all, barrier_, thread_);
        took(MIXER);
    }

    // Norm of a half's hidden states, of which a mixer beside it has read the same.
    void make_first(const LayerOperands& o, int index, int64_t t) {
        if (o.l.mixes == 0) add_before(t, index);
        if (o.aside.present()) return norm_both(o.l, t);
        norm_hidden(t, o.l.attention_norm, o.l.attention_norm_bias);
        if (o.l.mixes != 0) add_delta(t, nullptr);
    }

    // Hidden states and embedding side by side, in place.
    void norm_both(const Layer& l, int64_t t) {
        const int64_t wide = 2 * int64_t(m_.hidden);
        float* const both = room_.both.data() + t * wide;
        std::copy_n(row_of(room_.words, t), m_.hidden, std::copy_n(hidden(t), m_.hidden, both));
        norm(both, l.attention_norm, nullptr, int(wide), m_.epsilon, both);
    }

    void convolution(const LayerOperands& o, int index) {
        project({{&o.conv_in, room_.convolved.data()}}, normed(0), QKV, [&](int64_t t) { make_first(o, index, t); });
        convolve_all(o, o.l.place);
        project({{&o.output, delta(0)}}, room_.mixed.data(), OUTPUT, [](int64_t) {});
    }

    void delta_rule(const LayerOperands& o, int index) {
        const Delta& d = *o.l.delta;
        project({{&o.conv_in, room_.convolved.data()}, {&o.conv_gates, room_.gates.data()}}, normed(0), QKV,
                [&](int64_t t) { make_first(o, index, t); });
        each(blocks(), [&](int64_t b) {
            Input in(scratch_, p_.planes);
            in.set(normed(begin(b)), m_.hidden, int(end(b) - begin(b)));
            multiply(o.steps, in, 0, 0, o.steps.blocks(), room_.steps.data() + begin(b) * o.steps.m.rows, o.steps.m.rows);
        });
        const DeltaRows rows{room_.convolved.data(), room_.gates.data(), room_.steps.data(), room_.mixed.data(),
                             o.conv_in.m.rows, count_};
        const Tokens what = p_.last != 0 && first_ + count_ == p_.count ? LAST_OF_PROMPT : OF_PROMPT;
        each(d.key_heads, [&](int64_t head) { pass_group(m_, c_, o.l, p_.slot, position(0), head, rows, what, delta_.data()); });
        took(MIXER);
        project({{&o.output, delta(0)}}, room_.mixed.data(), OUTPUT, [](int64_t) {});
    }

    void attention(const LayerOperands& o, int index) {
        const Product query = {&o.query, room_.query.data()}, key = {&o.key, room_.key.data()};
        const Product value = {&o.value, room_.value.data()}, low = {&o.query_down, room_.low.data()};
        const bool is_low = o.query_down.present();
        const float* from = o.aside.present() ? room_.both.data() : normed(0);
        project({is_low ? low : query, key, value}, from, QKV, [&](int64_t t) { make_first(o, index, t); });
        if (is_low)
            project({query}, low.out, QKV, [&](int64_t t) { norm_low(m_, o, low.out + t * o.query_down.m.rows); });
        if (o.absorb.present()) latent_attention(o, o.l.place);
        else head_attention(o, o.l.place);
        project({{&o.output, delta(0)}}, room_.mixed.data(), OUTPUT, [](int64_t) {});
    }

    void gated_mlp(const LayerOperands& o, int index) {
        project({{&o.gate, room_.gate.data()}, {&o.up, room_.up.data()}}, normed(0), GATE_UP,
                [&](int64_t t) { make_second(o, index, t); });
        open_gates(o.gate.m.rows, o.down, o.up.present());
    }

    // activation(gate) * up of an MLP, or the first alone, through its last projection.
    void open_gates(int64_t width, const Operand& down, bool gated) {
        project({{&down, delta(0)}}, room_.gate.data(), DOWN, [&](int64_t t) {
            open_gate(m_, room_.gate.data() + t * width, gated ? room_.up.data() + t * width : nullptr, width);
        });
    }

    void make_second(const LayerOperands& o, int index, int64_t t) {
        if (o.aside.present()) return norm(m_, delta(t), o.l.mlp_norm, nullptr, 0, normed(t));
        if (o.l.parallel != 0) norm_hidden(t, o.l.mlp_norm, o.l.mlp_norm_bias);
        if (o.begins()) add_delta(t, o.l.attention_after);
        else add_before(t, index);
        if (o.l.parallel == 0) norm_hidden(t, o.l.mlp_norm, o.l.mlp_norm_bias);
    }

    // What the layer before this one has said.
    void add_before(int64_t t, int index) {
        if (index == 0) return;
        const LayerOperands& before = e_.layers[size_t(index - 1)];
        if (!before.aside.present()) add_delta(t, before.after());
    }
    void add_delta(int64_t t, const float* after) { add_to(m_, delta(t), after, p_.member, hidden(t)); }

    void norm_hidden(int64_t t, const float* weight, const float* bias) {
        norm(m_, hidden(t), weight, bias, p_.member, normed(t));
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

    // An expert's tokens rounded, behind those of the experts before it, each of which fills whole blocks and lines.
    Activations expert_inputs(const Operand& o, int64_t expert) {
        const Routed& r = room_.routed;
        const int64_t before = r.first[size_t(expert)], own = r.first[size_t(expert) + 1] - before;
        const int planes = o.planes(p_.planes);
        const size_t at = activation_bytes(o.first, before + expert * MAX_BATCH, planes) + size_t(expert) * EXPERT_LINES;
        return place_activations(o.first, own, planes, room_.activations.data() + at);
    }

    // Rows of every expert that has tokens; out is [slots, rows].
    void expert_rows(std::initializer_list<Product> products) {
        const Routed& r = room_.routed;
        const int64_t experts = int64_t(r.first.size()) - 1;
        each_rows(products.begin(), products.end(), TOGETHER, experts,
                  [&](int64_t expert, const Product& p, int64_t begin, int64_t end) {
                      const int64_t slot = r.first[size_t(expert)], rows = p.o->m.rows;
                      if (slot == r.first[size_t(expert) + 1]) return;
                      const Activations a = expert_inputs(*p.o, expert);
                      const std::vector<Chunk>& parts = p.o->chunks(a.planes);
                      const int64_t count = int64_t(parts.size());
                      float* const out = p.out + slot * rows;
                      variant().rows(p.o->weight(expert), parts.data(), count, a, begin, end, out, FP32, rows);
                      finish_rows(p, expert, out, a.tokens, begin, end);
                  });
    }

    void choose_experts(const LayerOperands& o, int index) {
        Routed& r = room_.routed;
        const int64_t count = o.router.m.rows, k = m_.top_k;
        each(blocks(), [&](int64_t b) {
            for (int64_t t = begin(b); t < end(b); ++t) make_second(o, index, t);
            Input in(scratch_, p_.planes);
            in.set(normed(begin(b)), m_.hidden, int(end(b) - begin(b)));
            float* const scores = r.scores.data() + first_ * count;
            multiply(o.router, in, 0, 0, o.router.blocks(), scores + begin(b) * count, count);
            if (o.shared_router.present()) multiply(o.shared_router, in, 0, 0, 1, r.shares.data() + first_ + begin(b), 1);
            if (o.entry.present()) multiply(o.entry, in, 0, 0, o.entry.blocks(), narrow(o, begin(b)), o.entry.m.rows);
            for (int64_t t = begin(b); t < end(b); ++t) {
                int* const chosen = r.chosen.data() + (first_ + t) * k;
                float* const weights = r.weights.data() + (first_ + t) * k;
                choose(m_, o.l, scores + t * count, int(count), ranked_.data(), chosen, weights);
                order(int(k), chosen, weights);
            }
        });
        took(ROUTER);
    }

    // What experts read that read no hidden states, and in the end what they say.
    float* narrow(const LayerOperands& o, int64_t t) { return room_.narrow.data() + (first_ + t) * o.entry.m.rows; }

    void experts(const LayerOperands& o) {
        Routed& r = room_.routed;
        const int64_t width = o.gate.m.rows, k = m_.top_k;
        const auto round = [&](const Operand& w, const Routed::Block& b, const float* from, const int64_t* index) {
            const std::vector<Chunk>& parts = w.chunks(w.planes(p_.planes));
            variant().quantize(w.weight(b.expert), parts.data(), int64_t(parts.size()), from, FP32, w.m.columns, index,
                               expert_inputs(w, b.expert), b.block);
        };
        each(1, [&](int64_t) { r.sort(first_ * k, count_ * k, k, most()); });
        took(ROUTER);
        if (o.shared_gate.present()) {
            const auto nothing = [](int64_t) {};
            project({{&o.shared_gate, room_.gate.data()}, {&o.shared_up, room_.up.data()}}, normed(0), GATE_UP, nothing);
            open_gates(o.shared_gate.m.rows, o.shared_down, o.shared_up.present());
        }
        each(int64_t(r.blocks.size()), [&](int64_t i) {
            const Routed::Block& b = r.blocks[size_t(i)];
            round(o.gate, b, o.entry.present() ? narrow(o, 0) : normed(0), r.tokens.data() + r.first[size_t(b.expert)]);
        });
        took(NORM);
        expert_rows({{&o.gate, room_.gate.data()}, {&o.up, room_.up.data()}});
        took(GATE_UP);
        each(int64_t(r.blocks.size()), [&](int64_t i) {
            const Routed::Block& b = r.blocks[size_t(i)];
            const int64_t slot = r.first[size_t(b.expert)], from = slot + begin(b.block);
            const int64_t size = std::min(r.first[size_t(b.expert) + 1] - from, most()) * width;
            open_gate(m_, room_.gate.data() + from * width, o.up.present() ? room_.up.data() + from * width : nullptr, size);
            round(o.down, b, room_.gate.data() + slot * width, nullptr);
        });
        took(NORM);
        expert_rows({{&o.down, r.products.data()}});
        each(blocks(), [&](int64_t b) {
            for (int64_t t = begin(b); t < end(b); ++t) {
                if (!o.shared_down.present()) std::fill_n(delta(t), m_.hidden, 0.f);
                else if (o.shared_router.present()) scale_all(delta(t), m_.hidden, sigmoid(r.shares[size_t(first_ + t)]));
                if (!o.entry.present()) add_slots(t, delta(t), m_.hidden);
            }
            if (o.entry.present()) widen(o, b);
        });
        took(DOWN);
    }

    // From the width of experts back to that of hidden states, for a block of tokens.
    void widen(const LayerOperands& o, int64_t b) {
        const int64_t width = o.entry.m.rows;
        for (int64_t t = begin(b); t < end(b); ++t) {
            std::fill_n(narrow(o, t), width, 0.f);
            add_slots(t, narrow(o, t), width);
        }
        Input in(scratch_, p_.planes);
        in.set(narrow(o, begin(b)), width, int(end(b) - begin(b)));
        widened_.resize(size_t(most() * m_.hidden));
        multiply(o.exit, in, 0, 0, o.exit.blocks(), widened_.data(), m_.hidden);
        for (int64_t t = begin(b); t < end(b); ++t) {
            const float* from = widened_.data() + (t - begin(b)) * m_.hidden;
            for (int i = 0; i < m_.hidden; ++i) delta(t)[i] += from[i];
        }
    }

    // Add what a token's experts say, in ascending order, as the definition does, to some numbers.
    void add_slots(int64_t t, float* to, int64_t width) {
        const Routed& r = room_.routed;
        for (int64_t i = t * m_.top_k; i < (t + 1) * m_.top_k; ++i) {
            const int64_t place = r.places[size_t(i)];
            if (place < 0) continue;
            const float weight = r.weights[size_t(first_ * m_.top_k + i)];
            const float* from = r.products.data() + place * width;
            for (int64_t c = 0; c < width; ++c) to[c] += weight * from[c];
        }
    }

    // A task takes some channels through all tokens of the piece.
    void convolve_all(const LayerOperands& o, int layer) {
        float* const inputs = last_inputs(m_, c_, layer, p_.slot);
        each((m_.hidden + CHANNELS - 1) / CHANNELS, [&](int64_t i) {
            const int64_t first = i * CHANNELS, last = std::min<int64_t>(m_.hidden, first + CHANNELS);
            for (int k = 0; position(0) == 0 && k + 1 < m_.taps; ++k)
                std::fill(inputs + k * m_.hidden + first, inputs + k * m_.hidden + last, 0.f);
            for (int64_t t = 0; t < count_; ++t)
                convolve(m_, o.l, room_.convolved.data() + t * o.conv_in.m.rows, first, last, inputs,
                         room_.mixed.data() + t * m_.hidden);
        });
        took(MIXER);
    }

    void head_attention(const LayerOperands& o, int layer) {
        const Layer& l = o.l;
        const int64_t heads = m_.key_value_heads, dim = m_.head_dim;
        const Cache& c = cache_of(c_, l);
        each(blocks(), [&](int64_t b) {
            float turned[MAX_HEAD_DIM];
            for (int64_t t = begin(b); t < end(b); ++t) {
                const int64_t row = t * heads * dim;
                const Heads keys = key_heads(m_, l, room_.key.data() + row, p_.member);
                for (int64_t head = 0; head < heads; ++head) {
                    turn(m_, keys, head, position(t), 1.f, turned);
                    put(c, head_base(m_, c, layer, p_.slot, head), position(t), int(dim), turned,
                        room_.value.data() + row + head * dim);
                }
            }
        });
        each_part(heads, [&](int64_t head, int64_t first, int64_t end) {
            if (c_.kind == DENSE_FP32) attend_tokens<float>(o, layer, head, first, end);
            else attend_tokens<uint16_t>(o, layer, head, first, end);
        });
    }

    // Head by head, whose keys and values stay in the cores' caches; the last tokens have the most to see, so they begin.
    template <class F>
    void each_part(int64_t heads, F&& work) {
        const int64_t parts = (count_ + ATTENDING - 1) / ATTENDING;
        each(heads * parts, [&](int64_t i) {
            const int64_t first = (parts - 1 - i % parts) * ATTENDING;
            work(i / parts, first, std::min(count_, first + ATTENDING));
        });
        took(ATTENTION);
    }

    void latent_attention(const LayerOperands& o, int layer) {
        each(blocks(), [&](int64_t b) {
            for (int64_t t = begin(b); t < end(b); ++t)
                put_latent(m_, o.l, c_, layer, p_.slot, position(t), room_.key.data() + t * o.key.m.rows);
        });
        each_part(m_.heads, [&](int64_t head, int64_t first, int64_t end) {
            for (int64_t t = first; t < end; t += QUERIES) {
                const int tokens = int(std::min(QUERIES, end - t));
                if (c_.kind == DENSE_FP32) attend_latents<float>(o, layer, head, t, tokens);
                else attend_latents<uint16_t>(o, layer, head, t, tokens);
            }
        });
    }

    // Up to QUERIES tokens from t on, one head.
    template <class T>
    void attend_latents(const LayerOperands& o, int layer, int64_t head, int64_t t, int tokens) {
        const Widths w = widths(m_);
        Input in(scratch_, p_.planes);
        absorb(m_, o, c_, room_.query.data() + t * m_.heads * m_.head_dim, tokens, head,
               [&](int i) { return position(t + i); }, queries_.data(), w.row());
        const T* keys = static_cast<const T*>(c_.keys) + head_base(m_, c_, layer, p_.slot, 0);
        if (tokens == QUERIES) attend_row<T, QUERIES>(keys, t, 0);
        else for (int i = 0; i < tokens; ++i) attend_row<T, 1>(keys, t, i);
        for (int i = 0; i < tokens; ++i) combine(parts_.data() + i * w.part(), 0, 1, w.value, nullptr, sums_.data() + i * w.value);
        expand(m_, o, in, sums_.data(), tokens, head, room_.mixed.data() + t * m_.heads * m_.value_dim);
    }

    // Row i of the queries from token t on, and G - 1 further ones.
    template <class T, int G>
    void attend_row(const T* keys, int64_t t, int i) {
        const Widths w = widths(m_);
        const int64_t seen = position(t + i) + G;
        attend<T, G, 1>(keys, keys, queries_.data() + i * w.row(), w, 0, seen, weights_.data(), padded(seen) + 2 * LANES,
                        {}, parts_.data() + i * w.part());
    }

    // Tokens [first, last) of the query heads that share a key-value head.
    template <class T>
    void attend_tokens(const LayerOperands& o, int layer, int64_t head, int64_t first, int64_t last) {
        const Cache& c = cache_of(c_, o.l);
        const int64_t group = m_.heads / m_.key_value_heads, base = head_base(m_, c, layer, p_.slot, head);
        const T* keys = static_cast<const T*>(c.keys) + base;
        const T* values = static_cast<const T*>(c.values) + base;
        for (int64_t h = head * group; h < (head + 1) * group; ++h) {
            int64_t t = first;
            for (; t + QUERIES <= last; t += QUERIES) attend_at<T, QUERIES>(o, h, t, keys, values);
            for (; t < last; ++t) attend_at<T, 1>(o, h, t, keys, values);
        }
    }

    template <class T, int G>
    void attend_at(const LayerOperands& o, int64_t head, int64_t t, const T* keys, const T* values) {
        const Layer& l = o.l;
        const int dim = m_.head_dim;
        const auto row = [&](int g) { return room_.query.data() + (t + g) * o.query.m.rows; };
        const Widths w = widths(m_);
        const int64_t at = t * m_.heads + head, seen = position(t) + G;
        for (int g = 0; g < G; ++g)
            turn(m_, query_heads(m_, l, row(g), p_.member), head, position(t) + g,
                 m_.attention_scale, queries_.data() + g * w.row());
        attend<T, G, 1>(keys, values, queries_.data(), w, seen_from(l, seen - G + 1), seen, weights_.data(),
                        padded(seen) + 2 * LANES, limits_of(m_, l), parts_.data());
        for (int g = 0; g < G; ++g) {
            float* out = room_.mixed.data() + (at + g * m_.heads) * dim;
            combine(parts_.data() + g * w.part(), 0, 1, dim, sink_of(l, head), out);
            close_gates(m_, l, row(g), head, out);
        }
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
    std::vector<float> queries_, weights_, parts_, ranked_, sums_, widened_, delta_;
    std::vector<char> scratch_;
};

}  // namespace LLMCOMPRESS_ISA
