// A prompt through all layers: many tokens share every reading of a weight.
//
// Layer by layer, a piece of the prompt after the other. prompt_products.h says how threads share the work, prompt_attention.h and
// prompt_experts.h have the halves of most layers.
#pragma once

#include "convolution.h"
#include "delta.h"
#include "prompt_experts.h"

namespace LLMCOMPRESS_ISA {

constexpr int64_t CHANNELS = 64;  // of a convolution, to a task

class PromptWorker : public PromptExperts {
  public:
    PromptWorker(Engine& engine, const Cache& cache, const Prompt& prompt, PromptRoom& room, Barrier& barrier, int thread)
        : PromptExperts(engine, cache, prompt, room, barrier, thread) {
        delta_.resize(size_t(e_.delta_room));
    }

    void run() {
        const Matrix& words = m_.member_embeddings == nullptr ? m_.embedding : m_.member_embeddings[p_.member];
        pieces([&] {
            each(blocks(), [&](int64_t b) {
                for (int64_t t = begin(b); t < end(b); ++t) {
                    embedding_row(m_, words, p_.tokens[first_ + t], p_.start + first_ + t, hidden(t));
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

    void convolution(const LayerOperands& o, int index) {
        project({{&o.conv_in, room_.convolved.data()}}, normed(0), QKV, [&](int64_t t) { make_first(o, index, t); });
        convolve_all(o, o.l.place);
        project({{&o.output, delta(0)}}, room_.mixed.data(), OUTPUT, [](int64_t) {});
    }

    void delta_rule(const LayerOperands& o, int index) {
        const Delta& d = *o.l.delta;
        const Product gates{&o.conv_gates, room_.gates.data()}, low{&o.gates_low, room_.low.data()};
        const bool is_low = low.o->present();
        project({{&o.conv_in, room_.convolved.data()}, {&o.conv_key, room_.key.data()}, {&o.conv_value, room_.value.data()},
                 is_low ? low : gates}, normed(0), QKV,
                [&](int64_t t) { make_first(o, index, t); });
        if (is_low) project({gates}, low.out, QKV, [](int64_t) {});
        each(blocks(), [&](int64_t b) {
            Input in(scratch_, p_.planes);
            in.set(normed(begin(b)), m_.hidden, int(end(b) - begin(b)));
            multiply(o.steps, in, 0, 0, o.steps.blocks(), room_.steps.data() + begin(b) * o.steps.m.rows, o.steps.m.rows);
            if (o.decays.present()) decay_block(o, in, b);
        });
        const DeltaRows rows = delta_rows(o, room_.convolved.data(), room_.key.data(), room_.value.data(),
                                          {room_.gates.data(), room_.steps.data(), room_.decays.data()}, room_.mixed.data(), count_);
        const Tokens what = p_.last != 0 && first_ + count_ == p_.count ? LAST_OF_PROMPT : OF_PROMPT;
        each(d.key_heads, [&](int64_t head) { pass_group(m_, c_, o.l, p_.slot, position(0), head, rows, what, delta_.data()); });
        took(MIXER);
        project({{&o.output, delta(0)}}, room_.mixed.data(), OUTPUT, [&](int64_t t) {
            if (d.whole != 0) open_all(d, room_.gates.data() + t * d.values(), room_.mixed.data() + t * d.values());
        });
    }

    // What makes decays of columns, of a block of tokens.
    void decay_block(const LayerOperands& o, Input& in, int64_t b) {
        const int64_t rank = o.decays_low.m.rows, rows = o.decays.m.rows;
        float* const low = room_.decays_low.data() + begin(b) * rank;
        multiply(o.decays_low, in, 0, 0, o.decays_low.blocks(), low, rank);
        in.set(low, rank, int(end(b) - begin(b)));
        multiply(o.decays, in, 0, 0, o.decays.blocks(), room_.decays.data() + begin(b) * rows, rows);
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

    std::vector<float> delta_;
};

}  // namespace LLMCOMPRESS_ISA
