// MLPs of a prompt's tokens, gated or not, and experts, which begin when all tokens of a layer have chosen, for somebody may
// then change the choice.
#pragma once

#include "prompt_attention.h"
#include "routing.h"

namespace LLMCOMPRESS_ISA {

class PromptExperts : public PromptAttention {
  public:
    PromptExperts(Engine& engine, const Cache& cache, const Prompt& prompt, PromptRoom& room, Barrier& barrier, int thread)
        : PromptAttention(engine, cache, prompt, room, barrier, thread) {
        ranked_.resize(2 * size_t(e_.experts));
    }

  protected:
    void gated_mlp(const LayerOperands& o, int index) {
        project({{&o.gate, room_.gate.data()}, {&o.up, room_.up.data()}}, normed(0), GATE_UP,
                [&](int64_t t) { make_second(o, index, t); });
        open_gates(o.l, o.gate.m.rows, o.down, o.up.present());
    }

    void choose_experts(const LayerOperands& o, int index) {
        Routed& r = room_.routed;
        const int64_t count = o.router.m.rows, k = m_.top_k;
        each(blocks(), [&](int64_t b) {
            for (int64_t t = begin(b); t < end(b); ++t) make_second(o, index, t);
            Input in(scratch_, p_.planes);
            in.set(router_inputs(o, b), m_.hidden, int(end(b) - begin(b)));
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
            const float* weight = o.l.shared_norm;
            const auto own = [&](int64_t t) {
                if (weight != nullptr) norm(m_, hidden(t), weight, nullptr, 0, room_.beside.data() + t * m_.hidden);
            };
            const float* from = weight != nullptr ? room_.beside.data() : normed(0);
            project({{&o.shared_gate, room_.gate.data()}, {&o.shared_up, room_.up.data()}}, from, GATE_UP, own);
            open_gates(o.l, o.shared_gate.m.rows, o.shared_down, o.shared_up.present());
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
            float* const up = o.up.present() ? room_.up.data() + from * width : nullptr;
            for (int64_t place = from; m_.scales_inputs != 0 && place < from + size / width; ++place)
                scale_both(room_.gate.data() + place * width, up == nullptr ? up : room_.up.data() + place * width, width,
                           r.weights[size_t(first_ * k + r.slots[size_t(place)])]);
            open_gate(m_, o.l, room_.gate.data() + from * width, up, size);
            round(o.down, b, room_.gate.data() + slot * width, nullptr);
        });
        took(NORM);
        expert_rows({{&o.down, r.products.data()}});
        each(blocks(), [&](int64_t b) {
            for (int64_t t = begin(b); t < end(b); ++t) {
                if (!o.shared_down.present()) std::fill_n(delta(t), m_.hidden, 0.f);
                else if (o.shared_router.present()) scale_all(delta(t), m_.hidden, sigmoid(r.shares[size_t(first_ + t)]));
                if (o.l.routed_after != nullptr) join(o, t);
                else if (!o.entry.present()) add_slots(t, delta(t), m_.hidden);
            }
            if (o.entry.present()) widen(o, b);
        });
        took(DOWN);
    }

  private:
    // activation(gate) * up of an MLP, or the first alone, through its last projection.
    void open_gates(const Layer& l, int64_t width, const Operand& down, bool gated) {
        project({{&down, delta(0)}}, room_.gate.data(), DOWN, [&](int64_t t) {
            open_gate(m_, l, room_.gate.data() + t * width, gated ? room_.up.data() + t * width : nullptr, width);
        });
    }

    void make_second(const LayerOperands& o, int index, int64_t t) {
        if (o.aside.present()) return norm(m_, delta(t), o.l.mlp_norm, nullptr, 0, normed(t));
        if (o.l.parallel != 0) norm_hidden(o.l, t, o.l.mlp_norm, o.l.mlp_norm_bias, o.l.mlp_keeps);
        if (o.begins()) add_delta(t, o.l.attention_after);
        else add_before(t, index);
        if (o.l.parallel == 0) norm_hidden(o.l, t, o.l.mlp_norm, o.l.mlp_norm_bias, o.l.mlp_keeps);
    }

    // What the router reads of a block of tokens: what experts read, or what a norm of its own makes.
    const float* router_inputs(const LayerOperands& o, int64_t b) {
        if (o.l.router_norm == nullptr) return normed(begin(b));
        routing_.resize(size_t(most() * m_.hidden));
        for (int64_t t = begin(b); t < end(b); ++t)
            norm(m_, hidden(t), o.l.router_norm, nullptr, 0, routing_.data() + (t - begin(b)) * m_.hidden);
        return routing_.data();
    }

    // What experts say of a token, and in its delta the MLP beside them, each through its norm.
    void join(const LayerOperands& o, int64_t t) {
        said_.assign(size_t(m_.hidden), 0.f);
        add_slots(t, said_.data(), m_.hidden);
        join_norms(m_, o, said_.data(), delta(t));
        std::copy_n(said_.data(), m_.hidden, delta(t));
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

    // What experts read that read no hidden states, and in the end what they say.
    float* narrow(const LayerOperands& o, int64_t t) { return room_.narrow.data() + (first_ + t) * o.entry.m.rows; }

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
            const float weight = m_.scales_inputs != 0 ? 1.f : r.weights[size_t(first_ * m_.top_k + i)];
            const float* from = r.products.data() + place * width;
            for (int64_t c = 0; c < width; ++c) to[c] += weight * from[c];
        }
    }

    std::vector<float> ranked_, widened_, routing_, said_;
};

}  // namespace LLMCOMPRESS_ISA
