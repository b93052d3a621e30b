// Native decode step: what Python and C++ agree on. Plain C structs, mirrored in llmcompress_kernels/decode.py.
//
// Legend: B tokens of one step (at most MAX_BATCH), H hidden, D head dimension, Dp = D rounded up to LANES,
// P positions a cache holds (a multiple of LANES), E experts, k experts per token, V vocabulary. Layers of a cache are those
// with attention.
#pragma once

#include <cstdint>

#include "llmcompress/barrier.h"
#include "llmcompress/lowbit.h"

namespace llmcompress::decode {

constexpr int MAX_BATCH = 8;  // tokens that one pass over the weights serves
constexpr int MAX_HEAD_DIM = 1024;  // of a head in the cache
constexpr int MAX_CHUNKS = 64;  // of the positions of one sequence
constexpr int MAX_TAPS = 8;  // of the convolution of a delta rule
constexpr int64_t DELTA_TOKENS = 64;  // of a prompt, whose queries, keys and values a delta rule has at hand

// How a matrix is stored: packed ones as lowbit.h says, rows padded to a multiple of LANES; dense ones row by row.
// A TREE is the sum of nodes (tree.h), each for the members below it; `data` points to `bits` of them.
enum Kind : int32_t { ABSENT = 0, DENSE_FP32 = 1, DENSE_BF16 = 2, PACKED = 3, TREE = 4 };

// y = factors (W x + bias) with W [rows, columns], or one for each expert, `expert_rows` rows apart. With an adapter of rank r, two
// matrices U [r, columns] and V [rows, r], V (U x) is added in the end.
struct Matrix {
    const void* data;
    const uint16_t* scale;  // PACKED
    const uint32_t* zero;   // PACKED, or null
    const float* bias;      // [experts, rows], of a tree [members, rows], or null
    const float* factors;   // [rows], or null for ones
    const Matrix* adapter;  // [2], or null
    int64_t rows, columns, expert_rows;
    int32_t kind;
    int32_t bits, group;
    int32_t input_bytes;  // of a PACKED one, 0 for what the call says
};

// What layers compute that keep recurrent states, in the library that knows these: every thread of a step or prompt enters
// with all others and leaves with them. `layer` counts such layers alone; norms are theirs, residual connections are not.
struct Mixers {
    struct Rows {
        const float* hidden;   // [B, H], the same for every thread
        const int32_t* slots;  // [B], the sequence of each, all different
        float* delta;          // [B, H], written
        int64_t batch;
    };
    struct Prompt {
        const float* hidden;  // [T, H]
        float* delta;         // [T, H], written
        int64_t count;        // T
        int32_t slot;         // of which sequence
        int32_t first, last;  // whether they begin its prompt, and end it: between parts no other prompt is read
    };
    enum Call : int32_t { STEP, PROMPT, MORE };  // MORE of a prompt
    // room for each; called by one thread before the others start, and `finish` after the last part of a prompt
    void (*prepare)(void* engine, int64_t tokens, Call what, int32_t threads);
    void (*step)(void* engine, const void* states, int32_t layer, const Rows& rows, Barrier& barrier, int thread);
    void (*prompt)(void* engine, const void* states, int32_t layer, const Prompt& all, Barrier& barrier, int thread);
    void (*finish)(void* engine);
};

// Those of a model, and what they keep of its sequences.
struct BoundMixers {
    const Mixers* run;
    void* engine;
    const void* states;
};

// What a state does with a token (reference/delta.py): the gated delta rule (arXiv 2412.06464), the same with a decay for each
// column of a key (arXiv 2510.26692), or lightning attention, which decays by constants and adds (arXiv 2401.04658).
enum Rule : int32_t { GATED_DELTA = 0, COLUMN_DELTA = 1, LIGHTNING = 2 };

// How a projection has what belongs to the heads: all queries, then all keys, then all values; or a key head's side by side, its
// gates behind them, or without gates. SPLIT: three projections have queries, keys and values.
enum Order : int32_t { APART = 0, WITH_GATES = 1, WITHOUT_GATES = 2, SPLIT = 3 };

// What a layer with such a state has beside its projections: heads with V columns each, K columns to each of the queries and keys
// that neighbouring ones share, and a state [K, V] for each.
struct Delta {
    const float* dt_bias;  // [heads], of COLUMN_DELTA [heads, K], of LIGHTNING null
    const float* decay;    // [heads], negative: a state decays by e to its power, times softplus(. + dt_bias) but for LIGHTNING
    const float* gain;     // [V], the gated norm's weight, or [heads, V]
    int32_t heads, key_heads, key_dim, value_dim;
    int32_t rule, order;
    int32_t sigmoid;  // whether gates open by a sigmoid, not by silu
    int32_t whole;    // whether the norm goes over all heads together, not each alone
    float most;     // of step sizes: 2 where a state may turn over what it holds of a key (arXiv 2411.12537), else 1
    float epsilon;  // of the gated norm

