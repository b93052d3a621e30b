// What the threads of a prompt share: the piece of it that goes through all layers at once.
#pragma once

#include <atomic>

#include "engine.h"

namespace llmcompress::decode {

// Tokens that go through all layers at once; what they leave between two products should stay in the last-level cache.
constexpr int64_t PIECE = 512;

struct PromptRoom {
    std::vector<float> hidden, normed, query, key, value, mixed, delta, gate, up;  // [tokens, rows]
    std::vector<char> activations;
    std::atomic<int64_t> next[2] = {0, 0};  // task to take, of this kind and of the next

    PromptRoom(const Engine& e, const Prompt& p) {
        const Model& m = e.m;
        const size_t tokens = size_t(std::min(p.count, PIECE)), heads = size_t(m.heads * m.head_dim);
        const size_t pairs = size_t(m.key_value_heads * m.head_dim), inner = size_t(e.intermediate);
        for (auto* rows : {&hidden, &normed, &delta}) rows->resize(tokens * size_t(m.hidden));
        for (auto* rows : {&query, &mixed}) rows->resize(tokens * heads);
        for (auto* rows : {&key, &value}) rows->resize(tokens * pairs);
        for (auto* rows : {&gate, &up}) rows->resize(tokens * inner);
        size_t most = 0;
        for (const LayerOperands& l : e.layers)
            for (const Operand* o : {&l.query, &l.key, &l.value, &l.output, &l.gate, &l.up, &l.down})
                most = std::max(most, activation_bytes(o->first, int64_t(tokens), p.planes));
        activations.resize(most);
    }
};

}  // namespace llmcompress::decode
