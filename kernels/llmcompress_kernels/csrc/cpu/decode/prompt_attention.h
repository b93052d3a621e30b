// Attention of a prompt's tokens: by heads and eight tokens, over the keys and values that the cache holds by then.
#pragma once

#include "attention.h"
#include "latent.h"
#include "prompt_products.h"

namespace LLMCOMPRESS_ISA {

constexpr int64_t QUERIES = 8;     // tokens that attend together
constexpr int64_t ATTENDING = 16;  // tokens to a task

class PromptAttention : public PromptProducts {
  public:
    PromptAttention(Engine& engine, const Cache& cache, const Prompt& prompt, PromptRoom& room, Barrier& barrier, int thread)
        : PromptProducts(engine, cache, prompt, room, barrier, thread) {
        queries_.resize(size_t(QUERIES * e_.most_row));
        weights_.resize(size_t(QUERIES * (padded(p_.start + p_.count) + 2 * LANES)));
        parts_.resize(size_t(QUERIES * e_.most_part));
        sums_.resize(size_t(QUERIES * m_.latents));
    }

  protected:
    // Norm of a half's hidden states, of which a mixer beside it has read the same.
    void make_first(const LayerOperands& o, int index, int64_t t) {
        if (o.l.mixes == 0) add_before(t, index);
        if (o.aside.present()) return norm_both(o.l, t);
        norm_hidden(o.l, t, o.l.attention_norm, o.l.attention_norm_bias, o.l.attention_keeps);
        if (o.l.mixes != 0) add_delta(t, nullptr);
    }

    // Hidden states and embedding side by side, in place.
    void norm_both(const Layer& l, int64_t t) {
        const int64_t wide = 2 * int64_t(m_.hidden);
        float* const both = room_.both.data() + t * wide;
        std::copy_n(row_of(room_.words, t), m_.hidden, std::copy_n(hidden(t), m_.hidden, both));
        norm(both, l.attention_norm, nullptr, int(wide), m_.epsilon, both);
    }

    void attention(const LayerOperands& o, int index) {
        const Product query = {&o.query, room_.query.data()}, key = {&o.key, room_.key.data()};
        const Product value = {&o.value, room_.value.data()}, low = {&o.query_down, room_.low.data()};
        const bool is_low = o.query_down.present();
        const float* from = o.aside.present() ? room_.both.data() : normed(0);
        const bool dense = o.head_gates.m.kind == DENSE_FP32 || o.head_gates.m.kind == DENSE_BF16;
        const Product gates = {dense ? &absent_ : &o.head_gates, room_.head_gates.data()};
        project({is_low ? low : query, key, value, gates}, from, QKV, [&](int64_t t) { make_first(o, index, t); });
        if (dense) each(blocks(), [&](int64_t b) { multiply_few(o.head_gates, b, gates.out); });
        if (is_low)
            project({query}, low.out, QKV, [&](int64_t t) { norm_low(m_, o, low.out + t * o.query_down.m.rows); });
        if (o.absorb.present()) latent_attention(o, o.l.place);
        else head_attention(o, o.l.place);
        project({{&o.output, delta(0)}}, room_.mixed.data(), OUTPUT, [](int64_t) {});
    }

  private:
    // A dense matrix of few rows, of which normed hidden states of a block of tokens are the inputs.
    void multiply_few(const Operand& o, int64_t b, float* out) {
        Input in(scratch_, p_.planes);
        in.set(normed(begin(b)), m_.hidden, int(end(b) - begin(b)));
        multiply(o, in, 0, 0, o.blocks(), out + begin(b) * o.m.rows, o.m.rows);
    }

