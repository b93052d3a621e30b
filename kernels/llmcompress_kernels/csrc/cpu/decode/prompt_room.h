// What the threads of a prompt share: the piece of it that goes through all layers at once.
#pragma once

#include <atomic>

#include "engine.h"

namespace llmcompress::decode {

// Tokens that go through all layers at once; what they leave between two products should stay in the last-level cache.
constexpr int64_t PIECE = 512;

// Bytes by which the rounded tokens of an expert may be moved so that each array begins on a cache line (place_activations).
constexpr size_t EXPERT_LINES = 4 * 64;

// A family's tables take more (tree.h).
inline int64_t piece_of(const Engine& e) { return e.m.members > 0 ? TREE_PASS : PIECE; }

// Slots of a routed layer, k to a token, and their order by experts.
struct Routed {
    std::vector<float> scores;            // [tokens, E]
    std::vector<int> chosen;              // [tokens, k], ascending
    std::vector<float> weights;           // [tokens, k]
    std::vector<int64_t> places;          // [tokens, k]: where a slot is among those of all experts
    std::vector<int64_t> tokens;          // [slots] by experts, whose they are
    std::vector<int64_t> first, next;     // [E + 1]: slots of each expert; where the next one goes
    std::vector<float> products;          // [slots, H] by experts
    struct Block {
        int64_t expert, block;
    };
    std::vector<Block> blocks;  // of tokens that are rounded together

    void make_room(int64_t count, int64_t experts, int64_t k, int64_t hidden) {
        const size_t slots = size_t(count * k);
        scores.resize(size_t(count * experts)), weights.resize(slots), chosen.resize(slots), places.resize(slots);
        tokens.resize(slots), first.resize(size_t(experts) + 1), products.resize(slots * size_t(hidden));
    }

    // from what the tokens chose
    void sort(int64_t slots, int64_t k, int64_t most) {
        std::fill(first.begin(), first.end(), 0);
        for (int64_t i = 0; i < slots; ++i) ++first[size_t(chosen[size_t(i)]) + 1];
        blocks.clear();
        for (size_t e = 0; e + 1 < first.size(); ++e) {
            for (int64_t b = 0; b * most < first[e + 1]; ++b) blocks.push_back({int64_t(e), b});
            first[e + 1] += first[e];
        }
        next = first;
        for (int64_t i = 0; i < slots; ++i) {
            const int64_t place = next[size_t(chosen[size_t(i)])]++;
            places[size_t(i)] = place;
            tokens[size_t(place)] = i / k;
        }
    }
};

struct PromptRoom {
    std::vector<float> hidden, normed, query, key, value, mixed, delta, gate, up;  // [tokens or slots, rows]
    std::vector<char> activations;
    Routed routed;
    std::atomic<int64_t> next[2] = {0, 0};  // task to take, of this kind and of the next

    PromptRoom(const Engine& e, const Prompt& p) {
        const Model& m = e.m;
        const int64_t tokens = std::min(p.count, piece_of(e)), slots = tokens * std::max(1, m.top_k);
        for (auto* rows : {&hidden, &normed, &delta}) rows->resize(size_t(tokens * m.hidden));
        for (auto* rows : {&query, &mixed}) rows->resize(size_t(tokens * m.heads * m.head_dim));
        for (auto* rows : {&key, &value}) rows->resize(size_t(tokens * m.key_value_heads * m.head_dim));
        for (auto* rows : {&gate, &up}) rows->resize(size_t(slots * e.intermediate));
        if (e.experts > 0) routed.make_room(tokens, e.experts, m.top_k, m.hidden);
        size_t most = 0;
        const auto room_for = [&](const Operand& o, int64_t count) {
            most = std::max(most, o.m.kind == TREE ? tree_activation_bytes(o.tree, count, std::max(2, p.planes))
                                                   : activation_bytes(o.first, count, p.planes));
        };
        for (const LayerOperands& l : e.layers) {
            for (const Operand* o : {&l.query, &l.key, &l.value, &l.output}) room_for(*o, tokens);
            for (const Operand* o : {&l.gate, &l.up, &l.down}) room_for(*o, tokens);
            for (const Operand* o : {&l.gate, &l.down})
                if (l.router.present()) room_for(*o, slots + e.experts * MAX_BATCH);
        }
        // the last expert's lines come on top
        activations.resize(most + size_t(e.experts + 1) * EXPERT_LINES);
    }
};

}  // namespace llmcompress::decode
