// Products of many tokens whose numbers have 16 bits (LLMCOMPRESS_PAIRS); part of lowbit.inc. A block of rows is unpacked once,
// 256 columns or so at a time, into a panel that stays in the first-level cache while all tokens pass over it: in block_rows
// every four tokens unpack the weight again, a sixth of all vector operations. Gives the results of block_rows bit for bit.
#pragma once

constexpr int PANEL_PAIRS = 128;   // of columns: 8 KB
constexpr int PANEL_TOKENS = 64;   // whose totals take 4 KB

struct Panel {
    alignas(64) uint32_t codes[PANEL_PAIRS][LANES];
    // of each chunk, of which the narrowest have a step of one word of 8 bits, two pairs
    alignas(64) float steps[PANEL_PAIRS / 2][LANES];
    alignas(64) float offsets[PANEL_PAIRS / 2][LANES];  // steps times zero points
    alignas(64) float totals[PANEL_TOKENS][LANES];
};

// Chunks [from, to) of block `block`, whose words begin at `p`, up to `end`. Returns where the next begin.
template <int BITS>
const uint32_t* fill_panel(const Weight& w, const Chunk* parts, int64_t from, int64_t to, int64_t block, const uint32_t* p,
                           const uint32_t* end, Panel& panel) {
    constexpr int WORDS = step_words(BITS), QUADS = step_columns(BITS) / 4;
    const uint16_t* const scales = w.scale + block * w.groups() * LANES;
    const uint32_t* const zeros = w.zero ? w.zero + block * w.zero_words() * LANES : nullptr;
    uint32_t(*codes)[LANES] = panel.codes;
    for (int64_t c = from; c < to; ++c) {
        const Floats steps = load_halves(scales + parts[c].group * LANES);
        const Floats zero = zeros ? zero_points<BITS>(zeros, parts[c].group) : spread(float(1 << (BITS - 1)));
        store_floats(panel.steps[c - from], steps);
        store_floats(panel.offsets[c - from], multiply(steps, zero));
        for (int s = 0; s < parts[c].steps; ++s, codes += 2 * QUADS) {
            uint32_t rest[WORDS * LANES];
            const Step<BITS> unpacked(whole_step<BITS>(p, end - p, rest));
            p += WORDS * LANES;
UNROLL
            for (int q = 0; q < QUADS; ++q) {
                const Ints quad = unpacked.quad(q);
                store_words(codes[2 * q], even_bytes(quad));
                store_words(codes[2 * q + 1], odd_bytes(quad));
            }
        }
    }
    return p;
}

// Chunks [from, to) of a panel for TOKENS of a block of PLACES tokens: adds to their totals.
template <int TOKENS, int PLACES>
void panel_tokens(const Chunk* parts, int64_t from, int64_t to, int per_step, const int8_t* x, const float* scale,
                  const float* sum, const Panel& panel, float (*totals)[LANES]) {
    const uint32_t(*codes)[LANES] = panel.codes;
    for (int64_t c = from; c < to; ++c) {
        Ints sums[TOKENS];
UNROLL
        for (int t = 0; t < TOKENS; ++t) sums[t] = zero_ints();
        for (int64_t left = int64_t(parts[c].steps) * per_step; left > 0; --left)
UNROLL
            for (int half = 0; half < 2; ++half, ++codes, x += PLACES * 4) {
                const Ints pair = load_words(*codes);
UNROLL
                for (int t = 0; t < TOKENS; ++t) sums[t] = dot_pair(sums[t], pair, x + t * 4);
            }
        const Floats steps = load_floats(panel.steps[c - from]), offset = load_floats(panel.offsets[c - from]);
UNROLL
        for (int t = 0; t < TOKENS; ++t) {
            const Floats total = load_floats(totals[t]);
            store_floats(totals[t], add_chunk<2>(to_floats(sums[t]), steps, offset, offset, scale[c * PLACES + t],
                                                 sum[c * PLACES + t], total));
        }
    }
}

// Row blocks [first, last) for many blocks of tokens (Activations::many).
template <int BITS>
void many_tokens(const Weight& w, const Chunk* parts, int64_t count, const Activations& a, int64_t first, int64_t last,
                 void* out, Type type, int64_t stride) {
    constexpr int PER_STEP = step_columns(BITS) / 4;
    Panel panel;
    // a last token that is alone in its block may lie in bytes
    const bool apart = !in_pairs(BITS, 2, 1) && a.tokens % MOST == 1;
    const int64_t together = a.tokens - apart;
    const int64_t words = w.words(), quads = Activations::quads(BITS, w.columns, w.group);
    for (int64_t block = first; block < last; ++block) {
        const uint32_t* const end = w.packed + (block + 1) * words * LANES;
        for (int64_t begin = 0; begin < together; begin += PANEL_TOKENS) {
            const int64_t now = together - begin < PANEL_TOKENS ? together - begin : PANEL_TOKENS;
            std::memset(panel.totals, 0, sizeof panel.totals);
            const uint32_t* p = end - words * LANES;
            int64_t done = 0;  // quads of the chunks before
            for (int64_t from = 0, to = 0; from < count; from = to) {
                int64_t held = 0;
                while (to < count && 2 * (held + parts[to].steps * PER_STEP) <= PANEL_PAIRS) held += parts[to++].steps * PER_STEP;
                p = fill_panel<BITS>(w, parts, from, to, block, p, end, panel);
                for (int64_t t = 0; t < now; t += MOST) {
                    const int64_t at = begin + t, left = a.tokens - at;
                    const int places = token_block(a.tokens, at / MOST, MOST);
                    const int8_t* const x = a.bytes + (at * quads + done * places) * 8;
                    const float *const scale = a.scale + at * count, *const sum = a.sum + at * count;
                    const auto run = [&]<int TOKENS, int PLACES>() {
                        panel_tokens<TOKENS, PLACES>(parts, from, to, PER_STEP, x, scale, sum, panel, panel.totals + t);
                    };
                    if (left == 1) run.template operator()<1, 1>();
                    else if (left == 2) run.template operator()<2, MOST>();
                    else if (left == 3) run.template operator()<3, MOST>();
                    else run.template operator()<MOST, MOST>();
                }
                done += held;
            }
            for (int64_t t = 0; t < now; ++t) store_outputs(load_floats(panel.totals[t]), out, (begin + t) * stride + block * LANES, type);
        }
        if (apart)
            block_rows<BITS, 1, 1, 2>(w, parts, count, a.bytes + together * quads * 8, a.scale + together * count,
                                      a.sum + together * count, block, 1,
                                      static_cast<char*>(out) + together * stride * (type == FP32 ? 4 : 2), type, stride);
    }
}
