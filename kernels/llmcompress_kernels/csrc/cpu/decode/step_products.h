// What the threads of a step share out and what each does for itself: products of a step's tokens, norms, what a sublayer adds. The
// base of step.h.
#pragma once

#include <initializer_list>

#include "elementwise.h"
#include "multiply.h"

namespace LLMCOMPRESS_ISA {

class StepProducts {
  public:
    StepProducts(Engine& engine, const Cache& cache, const Step& step, Barrier& barrier, int thread)
        : e_(engine), m_(engine.m), c_(cache), s_(step), sh_(engine.shared), own_(*engine.threads[size_t(thread)]),
          barrier_(barrier), thread_(thread), in_(own_.activations, step.planes),
          clock_(thread == 0 ? step.seconds : nullptr) {
        in_.of_members(step.members);
    }

  protected:
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

    void norm_all(const float* weight, const float* bias) {
        for (int b = 0; b < s_.batch; ++b)
            norm(m_, own_.hidden.data() + b * m_.hidden, weight, bias, member(b), own_.normed.data() + b * m_.hidden);
        in_.set(own_.normed.data(), m_.hidden, s_.batch);
        took(NORM);
    }

    // Norm of what a half of a layer reads, which may take the place of the hidden states, times `keeps` (decode.h).
    void norm_half(const Layer& l, const float* weight, const float* bias, float keeps) {
        norm_all(weight, bias);
        if (l.replaces == 0) return;
        for (int64_t i = 0; i < s_.batch * int64_t(m_.hidden); ++i) own_.hidden[size_t(i)] = keeps * own_.normed[size_t(i)];
    }

    // What a sublayer says, which other threads read too, through a norm where there are weights for it.
    void add_delta(const float* after = nullptr) {
        for (int b = 0; b < s_.batch; ++b) {
            float* delta = sh_.delta.data() + b * int64_t(m_.hidden);
            if (after != nullptr) delta = std::copy_n(delta, m_.hidden, own_.normed.data()) - m_.hidden;
            add_to(m_, delta, after, member(b), own_.hidden.data() + b * int64_t(m_.hidden));
        }
    }

    // What a half says: added to the hidden states, or laid aside.
    void take_delta(const LayerOperands& o, const float* after) {
        if (o.aside.present()) std::copy_n(sh_.delta.begin(), s_.batch * m_.hidden, own_.aside.begin());
        else add_delta(after);
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
