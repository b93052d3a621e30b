// A model made ready: chunk lists of its packed matrices, buffers of its threads. Compiled for any machine.
#pragma once

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <tuple>
#include <vector>

#include "decode.h"
#include "llmcompress/tree.h"

namespace llmcompress::decode {

inline int64_t row_blocks(int64_t rows) { return (rows + LANES - 1) / LANES; }
inline int64_t padded(int64_t n) { return row_blocks(n) * LANES; }

// What a head leaves in the cache, and attention of it.
struct Widths {
    int key, value;  // columns of a key and of a value
    bool latent;     // whether keys are rows, and values the first columns of these

    int row() const { return int(padded(key)); }  // of a key in the cache, and of a query
    int apart() const { return int(padded(latent ? key : value)); }  // from a value to the next
    int part() const { return LANES + int(padded(value)); }  // of what a chunk leaves for one query head
};

inline Widths widths(const Model& m, const Layer& l) {
    if (m.latents > 0) return {m.latent_width, m.latents, true};
    return {l.head_dim, l.value_dim, false};
}

// Query heads that attend together share keys, and are so many tasks of a token.
constexpr int TOGETHER_HEADS = 4;
inline int tasks_of(const Model& m, const Layer& l) {
    return m.latents > 0 ? (l.heads + TOGETHER_HEADS - 1) / TOGETHER_HEADS : l.key_value_heads;
}

// A matrix with what its kernel wants to know.
struct Operand {
    Matrix m{};
    Weight first{};  // of the first expert
    const std::vector<Chunk>*wide = nullptr, *narrow = nullptr;  // chunks of several planes and of one
    const Operand *low = nullptr, *high = nullptr;  // its adapter
    TreeShape tree{};  // of a TREE

    // bytes of an input, where the call says `otherwise`
    int planes(int otherwise) const { return m.input_bytes > 0 ? m.input_bytes : otherwise; }
    const std::vector<Chunk>& chunks(int planes) const { return planes == 1 ? *narrow : *wide; }
    const TreeNode* nodes() const { return static_cast<const TreeNode*>(m.data); }
    bool present() const { return m.kind != ABSENT; }
    int64_t blocks() const { return row_blocks(m.rows); }
    Weight weight(int64_t expert) const { return first.from(expert * m.expert_rows); }
};

struct LayerOperands {
    Layer l;
    Operand query, key, value, output, head_gates, gate, up, down, router;
    Operand query_down, absorb, expand, conv_in, aside, entry, exit, conv_key, conv_value, conv_gates, steps;
    Operand gates_low, decays_low, decays;
    Operand shared_gate, shared_up, shared_down, shared_router;

    bool attends() const { return query.present(); }
    bool has_mlp() const { return gate.present(); }
    // whether something comes before an MLP
    bool begins() const { return attends() || conv_in.present() || l.mixes != 0; }
    // of what its last half adds to the hidden states
    const float* after() const { return has_mlp() ? l.mlp_after : l.attention_after; }
};

template <class T>
inline void grow(std::vector<T>& v, size_t size) {
    if (v.size() < size) v.resize(size);
}

// What one thread works in. Vectors only grow.
struct Buffers {
    std::vector<float> words, aside, both;  // where layers lay aside: embeddings, what lies there, two of these rows together
    std::vector<float> hidden, normed, mixed, product, gated, queries, weights, routed, ranked, low, delta;
    std::vector<int64_t> rows;
    std::vector<int> chosen;
    std::vector<char> activations;
};

// What the threads of a step share.
struct Shared {
    std::vector<float> query, key, value, head_gates, low, convolved, gates, steps, decays_low, decays, absorbed, parts, inner, shared, narrow, sums, delta, beside, aside;
    std::vector<float> scores, shares, rough, bounds;
    std::vector<int64_t> best;
    int chunks = 1;
};

class Engine {
  public:
    explicit Engine(const Model& model) : m(model) {
        head = operand(m.head);
        screen = operand(m.screen);
        for (int i = 0; m.member_heads != nullptr && i < m.members; ++i) heads.push_back(operand(m.member_heads[i]));
        layers.reserve(size_t(m.layer_count));
        for (int i = 0; i < m.layer_count; ++i) {
            const Layer& l = m.layers[i];
            layers.push_back({l, operand(l.query), operand(l.key), operand(l.value), operand(l.output),
                              operand(l.head_gates), operand(l.gate), operand(l.up), operand(l.down), operand(l.router),
                              operand(l.query_down), operand(l.absorb), operand(l.expand), operand(l.conv_in), operand(l.aside),
                              operand(l.entry), operand(l.exit), operand(l.conv_key), operand(l.conv_value), operand(l.conv_gates), operand(l.steps), operand(l.gates_low),
                              operand(l.decays_low), operand(l.decays),
                              operand(l.shared_gate), operand(l.shared_up), operand(l.shared_down), operand(l.shared_router)});
            intermediate = std::max(intermediate, l.gate.rows);
            shared_intermediate = std::max(shared_intermediate, l.shared_gate.rows);
            experts = std::max(experts, l.router.rows);
            rank = std::max({rank, l.query_down.rows, l.gates_low.rows});
            entry_rows = std::max(entry_rows, l.entry.rows);
            lays_aside = lays_aside || l.aside.kind != ABSENT;
            conv_rows = std::max(conv_rows, l.conv_in.rows);
            query_rows = std::max(query_rows, l.query.rows);
            if (l.query.kind != ABSENT) attend(l);
            joins = joins || l.routed_after != nullptr;
            if (l.conv_in.kind != ABSENT) conv_out = std::max<int64_t>(conv_out, l.delta == nullptr ? m.hidden : l.delta->values());
            if (l.delta == nullptr) continue;
            gate_rows = std::max(gate_rows, l.conv_gates.rows), step_rows = std::max(step_rows, l.steps.rows);
            key_rows = std::max(key_rows, l.conv_key.rows), value_rows = std::max(value_rows, l.conv_value.rows);
            delta_room = std::max(delta_room, l.delta->room());
            decay_rank = std::max(decay_rank, l.decays_low.rows), decay_rows = std::max(decay_rows, l.decays.rows);
            if (l.delta->whole != 0) mixed_rows = std::max(mixed_rows, l.delta->values());
        }
    }

