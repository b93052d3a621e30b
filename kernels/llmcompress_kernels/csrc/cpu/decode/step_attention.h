// Attention of a step's tokens: by key-value heads and chunks of positions, whose findings are merged.
#pragma once

#include "attention.h"
#include "latent.h"
#include "step_products.h"

namespace LLMCOMPRESS_ISA {

class StepAttention : public StepProducts {
  public:
    using StepProducts::StepProducts;

  protected:
    void attention(const LayerOperands& o, int layer) {
        project({{&o.query, sh_.query.data()}, {&o.key, sh_.key.data()}, {&o.value, sh_.value.data()},
                 {&o.head_gates, sh_.head_gates.data()}});
        // all new keys and values come first: tokens of a step may belong to one sequence (a short prompt)
        const int held = o.l.key_value_heads;
        const Range pairs = share(s_.batch * held);
        for (int64_t i = pairs.first; i < pairs.last; ++i) append(o, layer, int(i / held), int(i % held));
        wait();
        const Range tasks = share(int64_t(s_.batch) * held * sh_.chunks);
        for (int64_t task = tasks.first; task < tasks.last; ++task) {
            const int pair = int(task / sh_.chunks), chunk = int(task % sh_.chunks);
            if (c_.kind == DENSE_FP32) attend_chunk<float>(o, layer, pair / held, pair % held, chunk);
            else attend_chunk<uint16_t>(o, layer, pair / held, pair % held, chunk);
        }
        took(ATTENTION);
        wait();
        const Widths w = widths(m_, o.l);
        const int width = o.l.heads * w.value;
        for (int b = 0; b < s_.batch; ++b)
            for (int h = 0; h < o.l.heads; ++h) {
                float* out = own_.mixed.data() + int64_t(b) * width + h * w.value;
                merge(o.l, b, h, w, out);
                close_gates(o, sh_.query.data() + b * o.query.m.rows, sh_.head_gates.data() + b * o.head_gates.m.rows, h, out);
            }
        finish_attention(o, own_.mixed.data(), width);
    }

    void latent_attention(const LayerOperands& o, int layer) {
        const bool low = o.query_down.present();
        project({low ? Product{&o.query_down, sh_.low.data()} : Product{&o.query, sh_.query.data()}, {&o.key, sh_.key.data()}});
        const Range tokens = share(s_.batch);
        for (int64_t b = tokens.first; b < tokens.last; ++b)
            put_latent(m_, o.l, c_, layer, s_.slots[b], s_.positions[b], sh_.key.data() + b * o.key.m.rows);
        if (low) low_queries(o);
        const Widths w = widths(m_, o.l);
        const Range heads = share(o.l.heads);
        for (int64_t h = heads.first; h < heads.last; ++h)
            absorb(m_, o, c_, sh_.query.data(), s_.batch, h, [&](int b) { return s_.positions[b]; },
                   sh_.absorbed.data() + h * w.row(), int64_t(o.l.heads) * w.row());
        took(QKV);
        wait();
        const int groups = tasks_of(m_, o.l);
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
        finish_attention(o, sh_.value.data(), o.l.heads * o.l.value_dim);
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

  private:
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
        const Widths w = widths(m_, l);
        const int head = group * TOGETHER_HEADS, count = std::min(TOGETHER_HEADS, l.heads - head);
        const float* queries = sh_.absorbed.data() + (int64_t(b) * l.heads + head) * w.row();
        attend_span<T>(l, layer, b, 0, chunk, count, queries, part_of(l, b, chunk, head));
    }

    // Where a chunk of token b leaves what it finds for a head.
    float* part_of(const Layer& l, int b, int chunk, int64_t head) {
        return sh_.parts.data() + ((int64_t(b) * sh_.chunks + chunk) * l.heads + head) * widths(m_, l).part();
    }

    // All that the chunks of token b have found for a head.
    void merge(const Layer& l, int b, int head, const Widths& w, float* out) {
        combine(part_of(l, b, 0, head), int64_t(l.heads) * w.part(), sh_.chunks, w.value, sink_of(l, head), out);
    }

    void append(const LayerOperands& o, int layer, int b, int head) {
        const Layer& l = o.l;
        const float* keys = sh_.key.data() + b * o.key.m.rows;
        const float* values = o.value.present() ? sh_.value.data() + b * o.value.m.rows : keys;
        const Cache& c = cache_of(c_, l);
        keep_head(m_, l, c, key_heads(l, keys, member(b)), values, head, head_base(l, c, layer, s_.slots[b], head),
                  s_.positions[b]);
    }

    template <class T>
    void attend_chunk(const LayerOperands& o, int layer, int b, int head, int chunk) {
        const Layer& l = o.l;
        const int group = l.heads / l.key_value_heads;
        const Heads queries = query_heads(l, sh_.query.data() + b * o.query.m.rows, member(b));
        for (int g = 0; g < group; ++g)
            turn(m_, queries, int64_t(head) * group + g, s_.positions[b], scale_of(m_, l, s_.positions[b]),
                 own_.queries.data() + g * widths(m_, l).row());
        attend_span<T>(l, layer, b, head, chunk, group, own_.queries.data(), part_of(l, b, chunk, int64_t(head) * group));
    }

    // A chunk of the positions that token b sees, for `group` query heads of a key-value head.
    template <class T>
    void attend_span(const Layer& l, int layer, int b, int head, int chunk, int group, const float* queries, float* out) {
        const Widths w = widths(m_, l);
        const Cache& c = cache_of(c_, l);
        const int64_t base = head_base(l, c, layer, s_.slots[b], head), length = s_.positions[b] + 1;
        // chunks begin at whole vectors of positions
        const int64_t from = seen_from(m_, l, length), begin = from / LANES, vectors = row_blocks(length) - begin;
        const int64_t first = std::max(from, (begin + vectors * chunk / sh_.chunks) * LANES);
        const int64_t last = std::min(length, (begin + vectors * (chunk + 1) / sh_.chunks) * LANES);
        if (first >= last) {
            for (int g = 0; g < group; ++g) {
                std::fill_n(out + g * w.part(), w.part(), 0.f);
                out[g * w.part()] = LOWEST;
            }
            return;
        }
        const T* keys = static_cast<const T*>(c.keys) + base * w.row();
        const T* values = w.latent ? keys : static_cast<const T*>(c.values) + base * w.apart();
        attend_heads<T>(group, keys, values, queries, w, first, last, own_.weights.data(), c_.positions + LANES,
                        limits_of(m_, l), out);
    }
};

}  // namespace LLMCOMPRESS_ISA
