// Products of int8 activations with 8-bit codes for many tokens on AVX2; part of lowbit.inc. No instruction multiplies and adds
// bytes whose products need 16 bits: by bytes a code goes as two nibbles, nine instructions for 32 products. Here both sides are
// widened to 16 bits beforehand, so that 16 products take a multiplication (vpmaddwd) and an addition, and what else there is to
// do is shared: codes, less their zero points, are widened once for all tokens, into a panel that stays in the first-level
// cache, inputs once for all rows of the panel, and a tile of 32 rows and three tokens, whose sums are twelve of sixteen
// registers, takes three loads beside 24 instructions. Sums are whole numbers: results are those of block_rows bit for bit.
//
// A word holds four columns of a row. Its even and its odd columns are two pairs, `half` 0 and 1, on either side.
#pragma once

constexpr int PAIR_ROWS = 4;     // blocks of rows of a panel, of which two are multiplied together
constexpr int PAIR_QUADS = 32;   // of one block of rows: 4 KB, two chunks of 64 columns
constexpr int PAIR_INPUTS = 12;  // tokens that are widened together
constexpr int PAIR_TOKENS = 96;  // whose totals wait here where outputs are not fp32

struct PairPanel {
    alignas(64) int16_t codes[PAIR_ROWS / 2][PAIR_QUADS][2][2][2 * LANES];  // [half][block of rows]
    alignas(64) float steps[PAIR_ROWS][PAIR_QUADS][LANES];  // of each chunk; one of the narrowest is a quad
    alignas(64) int16_t inputs[PAIR_INPUTS / MOST][2][PAIR_QUADS][MOST][2];
    float scales[PAIR_QUADS][PAIR_INPUTS];  // of inputs, by chunks
    alignas(64) float nowhere[LANES];  // totals of rows and tokens that are not there
};

// Chunks [from, to) of a block of rows, whose words begin at `p`, into row `r` of the panel.
inline void fill_pairs(const Weight& w, const Chunk* parts, int64_t from, int64_t to, int64_t block, const uint32_t* p, int r,
                       PairPanel& panel) {
    const uint16_t* const scales = w.scale + block * w.groups() * LANES;
    const uint32_t* const zeros = w.zero ? w.zero + block * w.zero_words() * LANES : nullptr;
    const __m256i even = _mm256_set1_epi32(0x00ff00ff);
    int16_t* to_codes = panel.codes[r / 2][0][0][r % 2];
    for (int64_t c = from; c < to; ++c) {
        store_floats(panel.steps[r][c - from], load_halves(scales + parts[c].group * LANES));
        const Floats zero = zeros ? zero_points<8>(zeros, parts[c].group) : spread(128.0f);
        const Ints whole = {_mm256_cvtps_epi32(zero.a), _mm256_cvtps_epi32(zero.b)}, less = either(whole, shift_left(whole, 16));
        for (int s = 0; s < parts[c].steps; ++s, p += LANES, to_codes += 8 * LANES) {
            const Ints words = load_words(p);
            prefetch_second_level(p + 64 * LANES);
            __m256i* const lines = reinterpret_cast<__m256i*>(to_codes);
            _mm256_store_si256(lines, _mm256_sub_epi16(_mm256_and_si256(words.a, even), less.a));
            _mm256_store_si256(lines + 1, _mm256_sub_epi16(_mm256_and_si256(words.b, even), less.b));
            _mm256_store_si256(lines + 4, _mm256_sub_epi16(_mm256_srli_epi16(words.a, 8), less.a));
            _mm256_store_si256(lines + 5, _mm256_sub_epi16(_mm256_srli_epi16(words.b, 8), less.b));
        }
    }
}

// Bytes of some quads of a block of tokens with `places`, widened.
inline void widen_inputs(const int8_t* x, int64_t quads, int places, int16_t (*to)[PAIR_QUADS][MOST][2]) {
    int16_t *const even = to[0][0][0], *const odd = to[1][0][0];
    if (places != MOST) {
        for (int64_t q = 0; q < quads; ++q)
            for (int i = 0; i < 2; ++i) to[0][q][0][i] = x[q * 4 + 2 * i], to[1][q][0][i] = x[q * 4 + 2 * i + 1];
        return;
    }
    const int64_t bytes = quads * MOST * 4;
    int64_t i = 0;
    for (; i + 32 <= bytes; i += 32) {
        const __m256i quad = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
        _mm256_store_si256(reinterpret_cast<__m256i*>(even + i / 2), _mm256_srai_epi16(_mm256_slli_epi16(quad, 8), 8));
        _mm256_store_si256(reinterpret_cast<__m256i*>(odd + i / 2), _mm256_srai_epi16(quad, 8));
    }
    for (; i < bytes; i += 2) even[i / 2] = x[i], odd[i / 2] = x[i + 1];
}

