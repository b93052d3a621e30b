// The whole decode step: every thread walks through all layers and waits for the others where it needs their rows.
//
// What is small (norms, rounding of activations, merging of attention, routing) every thread computes for itself,
// which costs less than a barrier. Matrices are cut by row blocks, attention by key-value heads and chunks of positions.
#pragma once

#include "attention.h"
#include "convolution.h"
#include "delta.h"
#include "elementwise.h"
#include "engine.h"
#include "latent.h"
#include "multiply.h"
#include "routing.h"

namespace LLMCOMPRESS_ISA {

class Worker {
  public:
    Worker(Engine& engine, const Cache& cache, const Step& step, Barrier& barrier, int thread)
        : e_(engine), m_(engine.m), c_(cache), s_(step), sh_(engine.shared), own_(*engine.threads[size_t(thread)]),
          barrier_(barrier), thread_(thread), in_(own_.activations, step.planes),
          clock_(thread == 0 ? step.seconds : nullptr) {
        in_.of_members(step.members);
    }

    void run() {
        if (s_.first_layer == 0) embed();
        else std::copy_n(s_.hidden, s_.batch * m_.hidden, own_.hidden.begin());
        for (int i = s_.first_layer; i < s_.last_layer; ++i) {
            const LayerOperands& o = e_.layers[size_t(i)];
            if (o.aside.present()) {
                lay_aside(o);
                continue;
            }
            // before a mixer adds that stands beside attention
            if (o.attends()) norm_all(o.l.attention_norm, o.l.attention_norm_bias);
            if (o.l.mixes != 0) mix(o.l);
            if (o.l.delta != nullptr) delta_rule(o);
            else if (o.conv_in.present()) convolution(o, o.l.place);
            else if (o.absorb.present()) latent_attention(o, o.l.place);
            else if (o.attends()) attention(o, o.l.place);
            if (o.router.present()) experts(o);
            else if (o.has_mlp()) {
                // of a parallel layer before attention adds
                if (o.l.parallel == 0) norm_all(o.l.mlp_norm, o.l.mlp_norm_bias);
                gated_mlp(o);
            }
        }
        if (s_.last_layer == m_.layer_count) head();
        else if (thread_ == 0) std::copy_n(own_.hidden.begin(), s_.batch * m_.hidden, s_.hidden);
    }

  private:
    void took(Phase phase) { clock_.took(phase); }

    void wait() {
        barrier_.wait();
        took(WAIT);
    }

    struct Range {
        int64_t first, last;
        int64_t begin() const { return first * LANES; }
        int64_t end(int64_t rows) const { return std::min(last * LANES, rows); }
    };

    // this thread's share of n things
    Range share(int64_t n) const {
        const int64_t threads = barrier_.threads();
        return {n * thread_ / threads, n * (thread_ + 1) / threads};
    }

    int64_t member(int b) const { return s_.members == nullptr ? 0 : s_.members[b]; }

    void embed() {
        for (int b = 0; b < s_.batch; ++b) {
            const Matrix& from = m_.member_embeddings == nullptr ? m_.embedding : m_.member_embeddings[member(b)];
            embedding_row(from, s_.tokens[b], m_.hidden, m_.embedding_scale, own_.hidden.data() + b * m_.hidden);
        }
        if (e_.lays_aside) std::copy_n(own_.hidden.begin(), s_.batch * m_.hidden, own_.words.begin());
    }

    void norm_all(const float* weight, const float* bias) {
        for (int b = 0; b < s_.batch; ++b)
            norm(m_, own_.hidden.data() + b * m_.hidden, weight, bias, member(b), own_.normed.data() + b * m_.hidden);
        in_.set(own_.normed.data(), m_.hidden, s_.batch);
        took(NORM);
    }

    // What a sublayer says, which other threads read too, through a norm where there are weights for it.
    void add_delta(const float* after = nullptr) {
        for (int b = 0; b < s_.batch; ++b) {
            float* delta = sh_.delta.data() + b * int64_t(m_.hidden);
            if (after != nullptr) delta = std::copy_n(delta, m_.hidden, own_.normed.data()) - m_.hidden;
            add_to(m_, delta, after, member(b), own_.hidden.data() + b * int64_t(m_.hidden));
        }
    }

