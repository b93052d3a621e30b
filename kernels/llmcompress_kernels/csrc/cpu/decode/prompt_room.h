// What the threads of a prompt share: its hidden states, and what a piece of it leaves between two products.
#pragma once

#include <atomic>

#include "engine.h"

namespace llmcompress::decode {

// Tokens that go through a product at once; what they leave between two products should stay in the last-level cache.
constexpr int64_t PIECE = 512;

// Bytes by which the rounded tokens of an expert may be moved so that each array begins on a cache line (place_activations).
constexpr size_t EXPERT_LINES = 4 * 64;

// A family's tables take more (tree.h).
inline int64_t piece_of(const Engine& e) { return e.m.members > 0 ? TREE_PASS : PIECE; }

// The first prompt after which nothing is kept for the next one: new memory costs a page fault for every 4 KiB of it.
constexpr int64_t SPARED = 4 * PIECE + 1;

// Slots of a routed layer, k to a token, and those of a piece by experts. A slot with the expert E is empty.
struct Routed {
    std::vector<float> scores;            // [T, E]
    std::vector<float> shares;            // [T] of the MLP beside the experts
    std::vector<int> chosen;              // [T, k], ascending
    std::vector<float> weights;           // [T, k]
    std::vector<int64_t> places;          // [tokens, k]: where a slot is among those of all experts, -1 for an empty one
    std::vector<int64_t> tokens;          // [slots] by experts, whose they are
    std::vector<int64_t> slots;           // [slots] by experts, which of the piece's they are
    std::vector<int64_t> first, next;     // [E + 1]: slots of each expert; where the next one goes
    std::vector<float> products;          // [slots, H] by experts
    struct Block {
        int64_t expert, block;
    };
    std::vector<Block> blocks;  // of tokens that are rounded together

    void make_room(int64_t all, int64_t count, int64_t experts, int64_t k, int64_t hidden) {
        const size_t slots = size_t(count * k);
        grow(scores, size_t(all * experts)), grow(weights, size_t(all * k)), grow(chosen, size_t(all * k));
        grow(shares, size_t(all));
        grow(places, slots), grow(tokens, slots), grow(this->slots, slots), grow(first, size_t(experts) + 1), grow(products, slots * size_t(hidden));
    }

    // `slots` of them, those of a piece, from slot `begin` on
    void sort(int64_t begin, int64_t slots, int64_t k, int64_t most) {
        const int* const expert = chosen.data() + begin;
        const int empty = int(first.size()) - 1;
        std::fill(first.begin(), first.end(), 0);
        for (int64_t i = 0; i < slots; ++i)
            if (expert[i] != empty) ++first[size_t(expert[i]) + 1];
        blocks.clear();
        for (size_t e = 0; e + 1 < first.size(); ++e) {
            for (int64_t b = 0; b * most < first[e + 1]; ++b) blocks.push_back({int64_t(e), b});
            first[e + 1] += first[e];
        }
        next = first;
        for (int64_t i = 0; i < slots; ++i) {
            places[size_t(i)] = -1;
            if (expert[i] == empty) continue;
            const int64_t place = next[size_t(expert[i])]++;
            places[size_t(i)] = place;
            tokens[size_t(place)] = i / k, this->slots[size_t(place)] = i;
        }
    }
};

struct PromptRoom {
    std::vector<float> hidden, delta;                           // [T, H], the second to be added to the first
    std::vector<float> normed;                                  // [T, H] where experts read them, else [tokens, H] of a piece
    std::vector<float> query, key, value, head_gates, low, convolved, gates, steps, decays_low, decays, mixed, gate, up;  // [tokens or slots, rows] of a piece
    std::vector<float> words, aside, both;  // [T, H], [T, H] and [tokens, 2 H] where layers lay aside (decode.h)
    std::vector<float> beside;              // [tokens, H], what the MLP beside experts reads where it has a norm of its own
    std::vector<float> narrow;              // [T, W] of experts that read and write W numbers
    std::vector<float> ranks, adapted;      // [tokens, rows] of the two matrices of an adapter
    std::vector<char> activations;
    Routed routed;
    std::atomic<int64_t> next[2] = {0, 0};  // task to take, of this kind and of the next

    // For a prompt; vectors only grow.
    void prepare(const Engine& e, const Prompt& p) {
        for (auto& task : next) task.store(0, std::memory_order_relaxed);
        const Model& m = e.m;
        const int64_t tokens = std::min(p.count, piece_of(e)), slots = tokens * std::max(1, m.top_k);
        for (auto* rows : {&hidden, &delta}) grow(*rows, size_t(p.count * m.hidden));
        grow(normed, size_t((e.experts > 0 ? p.count : tokens) * m.hidden));
        grow(query, size_t(tokens * e.query_rows));
        grow(convolved, size_t(tokens * e.conv_rows)), grow(gates, size_t(tokens * e.gate_rows));
        grow(steps, size_t(tokens * e.step_rows));
        grow(decays_low, size_t(tokens * e.decay_rank)), grow(decays, size_t(tokens * e.decay_rows));
        grow(mixed, size_t(tokens * std::max(e.mixed_rows, e.conv_out)));
        grow(head_gates, size_t(tokens * e.head_gate_rows));
        if (e.joins) grow(beside, size_t(tokens * m.hidden));
        grow(low, size_t(tokens * e.rank));
        if (e.lays_aside) {
            for (auto* rows : {&words, &aside}) grow(*rows, size_t(p.count * m.hidden));
            grow(both, size_t(2 * tokens * m.hidden));
        }
        grow(narrow, size_t(p.count * e.entry_rows));
        grow(ranks, size_t(tokens * e.low_rows)), grow(adapted, size_t(tokens * e.high_rows));
        grow(key, size_t(tokens * e.key_rows)), grow(value, size_t(tokens * e.value_rows));
        for (auto* rows : {&gate, &up}) grow(*rows, size_t(std::max(slots * e.intermediate, tokens * e.shared_intermediate)));
        if (e.experts > 0) routed.make_room(p.count, tokens, e.experts, m.top_k, m.hidden);
        size_t most = 0;
        const auto room_for = [&](const Operand& o, int64_t count) {
            most = std::max(most, o.m.kind == TREE ? tree_activation_bytes(o.tree, count, std::max(2, p.planes))
                                                   : activation_bytes(o.first, count, o.planes(p.planes)));
        };
        for (const LayerOperands& l : e.layers) {
            for (const Operand* o : {&l.query, &l.query_down, &l.conv_in, &l.conv_key, &l.conv_value, &l.conv_gates, &l.gates_low, &l.key, &l.value, &l.output, &l.head_gates,
                                     &l.gate, &l.up, &l.down, &l.aside, &l.shared_gate, &l.shared_up, &l.shared_down})
                for (const Operand* part : {o, o->low, o->high})
                    if (part != nullptr && part->present()) room_for(*part, tokens);
            for (const Operand* o : {&l.gate, &l.down})
                if (l.router.present()) room_for(*o, slots + e.experts * MAX_BATCH);
        }
        // the last expert's lines come on top
        grow(activations, most + size_t(e.experts + 1) * EXPERT_LINES);
    }
};

}  // namespace llmcompress::decode