// A token of a tile: where its inputs and its totals of both blocks of rows lie.
struct PairToken {
    const int16_t* x;
    float* totals[2];
    const float* scale;  // of chunks, PAIR_INPUTS apart
};

// Sums of a token in a tile, by name: those of an array would not be in registers.
struct PairSums {
    __m256i a, b, c, d;  // two of each block of rows
};

// One quad, whose even and odd pairs lie HALF bytes apart, for three tokens. One statement, so that sums stay where they are: the
// compiler would begin with many products and store sums meanwhile.
template <int HALF>
inline void add_quad(PairSums& k, PairSums& l, PairSums& m, const int16_t* codes, const int16_t* x, const int16_t* y,
                     const int16_t* z, int64_t at) {
#define ADD(line, sum) "vpmaddwd " line "(%[codes]), %%ymm14, %%ymm15\n\tvpaddd %%ymm15, %[" sum "], %[" sum "]\n\t"
#define ROWS(a, b, c, d, token) ADD(a, token "0") ADD(b, token "1") ADD(c, token "2") ADD(d, token "3")
#define TOKENS(half, a, b, c, d)                                                               \
    "vpbroadcastd " half "(%[x],%[at]), %%ymm14\n\t" ROWS(a, b, c, d, "k")                     \
    "vpbroadcastd " half "(%[y],%[at]), %%ymm14\n\t" ROWS(a, b, c, d, "l")                     \
    "vpbroadcastd " half "(%[z],%[at]), %%ymm14\n\t" ROWS(a, b, c, d, "m")
    static_assert(HALF == 512);
    asm(TOKENS("0", "0", "32", "64", "96") TOKENS("512", "128", "160", "192", "224")
        : [k0] "+x"(k.a), [k1] "+x"(k.b), [k2] "+x"(k.c), [k3] "+x"(k.d), [l0] "+x"(l.a), [l1] "+x"(l.b), [l2] "+x"(l.c),
          [l3] "+x"(l.d), [m0] "+x"(m.a), [m1] "+x"(m.b), [m2] "+x"(m.c), [m3] "+x"(m.d)
        : [codes] "r"(codes), [x] "r"(x), [y] "r"(y), [z] "r"(z), [at] "r"(at)
        : "ymm14", "ymm15", "memory");
#undef TOKENS
#undef ROWS
#undef ADD
}

// A chunk's sums added to a token's totals, without steps if they come LAST.
template <bool LAST>
inline void add_totals(const PairToken& token, const PairSums& sums, const float (*steps)[PAIR_QUADS][LANES], int64_t chunk) {
    const Floats scale = spread(token.scale[chunk * PAIR_INPUTS]);
    const Ints rows[2] = {{sums.a, sums.b}, {sums.c, sums.d}};
UNROLL
    for (int r = 0; r < 2; ++r) {
        const Floats by = LAST ? scale : multiply(load_floats(steps[r][chunk]), scale);
        store_floats(token.totals[r], multiply_add(to_floats(rows[r]), by, load_floats(token.totals[r])));
    }
}

// Chunks [from, to) of the blocks of rows r and r + 1 for three tokens.
template <bool LAST>
void pair_tile(const Chunk* parts, int64_t from, int64_t to, const PairPanel& panel, int r, const PairToken* tokens) {
    constexpr int64_t QUAD = MOST * 4;  // bytes of inputs
    const int16_t* codes = panel.codes[r / 2][0][0][0];
    const int16_t *const x = tokens[0].x, *const y = tokens[1].x, *const z = tokens[2].x;
    int64_t at = 0;
    for (int64_t c = from; c < to; ++c) {
        const __m256i zero = _mm256_setzero_si256();
        PairSums k = {zero, zero, zero, zero}, l = k, m = k;
        for (const int64_t end = at + parts[c].steps * QUAD; at < end; at += QUAD, codes += 8 * LANES)
            add_quad<PAIR_QUADS * QUAD>(k, l, m, codes, x, y, z, at);
        add_totals<LAST>(tokens[0], k, panel.steps + r, c - from);
        add_totals<LAST>(tokens[1], l, panel.steps + r, c - from);
        add_totals<LAST>(tokens[2], m, panel.steps + r, c - from);
    }
}