    void mix(const Layer& l) {
        const BoundMixers& x = *s_.mixers;
        const float* from = own_.hidden.data();
        if (l.reads_aside != 0) {
            float* const both = own_.both.data();
            for (int64_t i = 0; i < s_.batch * m_.hidden; ++i) both[i] = from[i] + own_.aside[size_t(i)];
            from = both;
        }
        x.run->step(x.engine, x.states, l.mixer, {from, s_.slots, sh_.delta.data(), s_.batch}, barrier_, thread_);
        took(MIXER);
        add_delta();
    }

    // A layer whose halves read each other and not what was before (decode.h).
    void lay_aside(const LayerOperands& o) {
        const int64_t hidden = m_.hidden;
        for (int b = 0; b < s_.batch; ++b) {
            float* both = own_.both.data() + 2 * b * hidden;
            std::copy_n(own_.hidden.data() + b * hidden, hidden, both);
            std::copy_n(own_.words.data() + b * hidden, hidden, both + hidden);
            norm(both, o.l.attention_norm, nullptr, int(2 * hidden), m_.epsilon, own_.normed.data() + 2 * b * hidden);
        }
        in_.set(own_.normed.data(), 2 * hidden, s_.batch);
        took(NORM);
        attention(o, o.l.place);
        for (int b = 0; b < s_.batch; ++b)
            norm(m_, own_.aside.data() + b * hidden, o.l.mlp_norm, nullptr, 0, own_.normed.data() + b * hidden);
        in_.set(own_.normed.data(), hidden, s_.batch);
        took(NORM);
        gated_mlp(o);
        in_.set(own_.aside.data(), hidden, s_.batch);
        const Range rows = share(o.aside.blocks());
        multiply(o.aside, in_, 0, rows.first, rows.last, sh_.aside.data(), hidden);
        took(OUTPUT);
        wait();
        std::copy_n(sh_.aside.begin(), s_.batch * hidden, own_.aside.begin());
    }

    // What a half says: added to the hidden states, or laid aside.
    void take_delta(const LayerOperands& o, const float* after) {
        if (o.aside.present()) std::copy_n(sh_.delta.begin(), s_.batch * m_.hidden, own_.aside.begin());
        else add_delta(after);
    }

    void convolution(const LayerOperands& o, int layer) {
        norm_all(o.l.attention_norm, o.l.attention_norm_bias);
        project({{&o.conv_in, sh_.convolved.data()}});
        const Range mine = share(m_.hidden / LANES);
        for (int b = 0; b < s_.batch; ++b)
            convolve(m_, o.l, sh_.convolved.data() + b * o.conv_in.m.rows, mine.first * LANES, mine.last * LANES,
                     last_inputs(m_, c_, layer, s_.slots[b]), sh_.query.data() + b * int64_t(m_.hidden));
        took(MIXER);
        wait();
        finish_attention(o, sh_.query.data(), m_.hidden);
    }

    void delta_rule(const LayerOperands& o) {
        const Delta& d = *o.l.delta;
        norm_all(o.l.attention_norm, o.l.attention_norm_bias);
        project({{&o.conv_in, sh_.convolved.data()}, {&o.conv_gates, sh_.gates.data()}, {&o.steps, sh_.steps.data()}});
        const Range tasks = share(int64_t(s_.batch) * d.key_heads);
        for (int64_t task = tasks.first; task < tasks.last; ++task) {
            const int64_t b = task / d.key_heads;
            const DeltaRows rows{sh_.convolved.data() + b * o.conv_in.m.rows, sh_.gates.data() + b * d.values(),
                                 sh_.steps.data() + b * o.steps.m.rows, sh_.query.data() + b * d.values(), o.conv_in.m.rows, 1};
            pass_group(m_, c_, o.l, s_.slots[b], s_.positions[b], task % d.key_heads, rows, OF_STEP, own_.delta.data());
        }
        took(MIXER);
        wait();
        finish_attention(o, sh_.query.data(), int(d.values()));
    }

