// MLPs of a step's tokens, gated or not, and experts.
#pragma once

#include "routing.h"
#include "step_attention.h"

namespace LLMCOMPRESS_ISA {

class StepExperts : public StepAttention {
  public:
    using StepAttention::StepAttention;

  protected:
    void gated_mlp(const LayerOperands& o) {
        const int64_t width = o.gate.m.rows;
        gate_up(o.l, o.gate, o.up, 0, share(o.gate.blocks()), sh_.inner.data(), width);
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
        // a parallel layer has normed what was before attention
        if (o.l.router_norm != nullptr) norm_all(o.l.router_norm, nullptr);
        else if (o.l.parallel == 0) norm_half(o.l, o.l.mlp_norm, o.l.mlp_norm_bias, o.l.mlp_keeps);
        const Range routers = share(o.router.blocks());
        multiply(o.router, in_, 0, routers.first, routers.last, sh_.scores.data(), count);
        const Range entries = share(o.entry.blocks());
        multiply(o.entry, in_, 0, entries.first, entries.last, sh_.narrow.data(), o.entry.m.rows);
        took(ROUTER);
        if (o.l.shared_norm != nullptr) norm_all(o.l.shared_norm, nullptr);
        shared_inner(o);
        if (o.l.router_norm != nullptr || o.l.shared_norm != nullptr) norm_all(o.l.mlp_norm, o.l.mlp_norm_bias);
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
            gate_up(o.l, o.gate, o.up, expert, inner, own_.gated.data(), width, m_.scales_inputs != 0 ? slots : nullptr);
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
                const float weight = m_.scales_inputs != 0 ? 1.f : own_.routed[size_t(slots[i])];
                float* to = sums + slots[i] / m_.top_k * wide + row;
                const float* from = own_.product.data() + i * wide + row;
                for (int64_t c = 0; c < size; ++c) to[c] += weight * from[c];
            }
        });
        took(DOWN);
        wait();
        if (narrow) widen(o);
        if (o.l.routed_after != nullptr) join(o);
        else add_delta(o.l.mlp_after);
    }

  private:
    // activation(gate) * up. Rows of the same index belong to the same thread, so that it can combine them at once. With `slots` the
    // weights of these multiply both, which is what inputs times weights give.
    void gate_up(const Layer& l, const Operand& gate, const Operand& up_rows, int64_t expert, Range blocks, float* out,
                 int64_t stride, const int* slots = nullptr) {
        const int64_t width = gate.m.rows, row = blocks.begin(), count = blocks.end(width) - row;
        if (count <= 0) return;
        float* up = up_rows.present() ? own_.product.data() : nullptr;
        multiply(gate, in_, expert, blocks.first, blocks.last, out, stride);
        if (up != nullptr) multiply(up_rows, in_, expert, blocks.first, blocks.last, up, width);
        for (int t = 0; t < in_.tokens(); ++t) {
            float* const own = up == nullptr ? up : up + t * width + row;
            if (slots != nullptr) scale_both(out + t * stride + row, own, count, own_.routed[size_t(slots[t])]);
            open_gate(m_, l, out + t * stride + row, own, count);
        }
    }

    // Add what experts and the MLP beside them say, each through its norm.
    void join(const LayerOperands& o) {
        for (int b = 0; b < s_.batch; ++b) {
            const int64_t at = b * int64_t(m_.hidden);
            // others read these, too
            std::copy_n(sh_.delta.data() + at, m_.hidden, own_.normed.data());
            std::copy_n(sh_.beside.data() + at, m_.hidden, own_.product.data());
            join_norms(m_, o, own_.normed.data(), own_.product.data());
            add_to(m_, own_.normed.data(), o.l.mlp_after, member(b), own_.hidden.data() + at);
        }
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
        gate_up(o.l, o.shared_gate, o.shared_up, 0, share(o.shared_gate.blocks()), sh_.shared.data(), o.shared_gate.m.rows);
        if (thread_ == 0 && o.shared_router.present()) multiply(o.shared_router, in_, 0, 0, 1, sh_.shares.data(), 1);
        took(GATE_UP);
    }

    // Blocks of rows to which experts add: nothing yet, or what that MLP says.
    void begin_delta(const LayerOperands& o, Range blocks, int64_t row, int64_t size) {
        const bool apart = o.l.routed_after != nullptr;  // both are normed before they are added
        float* const said = apart ? sh_.beside.data() : sh_.delta.data();
        if (o.shared_down.present()) {
            in_.set(sh_.shared.data(), o.shared_gate.m.rows, s_.batch);
            multiply(o.shared_down, in_, 0, blocks.first, blocks.last, said, m_.hidden);
        }
        for (int b = 0; b < s_.batch && size > 0; ++b) {
            float* to = sh_.delta.data() + b * int64_t(m_.hidden) + row;
            if (apart || !o.shared_down.present()) std::fill_n(to, size, 0.f);
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
};

}  // namespace LLMCOMPRESS_ISA