// Chunks [from, to), whose quads follow `done` others, of all rows of a panel for tokens [t, t + count), a multiple of MOST the
// first; rows of `begin` are theirs.
template <bool LAST>
void pair_tokens(const Chunk* parts, int64_t from, int64_t to, int64_t count, const Activations& a, int64_t quads, int64_t done,
                 int64_t width, PairPanel& panel, int64_t rows, int64_t t, int64_t tokens, float* begin, int64_t hop) {
    PairToken all[PAIR_INPUTS];
    for (int64_t b = 0; b < tokens; b += MOST) {
        const int64_t block = (t + b) / MOST;
        const int places = token_block(a.tokens, block, MOST);
        const int8_t* const x = a.bytes + block * MOST * quads * 4 + done * places * 4;
        widen_inputs(x, width, places, panel.inputs[b / MOST]);
        // those of the next call, which lie in the second level: all do not fit the first
        for (int64_t i = 0; i < width * MOST * 4; i += 64) prefetch(x + PAIR_INPUTS * quads * 4 + i);
        const float* const scales = a.scale + block * MOST * count;
        for (int64_t c = from; c < to; ++c)
            for (int i = 0; i < places; ++i) panel.scales[c - from][b + i] = scales[c * places + i];
    }
    for (int64_t r = 0; r < rows; r += 2) {
        for (int64_t i = 0; i < (tokens + 2) / 3 * 3; ++i) {
            const int64_t own = i < tokens ? i : 0;
            float* const to_rows = begin + own * hop + r * LANES;
            all[i] = {panel.inputs[own / MOST][0][0][own % MOST],
                      {i < tokens ? to_rows : panel.nowhere, i < tokens && r + 1 < rows ? to_rows + LANES : panel.nowhere},
                      panel.scales[0] + own};
        }
        for (int64_t i = 0; i < tokens; i += 3)
            pair_tile<LAST>(parts, from, to, panel, int(r), all + i);
    }
}

// Row blocks [block, block + rows), at most PAIR_ROWS, for all tokens.
template <bool LAST>
void pair_panel(const Weight& w, const Chunk* parts, int64_t count, const Activations& a, int64_t block, int64_t rows, void* out,
                Type type, int64_t stride) {
    PairPanel panel;
    const int64_t words = w.words() * LANES, quads = Activations::quads(8, w.columns, w.group);
    alignas(64) float held[PAIR_TOKENS][PAIR_ROWS * LANES];
    const int64_t most = type == FP32 ? a.tokens : PAIR_TOKENS;
    std::memset(panel.nowhere, 0, sizeof panel.nowhere);
    if (rows % 2 != 0) std::memset(panel.codes, 0, sizeof panel.codes), std::memset(panel.steps, 0, sizeof panel.steps);
    for (int64_t first = 0; first < a.tokens; first += most) {
        const int64_t now = a.tokens - first < most ? a.tokens - first : most;
        const int64_t hop = type == FP32 ? stride : PAIR_ROWS * LANES;
        float* const begin = type == FP32 ? static_cast<float*>(out) + first * stride + block * LANES : held[0];
        for (int64_t t = 0; t < now; ++t) std::memset(begin + t * hop, 0, size_t(rows) * LANES * sizeof(float));
        int64_t done = 0;  // quads of the chunks before
        for (int64_t from = 0, to = 0; from < count; from = to) {
            int64_t width = 0;
            while (to < count && width + parts[to].steps <= PAIR_QUADS) width += parts[to++].steps;
            for (int r = 0; r < rows; ++r)
                fill_pairs(w, parts, from, to, block + r, w.packed + (block + r) * words + done * LANES, r, panel);
            for (int64_t t = first; t < first + now; t += PAIR_INPUTS) {
                const int64_t tokens = first + now - t < PAIR_INPUTS ? first + now - t : PAIR_INPUTS;
                pair_tokens<LAST>(parts, from, to, count, a, quads, done, width, panel, rows, t, tokens, begin + (t - first) * hop, hop);
            }
            done += width;
        }
        if (type == FP32 && !LAST) continue;
        for (int r = 0; r < rows; ++r) {
            const Floats steps = load_floats(panel.steps[r][0]);
            for (int64_t t = 0; t < now; ++t) {
                const Floats total = load_floats(begin + t * hop + r * LANES);
                store_outputs(LAST ? multiply(total, steps) : total, out, (first + t) * stride + (block + r) * LANES, type);
            }
        }
    }
}

// Row blocks [first, last) for many blocks of tokens (Activations::many), of one plane.
inline void pair_blocks(const Weight& w, const Chunk* parts, int64_t count, const Activations& a, int64_t first, int64_t last, void* out,
                        Type type, int64_t stride) {
    for (int64_t block = first; block < last; block += PAIR_ROWS) {
        const int64_t rows = last - block < PAIR_ROWS ? last - block : PAIR_ROWS;
        if (steps_last(w, 1)) pair_panel<true>(w, parts, count, a, block, rows, out, type, stride);
        else pair_panel<false>(w, parts, count, a, block, rows, out, type, stride);
    }
}
