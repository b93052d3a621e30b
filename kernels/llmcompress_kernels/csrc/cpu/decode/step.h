// The whole decode step: every thread walks through all layers and waits for the others where it needs their rows.
//
// What is small (norms, rounding of activations, merging of attention, routing) every thread computes for itself,
// which costs less than a barrier. Matrices are cut by row blocks, attention by key-value heads and chunks of positions:
// step_products.h, step_attention.h, step_experts.h, step_head.h.
#pragma once

#include "convolution.h"
#include "delta.h"
#include "step_head.h"

namespace LLMCOMPRESS_ISA {

class Worker : public StepHead {
  public:
    using StepHead::StepHead;

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
            if (o.attends()) norm_half(o.l, o.l.attention_norm, o.l.attention_norm_bias, o.l.attention_keeps);
            if (o.l.mixes != 0) mix(o.l);
            if (o.l.delta != nullptr) delta_rule(o);
            else if (o.conv_in.present()) convolution(o, o.l.place);
            else if (o.absorb.present()) latent_attention(o, o.l.place);
            else if (o.attends()) attention(o, o.l.place);
            if (o.router.present()) experts(o);
            else if (o.has_mlp()) {
                // of a parallel layer before attention adds
                if (o.l.parallel == 0) norm_half(o.l, o.l.mlp_norm, o.l.mlp_norm_bias, o.l.mlp_keeps);
                gated_mlp(o);
            }
            if (o.l.output_scale != 1) scale_all(own_.hidden.data(), s_.batch * int64_t(m_.hidden), o.l.output_scale);
        }
        if (s_.last_layer == m_.layer_count) head();
        else if (thread_ == 0) std::copy_n(own_.hidden.begin(), s_.batch * m_.hidden, s_.hidden);
    }

  private:
    void embed() {
        for (int b = 0; b < s_.batch; ++b) {
            const Matrix& from = m_.member_embeddings == nullptr ? m_.embedding : m_.member_embeddings[member(b)];
            embedding_row(m_, from, s_.tokens[b], s_.positions[b], own_.hidden.data() + b * m_.hidden);
        }
        if (e_.lays_aside) std::copy_n(own_.hidden.begin(), s_.batch * m_.hidden, own_.words.begin());
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
        norm_half(o.l, o.l.attention_norm, o.l.attention_norm_bias, o.l.attention_keeps);
        const Product gates{&o.conv_gates, sh_.gates.data()}, low{&o.gates_low, sh_.low.data()};
        project({{&o.conv_in, sh_.convolved.data()}, {&o.conv_key, sh_.key.data()}, {&o.conv_value, sh_.value.data()},
                 low.o->present() ? low : gates, {&o.steps, sh_.steps.data()}, {&o.decays_low, sh_.decays_low.data()}});
        if (o.decays.present()) {
            in_.set(sh_.decays_low.data(), o.decays_low.m.rows, s_.batch);
            const Range rows = share(o.decays.blocks());
            multiply(o.decays, in_, 0, rows.first, rows.last, sh_.decays.data(), o.decays.m.rows);
        }
        if (low.o->present()) {
            in_.set(low.out, low.o->m.rows, s_.batch);
            project({gates});
        } else if (o.decays.present()) wait();
        const Range tasks = share(int64_t(s_.batch) * d.key_heads);
        for (int64_t task = tasks.first; task < tasks.last; ++task) {
            const int64_t b = task / d.key_heads;
            const auto row = [&](const Operand& x, const std::vector<float>& all) { return all.data() + b * x.m.rows; };
            const DeltaRows rows = delta_rows(o, row(o.conv_in, sh_.convolved), row(o.conv_key, sh_.key), row(o.conv_value, sh_.value),
                                              {sh_.gates.data() + b * d.values(), row(o.steps, sh_.steps), row(o.decays, sh_.decays)},
                                              sh_.query.data() + b * d.values(), 1);
            pass_group(m_, c_, o.l, s_.slots[b], s_.positions[b], task % d.key_heads, rows, OF_STEP, own_.delta.data());
        }
        took(MIXER);
        wait();
        if (d.whole == 0) return finish_attention(o, sh_.query.data(), int(d.values()));
        // others read these, too
        std::copy_n(sh_.query.data(), s_.batch * d.values(), own_.mixed.data());
        for (int b = 0; b < s_.batch; ++b) open_all(d, sh_.gates.data() + b * d.values(), own_.mixed.data() + b * d.values());
        finish_attention(o, own_.mixed.data(), int(d.values()));
    }
};

}  // namespace LLMCOMPRESS_ISA