    void head_attention(const LayerOperands& o, int layer) {
        const Layer& l = o.l;
        const int64_t heads = l.key_value_heads;
        const Cache& c = cache_of(c_, l);
        each(blocks(), [&](int64_t b) {
            for (int64_t t = begin(b); t < end(b); ++t) {
                const float* row = room_.key.data() + t * o.key.m.rows;
                const float* values = o.value.present() ? room_.value.data() + t * o.value.m.rows : row;
                const Heads keys = key_heads(l, row, p_.member);
                for (int64_t head = 0; head < heads; ++head)
                    keep_head(m_, l, c, keys, values, head, head_base(l, c, layer, p_.slot, head), position(t));
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
        each_part(o.l.heads, [&](int64_t head, int64_t first, int64_t end) {
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
        const Layer& l = o.l;
        const Widths w = widths(m_, l);
        Input in(scratch_, p_.planes);
        absorb(m_, o, c_, room_.query.data() + t * l.heads * l.head_dim, tokens, head,
               [&](int i) { return position(t + i); }, queries_.data(), w.row());
        const T* keys = static_cast<const T*>(c_.keys) + head_base(l, c_, layer, p_.slot, 0) * w.row();
        if (tokens == QUERIES) attend_row<T, QUERIES>(l, keys, t, 0);
        else for (int i = 0; i < tokens; ++i) attend_row<T, 1>(l, keys, t, i);
        for (int i = 0; i < tokens; ++i) combine(parts_.data() + i * w.part(), 0, 1, w.value, nullptr, sums_.data() + i * w.value);
        expand(m_, o, in, sums_.data(), tokens, head, room_.mixed.data() + t * l.heads * l.value_dim);
    }

    // Row i of the queries from token t on, and G - 1 further ones.
    template <class T, int G>
    void attend_row(const Layer& l, const T* keys, int64_t t, int i) {
        const Widths w = widths(m_, l);
        const int64_t seen = position(t + i) + G;
        attend<T, G, 1>(keys, keys, queries_.data() + i * w.row(), w, 0, seen, weights_.data(), padded(seen) + 2 * LANES,
                        {}, parts_.data() + i * w.part());
    }

    // Tokens [first, last) of the query heads that share a key-value head.
    template <class T>
    void attend_tokens(const LayerOperands& o, int layer, int64_t head, int64_t first, int64_t last) {
        const Cache& c = cache_of(c_, o.l);
        const Widths w = widths(m_, o.l);
        const int64_t group = o.l.heads / o.l.key_value_heads, base = head_base(o.l, c, layer, p_.slot, head);
        const T* keys = static_cast<const T*>(c.keys) + base * w.row();
        const T* values = static_cast<const T*>(c.values) + base * w.apart();
        for (int64_t h = head * group; h < (head + 1) * group; ++h) {
            int64_t t = first;
            for (; t + QUERIES <= last; t += QUERIES) attend_at<T, QUERIES>(o, h, t, keys, values);
            for (; t < last; ++t) attend_at<T, 1>(o, h, t, keys, values);
        }
    }

    template <class T, int G>
    void attend_at(const LayerOperands& o, int64_t head, int64_t t, const T* keys, const T* values) {
        const Layer& l = o.l;
        const auto row = [&](int g) { return room_.query.data() + (t + g) * o.query.m.rows; };
        const Widths w = widths(m_, l);
        const int64_t at = t * l.heads + head, seen = position(t) + G;
        for (int g = 0; g < G; ++g)
            turn(m_, query_heads(l, row(g), p_.member), head, position(t) + g, scale_of(m_, l, position(t) + g),
                 queries_.data() + g * w.row());
        attend<T, G, 1>(keys, values, queries_.data(), w, seen_from(m_, l, seen - G + 1), seen, weights_.data(),
                        padded(seen) + 2 * LANES, limits_of(m_, l), parts_.data());
        for (int g = 0; g < G; ++g) {
            float* out = room_.mixed.data() + (at + g * l.heads) * w.value;
            combine(parts_.data() + g * w.part(), 0, 1, w.value, sink_of(l, head), out);
            close_gates(o, row(g), room_.head_gates.data() + (t + g) * o.head_gates.m.rows, head, out);
        }
    }

    const Operand absent_;
    std::vector<float> queries_, weights_, parts_, sums_;
};

}  // namespace LLMCOMPRESS_ISA