    void attention(const LayerOperands& o, int layer) {
        project({{&o.query, sh_.query.data()}, {&o.key, sh_.key.data()}, {&o.value, sh_.value.data()}});
        // all new keys and values come first: tokens of a step may belong to one sequence (a short prompt)
        const Range pairs = share(s_.batch * m_.key_value_heads);
        for (int64_t i = pairs.first; i < pairs.last; ++i)
            append(o.l, layer, int(i / m_.key_value_heads), int(i % m_.key_value_heads));
        wait();
        const Range tasks = share(int64_t(s_.batch) * m_.key_value_heads * sh_.chunks);
        for (int64_t task = tasks.first; task < tasks.last; ++task) {
            const int pair = int(task / sh_.chunks), chunk = int(task % sh_.chunks);
            if (c_.kind == DENSE_FP32) attend_chunk<float>(o, layer, pair / m_.key_value_heads, pair % m_.key_value_heads, chunk);
            else attend_chunk<uint16_t>(o, layer, pair / m_.key_value_heads, pair % m_.key_value_heads, chunk);
        }
        took(ATTENTION);
        wait();
        const Widths w = widths(m_);
        const int width = m_.heads * w.value;
        for (int b = 0; b < s_.batch; ++b)
            for (int h = 0; h < m_.heads; ++h) {
                float* out = own_.mixed.data() + int64_t(b) * width + h * w.value;
                merge(o.l, b, h, w, out);
                close_gates(m_, o.l, sh_.query.data() + b * o.query.m.rows, h, out);
            }
        finish_attention(o, own_.mixed.data(), width);
    }

    struct Product {
        const Operand* o;
        float* out;  // [B, rows]
    };

    // Products of the same inputs.
    void project(std::initializer_list<Product> products) {
        int64_t all = 0, start = 0;
        for (const Product& p : products) all += p.o->blocks();
        const Range mine = share(all);
        for (const Product& p : products) {
            const int64_t blocks = p.o->blocks();
            multiply(*p.o, in_, 0, std::max<int64_t>(0, mine.first - start), std::min(blocks, mine.last - start), p.out,
                     p.o->m.rows);
            start += blocks;
        }
        took(QKV);
        wait();
    }

    void latent_attention(const LayerOperands& o, int layer) {
        const bool low = o.query_down.present();
        project({low ? Product{&o.query_down, sh_.low.data()} : Product{&o.query, sh_.query.data()}, {&o.key, sh_.key.data()}});
        const Range tokens = share(s_.batch);
        for (int64_t b = tokens.first; b < tokens.last; ++b)
            put_latent(m_, o.l, c_, layer, s_.slots[b], s_.positions[b], sh_.key.data() + b * o.key.m.rows);
        if (low) low_queries(o);
        const Widths w = widths(m_);
        const Range heads = share(m_.heads);
        for (int64_t h = heads.first; h < heads.last; ++h)
            absorb(m_, o, c_, sh_.query.data(), s_.batch, h, [&](int b) { return s_.positions[b]; },
                   sh_.absorbed.data() + h * w.row(), int64_t(m_.heads) * w.row());
        took(QKV);
        wait();
        const int groups = tasks_of(m_);
        const Range tasks = share(int64_t(s_.batch) * groups * sh_.chunks);
        for (int64_t task = tasks.first; task < tasks.last; ++task) {
            const int at = int(task / sh_.chunks), chunk = int(task % sh_.chunks);
            if (c_.kind == DENSE_FP32) attend_latents<float>(o.l, layer, at / groups, at % groups, chunk);
            else attend_latents<uint16_t>(o.l, layer, at / groups, at % groups, chunk);
        }
        took(ATTENTION);
        wait();
        for (int64_t h = heads.first; h < heads.last; ++h) {
            for (int b = 0; b < s_.batch; ++b) merge(o.l, b, int(h), w, own_.mixed.data() + int64_t(b) * w.value);
            expand(m_, o, in_, own_.mixed.data(), s_.batch, h, sh_.value.data());
        }
        took(ATTENTION);
        wait();
        finish_attention(o, sh_.value.data(), m_.heads * m_.value_dim);
    }

