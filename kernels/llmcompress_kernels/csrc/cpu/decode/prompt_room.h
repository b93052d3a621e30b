// What the threads of a prompt share: the piece of it that goes through all layers at once.
#pragma once

#include <atomic>

#include "engine.h"

namespace llmcompress::decode {

// Tokens that go through all layers at once; what they leave between two products should stay in the last-level cache.
constexpr int64_t PIECE = 512;

// A family's tables take more (tree.h).
inline int64_t piece_of(const Engine& e) { return e.m.members > 0 ? TREE_PASS : PIECE; }

// Tokens of a routed layer by experts: its slots, k to a token, in ascending order of their experts.
struct Routed {
    std::vector<float> scores, weights;  // [tokens, E], [tokens, k]
    std::vector<int> chosen;             // [tokens, k]
    std::vector<int64_t> tokens;         // [slots], whose
    std::vector<int64_t> places;         // [tokens, k]: where a token's slots are, by ascending expert
    std::vector<float> shares;           // the same: what they count
    std::vector<int64_t> first;          // [E + 1]: slots of each expert
    std::vector<float> products;         // [slots, H]
    struct Block {
        int expert;
        int64_t block;
    };
    std::vector<Block> blocks;  // of tokens that are rounded together

    void make_room(int64_t count, int64_t experts, int64_t k, int64_t hidden) {
        const size_t slots = size_t(count * k);
        scores.resize(size_t(count * experts)), weights.resize(slots), shares.resize(slots), chosen.resize(slots);
        tokens.resize(slots), places.resize(slots), first.resize(size_t(experts) + 1), products.resize(slots * size_t(hidden));
    }

    // from what the tokens chose
    void sort(int64_t count, int k, int most) {
        const int64_t experts = int64_t(first.size()) - 1;
        blocks.clear();
        std::vector<int64_t> taken(size_t(count), 0);
        int64_t slot = 0;
        for (int e = 0; e < experts; ++e) {
            first[size_t(e)] = slot;
            for (int64_t t = 0; t < count; ++t) {
                const int* mine = chosen.data() + t * k;
                const int* at = std::find(mine, mine + k, e);
                if (at == mine + k) continue;
                const size_t place = size_t(t * k + taken[size_t(t)]++);
                shares[place] = weights[size_t(at - chosen.data())];
                places[place] = slot;
                tokens[size_t(slot++)] = t;
            }
            for (int64_t b = 0; b * most < slot - first[size_t(e)]; ++b) blocks.push_back({e, b});
        }
        first[size_t(experts)] = slot;
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
            // every expert's begin on a line and fill whole blocks
            for (const Operand* o : {&l.gate, &l.down})
                if (l.router.present()) room_for(*o, slots + e.experts * (MAX_BATCH + LANES));
        }
        activations.resize(most + size_t(e.experts) * 5 * 64);
    }
};

}  // namespace llmcompress::decode