    // Room for a step; chunks of positions so that no thread idles for long. A chunk below 64 positions is not worth
    // its merging.
    void prepare(const Step& s, const Cache& c) {
        const size_t b = size_t(s.batch), wide = size_t(padded(intermediate));
        int64_t longest = 0;
        for (int i = 0; i < s.batch; ++i) longest = std::max(longest, s.positions[i] + 1);
        const int tasks = s.batch * std::max(1, least_tasks);
        const int wanted = tasks % s.threads == 0 ? 1 : (2 * s.threads + tasks - 1) / tasks + 1;
        shared.chunks = int(std::max<int64_t>(1, std::min<int64_t>({wanted, MAX_CHUNKS, longest / 64})));
        grow(shared.query, b * size_t(padded(std::max(query_rows, conv_out))));
        grow(shared.key, b * size_t(padded(key_rows)));
        grow(shared.value, b * size_t(padded(value_rows)));
        grow(shared.head_gates, b * size_t(padded(head_gate_rows)));
        grow(shared.low, b * size_t(padded(rank)));
        grow(shared.convolved, b * size_t(padded(conv_rows)));
        grow(shared.gates, b * size_t(padded(gate_rows)));
        grow(shared.steps, b * size_t(padded(step_rows)));
        grow(shared.decays_low, b * size_t(padded(decay_rank)));
        grow(shared.decays, b * size_t(padded(decay_rows)));
        grow(shared.absorbed, b * size_t(absorbed_rows));
        grow(shared.parts, b * size_t(shared.chunks * part_rows));
        grow(shared.delta, b * size_t(padded(m.hidden)));
        grow(shared.beside, joins ? b * size_t(padded(m.hidden)) : 0);
        grow(shared.aside, lays_aside ? b * size_t(padded(m.hidden)) : 0);
        grow(shared.inner, b * size_t(std::max(1, m.top_k)) * wide);
        grow(shared.shared, b * size_t(padded(shared_intermediate)));
        grow(shared.shares, b);
        for (auto* rows : {&shared.narrow, &shared.sums}) grow(*rows, b * size_t(padded(entry_rows)));
        grow(shared.scores, b * size_t(padded(experts)));
        grow(shared.best, b * size_t(s.threads));
        grow(shared.bounds, b * size_t(s.threads));
        if (s.logits == nullptr) grow(shared.rough, b * size_t(m.head.rows));
        while (threads.size() < size_t(s.threads)) threads.push_back(std::make_unique<Buffers>());
        for (int t = 0; t < s.threads; ++t) {
            Buffers& own = *threads[size_t(t)];
            grow(own.hidden, b * size_t(m.hidden));
            grow(own.normed, b * size_t(lays_aside ? 2 * m.hidden : m.hidden));
            for (auto* rows : {&own.words, &own.aside}) grow(*rows, lays_aside ? b * size_t(m.hidden) : 0);
            grow(own.both, lays_aside ? 2 * b * size_t(m.hidden) : 0);
            grow(own.mixed, b * size_t(mixed_rows));
            grow(own.product, b * size_t(padded(std::max<int64_t>({intermediate, shared_intermediate, m.hidden}))));
            grow(own.gated, b * wide);
            grow(own.low, b * size_t(rank));
            grow(own.delta, size_t(delta_room));
            grow(own.queries, size_t(group_row));
            grow(own.weights, size_t(TOGETHER_HEADS) * size_t(c.positions + LANES));
            grow(own.routed, b * size_t(std::max(1, m.top_k)));
            grow(own.ranked, 2 * size_t(experts));
            grow(own.chosen, b * size_t(std::max(1, m.top_k)));
            grow(own.rows, b);
            grow(own.activations, activation_size_);
        }
    }