    // Every thread norms all of what its rows of queries read.
    void low_queries(const LayerOperands& o) {
        const int64_t rank = o.query_down.m.rows;
        std::copy_n(sh_.low.data(), s_.batch * rank, own_.low.data());
        for (int b = 0; b < s_.batch; ++b) norm_low(m_, o, own_.low.data() + b * rank);
        in_.set(own_.low.data(), rank, s_.batch);
        project({{&o.query, sh_.query.data()}});
    }

    template <class T>
    void attend_latents(const Layer& l, int layer, int b, int group, int chunk) {
        const Widths w = widths(m_);
        const int head = group * TOGETHER_HEADS, count = std::min(TOGETHER_HEADS, m_.heads - head);
        const float* queries = sh_.absorbed.data() + (int64_t(b) * m_.heads + head) * w.row();
        attend_span<T>(l, layer, b, 0, chunk, count, queries, part_of(b, chunk, head));
    }

    // Where a chunk of token b leaves what it finds for a head.
    float* part_of(int b, int chunk, int64_t head) {
        return sh_.parts.data() + ((int64_t(b) * sh_.chunks + chunk) * m_.heads + head) * widths(m_).part();
    }

    // All that the chunks of token b have found for a head.
    void merge(const Layer& l, int b, int head, const Widths& w, float* out) {
        combine(part_of(b, 0, head), int64_t(m_.heads) * w.part(), sh_.chunks, w.value, sink_of(l, head), out);
    }

    void finish_attention(const LayerOperands& o, const float* mixed, int width) {
        in_.set(mixed, width, s_.batch);
        took(ATTENTION);
        const Range rows = share(o.output.blocks());
        multiply(o.output, in_, 0, rows.first, rows.last, sh_.delta.data(), m_.hidden);
        took(OUTPUT);
        wait();
        if (o.l.parallel != 0) norm_all(o.l.mlp_norm, o.l.mlp_norm_bias);
        take_delta(o, o.l.attention_after);
    }

    void append(const Layer& l, int layer, int b, int head) {
        const int dim = m_.head_dim;
        const int64_t row = int64_t(b) * m_.key_value_heads * dim, at = row + int64_t(head) * dim;
        float turned[MAX_HEAD_DIM];
        turn(m_, key_heads(m_, l, sh_.key.data() + row, member(b)), head, s_.positions[b], 1.f, turned);
        const Cache& c = cache_of(c_, l);
        put(c, head_base(m_, c, layer, s_.slots[b], head), s_.positions[b], dim, turned, sh_.value.data() + at);
    }

    template <class T>
    void attend_chunk(const LayerOperands& o, int layer, int b, int head, int chunk) {
        const Layer& l = o.l;
        const int group = m_.heads / m_.key_value_heads;
        const Heads queries = query_heads(m_, l, sh_.query.data() + b * o.query.m.rows, member(b));
        for (int g = 0; g < group; ++g)
            turn(m_, queries, int64_t(head) * group + g, s_.positions[b], m_.attention_scale,
                 own_.queries.data() + g * widths(m_).row());
        attend_span<T>(l, layer, b, head, chunk, group, own_.queries.data(), part_of(b, chunk, int64_t(head) * group));
    }

    // A chunk of the positions that token b sees, for `group` query heads of a key-value head.
    template <class T>
    void attend_span(const Layer& l, int layer, int b, int head, int chunk, int group, const float* queries, float* out) {
        const Widths w = widths(m_);
        const Cache& c = cache_of(c_, l);
        const int64_t base = head_base(m_, c, layer, s_.slots[b], head), length = s_.positions[b] + 1;
        // chunks begin at whole vectors of positions
        const int64_t from = seen_from(l, length), begin = from / LANES, vectors = row_blocks(length) - begin;
        const int64_t first = std::max(from, (begin + vectors * chunk / sh_.chunks) * LANES);
        const int64_t last = std::min(length, (begin + vectors * (chunk + 1) / sh_.chunks) * LANES);
        if (first >= last) {
            for (int g = 0; g < group; ++g) {
                std::fill_n(out + g * w.part(), w.part(), 0.f);
                out[g * w.part()] = LOWEST;
            }
            return;
        }
        const T* keys = static_cast<const T*>(c.keys) + base;
        const T* values = w.latent ? keys : static_cast<const T*>(c.values) + base;
        attend_heads<T>(group, keys, values, queries, w, first, last, own_.weights.data(), c_.positions + LANES,
                        limits_of(m_, l), out);
    }

