// What a step ends with: logits, or the largest of them alone.
#pragma once

#include "step_experts.h"

namespace LLMCOMPRESS_ISA {

class StepHead : public StepExperts {
  public:
    using StepExperts::StepExperts;

  protected:
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

  private:
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
};

}  // namespace LLMCOMPRESS_ISA