    // bytes of the rounded inputs of up to MAX_BATCH tokens, of any matrix
    size_t activation_size() const { return activation_size_; }

    Model m;
    Operand head, screen;
    std::vector<Operand> heads;  // of the members of a family
    std::vector<LayerOperands> layers;
    Shared shared;
    std::vector<std::unique_ptr<Buffers>> threads;
    int64_t intermediate = 0, shared_intermediate = 0, experts = 0, rank = 0, query_rows = 0, entry_rows = 0;
    int64_t conv_rows = 0, conv_out = 0, gate_rows = 0, step_rows = 0;  // of convolutions and delta rules
    int64_t decay_rank = 0, decay_rows = 0;  // of what makes decays of columns
    int64_t delta_room = 0;  // floats that a delta rule needs
    int64_t low_rows = 0, high_rows = 0;  // of adapters
    // of attention, the most of any layer: numbers that its products and its parts make for a token, queries of a group, results
    int64_t key_rows = 0, value_rows = 0, head_gate_rows = 0, absorbed_rows = 0, part_rows = 0, group_row = 0, mixed_rows = 0;
    int64_t most_row = 0, most_part = 0;  // of one head
    int least_tasks = 0;
    bool lays_aside = false, joins = false;

  private:
    void attend(const Layer& l) {
        const Widths w = widths(m, l);
        key_rows = std::max(key_rows, l.key.rows);
        value_rows = std::max<int64_t>({value_rows, l.value.rows, w.latent ? int64_t(l.heads) * l.value_dim : 0});
        head_gate_rows = std::max(head_gate_rows, l.head_gates.rows);
        if (w.latent) absorbed_rows = std::max(absorbed_rows, int64_t(l.heads) * w.row());
        most_row = std::max<int64_t>(most_row, w.row()), most_part = std::max<int64_t>(most_part, w.part());
        part_rows = std::max(part_rows, int64_t(l.heads) * w.part());
        group_row = std::max(group_row, int64_t(l.heads / l.key_value_heads) * w.row());
        mixed_rows = std::max<int64_t>({mixed_rows, int64_t(l.heads) * l.value_dim, w.value});
        least_tasks = least_tasks == 0 ? tasks_of(m, l) : std::min(least_tasks, tasks_of(m, l));
    }

    Operand operand(const Matrix& m) {
        Operand o;
        o.m = m;
        if (m.adapter != nullptr) {
            o.low = &adapters_.emplace_back(operand(m.adapter[0])), o.high = &adapters_.emplace_back(operand(m.adapter[1]));
            low_rows = std::max(low_rows, padded(m.adapter[0].rows)), high_rows = std::max(high_rows, padded(m.adapter[1].rows));
        }
        if (m.kind == TREE) {
            const auto& parts = tree_plan(m.columns, m.group);
            o.tree = tree_shape(m.columns, m.group, int64_t(parts.size()), parts.data(), o.nodes(), m.bits);
            activation_size_ = std::max(activation_size_, tree_activation_bytes(o.tree, MAX_BATCH, 3));
        }
        if (m.kind != PACKED) return o;
        o.first = {static_cast<const uint32_t*>(m.data), m.scale, m.zero, padded(m.rows), m.columns, m.group, m.bits};
        o.wide = &plan(m, 2), o.narrow = &plan(m, 1);
        activation_size_ = std::max(activation_size_, activation_bytes(o.first, MAX_BATCH, 3));
        return o;
    }

    const std::vector<Chunk>& plan(const Matrix& m, int planes) {
        auto& parts = plans_[std::make_tuple(m.bits, m.group, m.columns, planes)];
        if (parts.empty()) {
            parts.resize(size_t(llmcompress::chunk_count(m.group, m.columns, planes)));
            llmcompress::chunks(m.bits, m.group, m.columns, parts.data(), planes);
        }
        return parts;
    }

    const std::vector<TreeChunk>& tree_plan(int64_t columns, int64_t group) {
        auto& parts = tree_plans_[std::make_pair(columns, group)];
        if (parts.empty()) {
            parts.resize(size_t(tree_chunks(columns, group, nullptr)));
            tree_chunks(columns, group, parts.data());
        }
        return parts;
    }

    std::deque<Operand> adapters_;
    std::map<std::pair<int64_t, int64_t>, std::vector<TreeChunk>> tree_plans_;
    std::map<std::tuple<int32_t, int32_t, int64_t, int>, std::vector<Chunk>> plans_;
    size_t activation_size_ = 0;
};

}  // namespace llmcompress::decode