    // activation(gate) * up. Rows of the same index belong to the same thread, so that it can combine them at once.
    void gate_up(const Operand& gate, const Operand& up_rows, int64_t expert, Range blocks, float* out, int64_t stride) {
        const int64_t width = gate.m.rows, row = blocks.begin(), count = blocks.end(width) - row;
        if (count <= 0) return;
        float* up = up_rows.present() ? own_.product.data() : nullptr;
        multiply(gate, in_, expert, blocks.first, blocks.last, out, stride);
        if (up != nullptr) multiply(up_rows, in_, expert, blocks.first, blocks.last, up, width);
        for (int t = 0; t < in_.tokens(); ++t)
            open_gate(m_, out + t * stride + row, up == nullptr ? up : up + t * width + row, count);
    }

    void gated_mlp(const LayerOperands& o) {
        const int64_t width = o.gate.m.rows;
        gate_up(o.gate, o.up, 0, share(o.gate.blocks()), sh_.inner.data(), width);
        took(GATE_UP);
        wait();
        in_.set(sh_.inner.data(), width, s_.batch);
        const Range rows = share(o.down.blocks());
        multiply(o.down, in_, 0, rows.first, rows.last, sh_.delta.data(), m_.hidden);
        took(DOWN);
        wait();
        take_delta(o, o.l.mlp_after);
    }

    void experts(const LayerOperands& o) {
        const int64_t width = o.gate.m.rows, count = o.router.m.rows, wide = o.down.m.rows;
        const bool narrow = o.entry.present();
        norm_all(o.l.mlp_norm, o.l.mlp_norm_bias);
        const Range routers = share(o.router.blocks());
        multiply(o.router, in_, 0, routers.first, routers.last, sh_.scores.data(), count);
        const Range entries = share(o.entry.blocks());
        multiply(o.entry, in_, 0, entries.first, entries.last, sh_.narrow.data(), o.entry.m.rows);
        took(ROUTER);
        shared_inner(o);
        wait();
        // every thread finds the same
        for (int b = 0; b < s_.batch; ++b)
            choose(m_, o.l, sh_.scores.data() + b * count, int(count), own_.ranked.data(),
                   own_.chosen.data() + b * m_.top_k, own_.routed.data() + b * m_.top_k);
        took(ROUTER);
        const Range inner = share(o.gate.blocks());
        for_each_expert(count, [&](int expert, const int* slots, int taken) {
            // slots of one expert are the rows of one small product
            for (int i = 0; i < taken; ++i) own_.rows[size_t(i)] = slots[i] / m_.top_k;
            in_.set(narrow ? sh_.narrow.data() : own_.normed.data(), o.gate.m.columns, taken, own_.rows.data());
            gate_up(o.gate, o.up, expert, inner, own_.gated.data(), width);
            const int64_t row = inner.begin(), size = inner.end(width) - row;
            for (int i = 0; i < taken && size > 0; ++i)
                std::copy_n(own_.gated.data() + i * width + row, size, sh_.inner.data() + slots[i] * width + row);
        });
        took(GATE_UP);
        wait();
        const Range outer = share(o.down.blocks());
        const int64_t row = outer.begin(), size = outer.end(wide) - row;
        float* const sums = narrow ? sh_.sums.data() : sh_.delta.data();
        for (int b = 0; narrow && b < s_.batch && size > 0; ++b) std::fill_n(sums + b * wide + row, size, 0.f);
        if (!narrow) begin_delta(o, outer, row, size);
        for_each_expert(count, [&](int expert, const int* slots, int taken) {
            for (int i = 0; i < taken; ++i) own_.rows[size_t(i)] = slots[i];
            in_.set(sh_.inner.data(), width, taken, own_.rows.data());
            multiply(o.down, in_, expert, outer.first, outer.last, own_.product.data(), wide);
            for (int i = 0; i < taken; ++i) {
                const float weight = own_.routed[size_t(slots[i])];
                float* to = sums + slots[i] / m_.top_k * wide + row;
                const float* from = own_.product.data() + i * wide + row;
                for (int64_t c = 0; c < size; ++c) to[c] += weight * from[c];
            }
        });
        took(DOWN);
        wait();
        if (narrow) widen(o);
        add_delta(o.l.mlp_after);
    }