    int64_t values() const { return int64_t(heads) * value_dim; }
    int64_t channels() const { return 2 * int64_t(key_heads) * key_dim + values(); }  // C of the convolution
    // floats that a thread needs for DELTA_TOKENS tokens of a key head (delta.h)
    int64_t room() const {
        const int64_t numbers = 2 * int64_t(key_dim) + int64_t(heads / key_heads) * value_dim + 3;
        return DELTA_TOKENS * (numbers + (rule == COLUMN_DELTA ? 2 * int64_t(key_dim) : 0));
    }
};

// What keeps states of delta rules in low bits, in the library that knows these: a token goes to the value heads of a key head.
struct LowStates {
    struct Token {
        const float *value, *key, *query;  // [heads / key_heads, V], [K], [K]: unit key, scaled query
        const float *decay, *step;         // [heads / key_heads]
    };
    // `layer` counts layers with delta rules; out [heads / key_heads, V]
    void (*step)(const void* held, int32_t layer, int32_t slot, int32_t key_head, const Token& token, float* out);
    // float states after a prompt, [heads / key_heads, V / LANES, K, LANES], are rounded
    void (*round)(const void* held, int32_t layer, int32_t slot, int32_t key_head, const float* states);
    // every layer has taken in a token of each of these sequences
    void (*advance)(const void* held, const int32_t* slots, int64_t count);
};

struct BoundLowStates {
    const LowStates* run;
    const void* held;
};

// Of MLPs without a gate, beside those of lowbit.h: bent by two numbers of a layer, or cut at zero.
constexpr int32_t XIELU = 5, RELU = 6;

// How a token's k experts and their weights follow from the router's logits (routing.h).
enum Routing : int32_t { SOFTMAX = 0, SPARSEMIXER = 1, SIGMOID = 2 };

// Latent attention (DeepSeek-V2, arXiv 2405.04434): a token keeps C latents and R turned numbers, its key and, the first C of
// them, its value for all heads alike. A head's own keys and values are products with the latents; that of its keys is taken
// with the query instead (`absorb`), that of its values with the weighted sum of latents (`expand`).
//
// A short gated convolution (LFM2, arXiv 2511.23404): `conv_in` makes two gates and an input of each of H channels; the first gate
// times the input goes through L taps of its channel, the result times the second gate through `output`.
//
// A layer with a delta rule has a convolution, too: `conv_in` makes queries, and keys and values unless `conv_key` and `conv_value`
// do, `conv_gates` gates unless they are
// among these, `steps` step sizes of all heads and then their decays; `output` reads the result. Decays of columns are made by
// `decays` of what `decays_low` makes, gates there of what `gates_low` makes. Lightning attention has no `steps`, and one tap.
//
// A layer is a half before the MLP and an MLP or experts; one of both may be missing (Nemotron-H). A mixer and attention may stand
// side by side (Falcon-H1): both read the hidden states before the layer. A layer may lay aside what it says (Zamba2, arXiv
// 2411.15242): attention reads hidden states and embedding side by side, the MLP what attention says, `aside` what the MLP says,
// and the next layer's mixer the hidden states plus that; nothing of it is added to them. The MLP of a `parallel` layer reads the
// hidden states that attention read (Cohere, Phi).
//
// In a family of models norms have one row for each member. With a bias a norm is LayerNorm, without RMSNorm.
//
// Layers of a model may differ in their heads (Gemma 4, MiMo-V2-Flash, Laguna), those that share a cache not in what these leave
// there. Experts may have an input and a norm of their own, as the router and the MLP beside them (Gemma 4):
// h += mlp_after(routed_after(experts(mlp_norm(h))) + shared_after(MLP(shared_norm(h)))).
struct Layer {
    const float* attention_norm;  // [H], [2 H] of a layer that lays aside, or null
    const float* mlp_norm;        // [H] or null
    const float* attention_norm_bias;  // [H] or null
    const float* mlp_norm_bias;        // [H] or null
    const float* attention_after;  // [H], RMSNorm of what attention adds to the hidden states, or null
    const float* mlp_after;        // likewise of the MLP
    const float* query_norm;      // [D], or [heads, D] with `whole_norms` or `own_norms`, or null
    const float* key_norm;        // likewise, or [C] of latents
    const float* query_norm_bias;  // as the weights, then LayerNorm; or null
    const float* key_norm_bias;
    const float* value_norm;      // [D] of each head, or null
    const float* query_down_norm; // of what `query` reads
    const float* query_scales;    // [positions], factors of queries by where they stand, or null
    const float* router_norm;     // [H] of what the router reads, or null: what experts read
    const float* shared_norm;     // [H] likewise of the MLP beside them
    const float* routed_after;    // [H] of the sum of all that experts say, or null
    const float* shared_after;    // [H] of what the MLP beside them says, where `routed_after` is there, or null
    const float* expert_scales;   // [E], factors of the weights of experts, or null
    const float* router_correction;  // [E], added to weights for the choice alone, or null
    const float* sinks;           // [heads], scores of a position without a value (attention.h), or null
    const float* conv_weight;     // [L, H] or [L, C], taps of a convolution, the newest token's last
    const float* conv_bias;       // [H] or null
    const float* cosine;          // [positions, turned / 2]
    const float* sine;            // likewise
    const Delta* delta;           // null without a delta rule
    Matrix query, key, value, output;  // with latents `key` makes them [C + R, H], and there is no `value`; without latents and
                                       // `value` keys are values, too, before they are normed and turned
    Matrix head_gates;    // [heads V, H] or [heads, H]: gates of attention's results, or ABSENT
    Matrix query_down;    // what `query` reads in the place of hidden states, after a norm, or ABSENT
    Matrix absorb;        // [D - R, C] of each head, dense, read across, or ABSENT
    Matrix expand;        // [V, C] of each head
    Matrix conv_in;       // [3 H, H]: first gate, second gate, input of a short convolution in the place of attention, or ABSENT
    Matrix conv_key, conv_value;  // of a delta rule whose order is SPLIT: [key_heads K, H], [heads V, H]; or ABSENT
    Matrix conv_gates, steps;  // of a delta rule: [heads V, H], [2 heads, H] dense; or ABSENT
    Matrix gates_low;     // [R, H], what `conv_gates` reads in the place of hidden states, or ABSENT
    Matrix decays_low, decays;  // of COLUMN_DELTA: [R, H] and [heads K, R], dense; `steps` has step sizes alone then
    Matrix gate, up, down;  // the MLP or, where `router` is present, the experts; without a gate the first has the place of `gate`
    Matrix aside;           // [H, H] of a layer that lays aside, or ABSENT
    Matrix router;          // [E, H], dense, or ABSENT
    Matrix entry, exit;     // [W, H] and [H, W] of experts that read and write W numbers, dense, or ABSENT
    Matrix shared_gate, shared_up, shared_down;  // an MLP beside the experts, likewise, or ABSENT
    Matrix shared_router;   // [1, H], dense: its share by a sigmoid; ABSENT: all of it
    int32_t whole_norms;    // whether queries and keys are normed over all heads together, not each alone
    int32_t own_norms;      // whether every head has weights of its own
    int32_t norms_last;     // whether queries and keys are turned first and normed then, each head alone
    int32_t parallel;       // whether the MLP reads the hidden states before attention adds to them
    int32_t gates;          // whether each head's queries are followed by as many gates of its result
    int32_t softplus;       // whether `head_gates` open by softplus, not by a sigmoid
    int32_t replaces;       // whether what a half reads, times `attention_keeps` or `mlp_keeps`, takes the place of the hidden
                            // states before it adds to them (MiniMax-01)
    int32_t mixes;          // whether it has a mixer, which has its norm and projections elsewhere
    int32_t mixer;          // its number among the layers with mixers
    int32_t reads_aside;    // whether it reads what the layer before laid aside, too
    int32_t place;          // number among the layers with convolutions, those with windows, or all others with attention
    int32_t turned;         // columns of queries and keys that are turned to their positions, even: the first ones
    int32_t window;         // positions that a token sees, itself the last of them; 0 for all
    int32_t chunked;        // it sees those since the last multiple of `window` instead (Llama 4)
    int32_t heads, key_value_heads;
    int32_t head_dim, value_dim;  // columns of a head's queries and keys, and of its result; that of values without latents
    float output_scale;     // of the hidden states after it
    float attention_keeps, mlp_keeps;
    float positive, negative;  // of XIELU
};

struct Model {
    const Layer* layers;
    const float* final_norm;  // [H]
    const float* final_norm_bias;  // [H] or null
    const float* embedding_norm;  // [H] of embeddings, or null
    const float* position_rows;  // [positions, H], added to embeddings, or null
    Matrix embedding;         // [V, H], no TREE
    Matrix head;              // [V, H]
    Matrix screen;            // the head rounded to 8 bits, to find which rows can hold the largest logit, or ABSENT
    const float* screen_error;  // [V], bound of |head x - screen x| / |x|
    const Matrix* member_embeddings;  // of a family, or null
    const Matrix* member_heads;
    int32_t layer_count, hidden;
    int32_t neighbours;  // whether pairs that are turned stand side by side, not half of those columns apart
    int32_t latents, latent_width;  // C and C + R, or 0 where each head has keys and values
    int32_t taps;       // L of convolutions, 0 where there are none
    float latent_epsilon;  // of the norms of latents and of what `query` reads
    int32_t activation;  // of MLPs (lowbit.h): SILU, GELU, GELU_TANH, RELU, RELU2, GPT_OSS with a slope and a limit, or XIELU
                         // with its beta as slope and its epsilon as limit
    int32_t top_k, routing, members;
    int32_t renormalizes;  // whether weights of experts are divided by their sum
    int32_t scales_inputs;  // whether they multiply what experts read, not what they write (Llama 4); experts have no biases then
    int32_t groups, top_groups;  // E experts are so many groups of equal size; a token chooses from the best of them
    int32_t voters;  // 1: groups are ranked by their best expert, 2: by the sum of the best two
    float epsilon, attention_scale;
    float routed_scale;  // of the weights of experts
    float routed_floor;  // added to the sum that they are divided by
    float jitter;  // of SPARSEMIXER
    float attention_cap, logit_cap;  // x becomes cap tanh(x / cap); 0 for no cap
    float gate_slope, gate_limit;
    float embedding_scale, residual_scale;  // of embeddings, and of all that is added to the hidden states
};

// keys [layer, slot, kv head, P / LANES, Dp, LANES] and values [layer, slot, kv head, P, Vp]: the scores of sixteen
// positions are one vector, and neither product needs a horizontal sum. Latents are stored once, as keys [layer, slot, P, Dp]
// with D = C + R.
struct Cache {
    void* keys;
    void* values;
    int32_t kind;  // DENSE_FP32 or DENSE_BF16
    int32_t slots;
    int64_t positions;  // P
    const int64_t* begins;  // [slots], the position that is in a sequence's first row, a multiple of LANES; null: 0
    const Cache* windows;   // of layers with windows, or null: this one
    float* inputs;          // of convolutions, the last ones [layer, slot, L - 1, H or C], the newest last; or null
    float* states;          // of delta rules: [layer, slot, heads, V / LANES, K, LANES], or null
    const BoundLowStates* low;  // keeps them instead, or null; `states` are then those of the sequence whose prompt is read
};

struct Step {
    const int64_t* tokens;     // [B]
    const int64_t* positions;  // [B], where each token stands; the cache holds what comes before the step
    const int32_t* slots;      // [B], which sequence of the cache
    const int32_t* members;    // [B], whose tokens they are, equal ones side by side; null without a family
    float* logits;             // [B, V], or null where only the best is wanted and a screen is there
    int64_t* best;             // [B], index of the largest logit, or null
    double* seconds;           // [PHASES], time of thread 0 by phase, added to, or null
    const BoundMixers* mixers; // null where all layers have attention; tokens are then of different sequences
    float* hidden;             // [B, H]: input where first_layer > 0, output where last_layer < layer_count
    int32_t batch, planes, threads;
    int32_t first_layer, last_layer;  // half-open; a whole step is [0, layer_count)
    int32_t reserved;
};

// Called between a layer's choice of experts and its experts, once for all tokens: scores [T, E] of the router, weights [T, k]
// and experts chosen [T, k], ascending, to be changed in place; E empties a slot. Runs on the thread that called.
using Reroute = void (*)(int32_t layer, const float* scores, float* weights, int32_t* chosen);

// Tokens of one sequence, one after the other.
struct Prompt {
    const int64_t* tokens;  // [T]
    float* hidden;          // [H], written: the last token's after all layers
    double* seconds;        // [PHASES], as of a step, waiting for others left in what they do
    Reroute reroute;        // or null
    const BoundMixers* mixers;  // as of a step
    int64_t count;          // T
    int64_t start;          // position of the first; the cache holds what comes before
    int32_t slot, member, planes, threads;
    int32_t last, reserved;  // whether the prompt ends here
};

enum Phase : int { NORM, QKV, ATTENTION, OUTPUT, MIXER, ROUTER, GATE_UP, DOWN, HEAD, WAIT, PHASES };

}  // namespace llmcompress::decode