    // From the width of experts back to that of hidden states.
    void widen(const LayerOperands& o) {
        const Range rows = share(o.exit.blocks());
        const int64_t row = rows.begin(), size = rows.end(m_.hidden) - row;
        begin_delta(o, rows, row, size);
        in_.set(sh_.sums.data(), o.exit.m.columns, s_.batch);
        multiply(o.exit, in_, 0, rows.first, rows.last, own_.product.data(), m_.hidden);
        for (int b = 0; b < s_.batch; ++b) {
            const int64_t at = b * int64_t(m_.hidden) + row;
            for (int64_t i = 0; i < size; ++i) sh_.delta[size_t(at + i)] += own_.product[size_t(at + i)];
        }
        took(DOWN);
        wait();
    }

    // What the MLP beside the experts has before its last projection, and its share.
    void shared_inner(const LayerOperands& o) {
        if (!o.shared_gate.present()) return;
        gate_up(o.shared_gate, o.shared_up, 0, share(o.shared_gate.blocks()), sh_.shared.data(), o.shared_gate.m.rows);
        if (thread_ == 0 && o.shared_router.present()) multiply(o.shared_router, in_, 0, 0, 1, sh_.shares.data(), 1);
        took(GATE_UP);
    }

    // Blocks of rows to which experts add: nothing yet, or what that MLP says.
    void begin_delta(const LayerOperands& o, Range blocks, int64_t row, int64_t size) {
        if (o.shared_down.present()) {
            in_.set(sh_.shared.data(), o.shared_gate.m.rows, s_.batch);
            multiply(o.shared_down, in_, 0, blocks.first, blocks.last, sh_.delta.data(), m_.hidden);
        }
        for (int b = 0; b < s_.batch && size > 0; ++b) {
            float* to = sh_.delta.data() + b * int64_t(m_.hidden) + row;
            if (!o.shared_down.present()) std::fill_n(to, size, 0.f);
            else if (o.shared_router.present()) scale_all(to, size, sigmoid(sh_.shares[size_t(b)]));
        }
    }

    // experts in ascending order, as the definition adds them; a token never takes an expert twice
    template <class F>
    void for_each_expert(int64_t experts, F&& work) {
        const int all = s_.batch * m_.top_k;
        const int* chosen = own_.chosen.data();
        int slots[MAX_BATCH];
        for (int previous = -1;;) {
            int next = int(experts), taken = 0;
            for (int i = 0; i < all; ++i)
                if (chosen[i] > previous && chosen[i] < next) next = chosen[i];
            if (next == int(experts)) return;
            for (int i = 0; i < all; ++i)
                if (chosen[i] == next) slots[taken++] = i;
            work(next, slots, taken);
            previous = next;
        }
    }

    void head() {
        norm_all(m_.final_norm, m_.final_norm_bias);
        if (s_.logits == nullptr) return screened_head();
        const Range rows = share(e_.head.blocks());
        if (e_.heads.empty()) multiply(e_.head, in_, 0, rows.first, rows.last, s_.logits, m_.head.rows);
        else member_heads(rows);
        const int64_t first = rows.begin(), count = rows.end(m_.head.rows) - first;
        for (int b = 0; b < s_.batch && m_.logit_cap > 0; ++b) cap_all(s_.logits + b * m_.head.rows + first, count, m_.logit_cap);
        took(HEAD);
        if (s_.best != nullptr) largest_logit(rows.begin(), rows.end(m_.head.rows));
    }

    // every member's head for its own tokens
    void member_heads(Range rows) {
        for (int low = 0; low < s_.batch;) {
            int high = low + 1;
            while (high < s_.batch && member(high) == member(low)) ++high;
            in_.set(own_.normed.data() + int64_t(low) * m_.hidden, m_.hidden, high - low);
            multiply(e_.heads[size_t(member(low))], in_, 0, rows.first, rows.last, s_.logits + low * m_.head.rows, m_.head.rows);
            low = high;
        }
    }

    // The largest logit without all of them: the rounded head bounds every logit from both sides, and only rows whose
    // upper bound reaches the best lower bound are computed. The result is that of the whole head.
    void screened_head() {
        const int64_t rows = m_.head.rows;
        const Range mine = share(e_.head.blocks());
        const int64_t first = mine.begin(), last = mine.end(rows);
        Input given(own_.activations, 2);  // screen_error allows for that
        given.set(own_.normed.data(), m_.hidden, s_.batch);
        multiply(e_.screen, given, 0, mine.first, mine.last, sh_.rough.data(), rows);
        for (int b = 0; b < s_.batch; ++b) {
            const float* rough = sh_.rough.data() + b * rows;
            const float length = size_of(b);
            float lower = LOWEST;
            for (int64_t i = first; i < last; ++i) lower = std::max(lower, rough[i] - m_.screen_error[i] * length);
            sh_.bounds[size_t(thread_ * s_.batch + b)] = lower;
        }
        took(HEAD);
        wait();
        for (int b = 0; b < s_.batch; ++b) {
            float* rough = sh_.rough.data() + b * rows;
            const float length = size_of(b);
            float lower = LOWEST;
            for (int t = 0; t < barrier_.threads(); ++t) lower = std::max(lower, sh_.bounds[size_t(t * s_.batch + b)]);
            in_.set(own_.normed.data() + int64_t(b) * m_.hidden, m_.hidden, 1);
            int64_t best = -1;
            for (int64_t i = first; i < last; ++i) {
                if (rough[i] + m_.screen_error[i] * length < lower) continue;
                rough[i] = head_row(i);
                if (best < 0 || rough[i] > rough[best]) best = i;
            }
            sh_.best[size_t(thread_ * s_.batch + b)] = best;
        }
        took(HEAD);
        wait();
        if (thread_ == 0) merge_best(sh_.rough.data());
    }

    float size_of(int b) const {
        const float* x = own_.normed.data() + int64_t(b) * m_.hidden;
        float squares = 0;
        for (int i = 0; i < m_.hidden; ++i) squares += x[i] * x[i];
        return std::sqrt(squares);
    }

    float head_row(int64_t row) {
        float out;
        if (m_.head.kind == DENSE_FP32)
            dense_rows<float, 1, 1>(static_cast<const float*>(m_.head.data) + row * m_.hidden, m_.hidden, in_, 0, &out, 1);
        else
            dense_rows<uint16_t, 1, 1>(static_cast<const uint16_t*>(m_.head.data) + row * m_.hidden, m_.hidden, in_, 0, &out, 1);
        return m_.head.bias ? out + m_.head.bias[row] : out;
    }

    void largest_logit(int64_t first, int64_t last) {
        for (int b = 0; b < s_.batch; ++b) {
            const float* logits = s_.logits + b * m_.head.rows;
            const bool any = first < last;
            sh_.best[size_t(thread_ * s_.batch + b)] = any ? std::max_element(logits + first, logits + last) - logits : -1;
        }
        wait();
        if (thread_ == 0) merge_best(s_.logits);
    }

    void merge_best(const float* values) {
        for (int b = 0; b < s_.batch; ++b) {
            const float* logits = values + b * m_.head.rows;
            int64_t at = -1;
            for (int t = 0; t < barrier_.threads(); ++t) {
                const int64_t i = sh_.best[size_t(t * s_.batch + b)];
                if (i >= 0 && (at < 0 || logits[i] > logits[at])) at = i;
            }
            s_.best[b] = std::max<int64_t>(at, 0);  // every logit is NaN: any token is as wrong
        }
    }

    Engine& e_;
    const Model& m_;
    const Cache& c_;
    const Step& s_;
    Shared& sh_;
    Buffers& own_;
    Barrier& barrier_;
    const int thread_;
    Input in_;
    Clock clock_;
};

}  // namespace LLMCOMPRESS_ISA
