// Products of many tokens; part of lowbit.inc. Two blocks of rows are unpacked once, 384 columns at a time, into a panel
// that stays in the first-level cache while all tokens pass over it: in block_rows every eight tokens unpack the weight
// again, an eighth of all vector operations. Gives the results of block_rows bit for bit.
//
// With one plane the panel holds code minus zero point, a signed byte (of 8-bit codes on symmetric grids only), and activations
// come as unsigned bytes, 128 too large (Activations::biased). What that adds to a chunk's sum, 128 times the sum of its
// codes, does not depend on the token: sums begin at its negative, and the zero points cost nothing per token. Of the
// operations that are left for 64 columns of 32 rows and 8 tokens, 256 of 304 are products; of 288 where steps come last.
#pragma once

constexpr int PANEL_ROWS = 2;           // blocks of rows
constexpr int PANEL_QUADS = 96;         // of one block of rows: 6 KB
constexpr int PANEL_TOKENS = 16 * MOST; // whose totals, 16 KB, stay in the first-level cache as well

struct Panel {
    alignas(64) int8_t codes[PANEL_ROWS][PANEL_QUADS][64];
    // of each chunk; a panel of the narrowest chunks holds one to a quad
    alignas(64) float steps[PANEL_QUADS][PANEL_ROWS][LANES];
    alignas(64) float zeros[PANEL_QUADS][PANEL_ROWS][LANES];   // zero points, times the steps with several planes
    alignas(64) int32_t begin[PANEL_QUADS][PANEL_ROWS][LANES];  // of signed codes: where their sums begin
    alignas(64) float totals[PANEL_TOKENS][PANEL_ROWS][LANES];
};

// Sum of codes times bytes, either of which may be the signed one.
template <bool SIGNED>
inline Ints multiply_bytes(Ints sum, Ints codes, Ints x) {
    if constexpr (SIGNED) asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(codes));
    else asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
    return sum;
}
inline Ints quad_of(const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, 4);
    return _mm512_set1_epi32(quad);
}

// A load of its own: one load copied to many registers takes slots of the units that multiply.
inline Ints loaded(const int32_t* from) {
    Ints to;
    asm volatile("vmovdqa64 %1, %0" : "=v"(to) : "m"(*reinterpret_cast<const Ints*>(from)));
    return to;
}

// Chunks [from, to) of block `block`, whose words begin at `p`, into row `r` of the panel. Returns where the next begin.
template <int BITS, int PLANES, bool SIGNED>
const uint32_t* fill_panel(const Weight& w, const Chunk* parts, int64_t from, int64_t to, int64_t block, const uint32_t* p,
                           const uint32_t* end, int r, Panel& panel) {
    constexpr int WORDS = step_words(BITS), QUADS = step_columns(BITS) / 4;
    const uint16_t* const scales = w.scale + block * w.groups() * LANES;
    const uint32_t* const zeros = w.zero ? w.zero + block * w.zero_words() * LANES : nullptr;
    int quad = 0;
    for (int64_t c = from; c < to; ++c) {
        const Floats steps = load_halves(scales + parts[c].group * LANES);
        const Floats zero = zeros ? zero_points<BITS>(zeros, parts[c].group) : spread(float(1 << (BITS - 1)));
        store_floats(panel.steps[c - from][r], steps);
        store_floats(panel.zeros[c - from][r], PLANES == 1 ? zero : multiply(steps, zero));
        // the zero point in every byte of its lane
        const Ints bytes = _mm512_mullo_epi32(_mm512_cvtps_epi32(zero), _mm512_set1_epi32(0x01010101));
        Ints begin[2] = {zero_ints(), zero_ints()};  // two sums: one would wait for itself
        for (int s = 0; s < parts[c].steps; ++s, quad += QUADS) {
            const uint32_t* line = p;
            uint32_t rest[WORDS * LANES];
            p += WORDS * LANES;
            if (BITS == 3 && end < p) {
                // the row ends inside the step: the words beyond it are not ours
                std::memset(rest, 0, sizeof rest);
                std::memcpy(rest, line, size_t(end - line) * 4);
                line = rest;
                p = end;
            }
            const Step<BITS> codes(line);
            UNROLL
            for (int q = 0; q < QUADS; ++q) {
                Ints held = codes.quad(q);
                if constexpr (SIGNED) {
                    held = _mm512_sub_epi8(held, bytes);
                    begin[q % 2] = multiply_bytes<true>(begin[q % 2], held, _mm512_set1_epi8(char(0x80)));
                }
                _mm512_store_si512(panel.codes[r][quad + q], held);
            }
        }
        if constexpr (SIGNED)
            _mm512_store_si512(panel.begin[c - from][r], _mm512_sub_epi32(zero_ints(), _mm512_add_epi32(begin[0], begin[1])));
    }
    return p;
}

// Where a block of tokens lies: its bytes from the panel's first chunk on, scales and sums of all chunks.
struct Tokens {
    const int8_t* x;
    const float* scale;
    const float* sum;

    Tokens from(int t) const { return {x + t * 4, scale + t, sum + t}; }
};

// What becomes of a panel's totals: whether they begin with it, and where they end, null where another panel follows or
// where they are not fp32. Written here, results leave one by one; all at once, the core would wait for its stores.
struct Results {
    bool begin;
    float* to;
    int64_t stride, tokens;

    Results from(int t) const { return {begin, to == nullptr ? nullptr : to + t * stride, stride, tokens - t}; }
};

// Chunks [from, to) for TOKENS of a block of PLACES tokens: adds to their totals, without steps if they come LAST. What
// `next` needs is fetched on the way: all blocks together do not fit the first-level cache and pass through it for every
// panel.
template <int PLANES, bool SIGNED, bool LAST, int ROWS, int TOKENS, int PLACES>
void panel_tokens(const Chunk* parts, int64_t from, int64_t to, int per_step, const Tokens& tokens, const Tokens& next,
                  const Panel& panel, float (*totals)[PANEL_ROWS][LANES], const Results& results) {
    const int8_t *x = tokens.x, *ahead = next.x;
    const int8_t* codes = panel.codes[0][0];
    constexpr int NEXT_ROW = PANEL_QUADS * 64;
    // in registers as long as the panel lasts: a store takes as long as a product
    Floats total[TOKENS][ROWS];
    UNROLL
    for (int t = 0; t < TOKENS; ++t)
        for (int r = 0; r < ROWS; ++r) total[t][r] = results.begin ? zero_floats() : load_floats(totals[t][r]);
    for (int64_t c = from; c < to; ++c) {
        Ints sums[ROWS][TOKENS][PLANES];
        UNROLL
        for (int r = 0; r < ROWS; ++r)
            UNROLL
            for (int t = 0; t < TOKENS; ++t)
                for (int p = 0; p < PLANES; ++p) sums[r][t][p] = SIGNED ? loaded(panel.begin[c - from][r]) : zero_ints();
        const auto add_quad = [&](const int8_t* codes, const int8_t* x) {
            Ints quads[ROWS];
            for (int r = 0; r < ROWS; ++r) quads[r] = _mm512_load_si512(codes + r * NEXT_ROW);
            UNROLL
            for (int t = 0; t < TOKENS; ++t)
                UNROLL
                for (int p = 0; p < PLANES; ++p) {
                    const Ints quad = quad_of(x + (p * PLACES + t) * 4);
                    for (int r = 0; r < ROWS; ++r) sums[r][t][p] = multiply_bytes<SIGNED>(sums[r][t][p], quads[r], quad);
                }
        };
        int left = parts[c].steps * per_step;
        for (; left > 1; left -= 2, codes += 128, x += PLANES * PLACES * 8, ahead += PLANES * PLACES * 8) {
            for (int line = 0; line < PLANES * PLACES * 8; line += 64) prefetch(ahead + line);
            add_quad(codes, x);
            add_quad(codes + 64, x + PLANES * PLACES * 4);
        }
        for (; left > 0; --left, codes += 64, x += PLANES * PLACES * 4) add_quad(codes, x);
        const float* const scales = tokens.scale + c * PLACES;
        const float* const offsets = tokens.sum + c * PLACES;
        prefetch(next.scale + c * PLACES);
        UNROLL
        for (int r = 0; r < ROWS; ++r) {
            const Floats steps = load_floats(panel.steps[c - from][r]), zeros = load_floats(panel.zeros[c - from][r]);
            UNROLL
            for (int t = 0; t < TOKENS; ++t) {
                Floats value;
                if constexpr (PLANES == 2) value = to_floats(add(shift_left(sums[r][t][0], 8), sums[r][t][1]));
                else value = to_floats(sums[r][t][0]);
                if constexpr (PLANES == 1 && !SIGNED) value = multiply_subtract(zeros, spread(offsets[t]), value);
                if constexpr (PLANES == 2) {
                    total[t][r] = multiply_add(value, scaled(steps, scales[t]), total[t][r]);
                    total[t][r] = multiply_subtract(zeros, spread(offsets[t]), total[t][r]);
                } else {
                    const Floats by = LAST ? spread(scales[t]) : multiply(steps, spread(scales[t]));
                    total[t][r] = multiply_add(value, by, total[t][r]);
                }
            }
        }
    }
    UNROLL
    for (int t = 0; t < TOKENS; ++t)
        UNROLL
        for (int r = 0; r < ROWS; ++r) {
            if (results.to == nullptr) {
                store_floats(totals[t][r], total[t][r]);
            } else if (t < results.tokens) {
                if constexpr (LAST) total[t][r] = multiply(total[t][r], load_floats(panel.steps[0][r]));
                store_floats(results.to + t * results.stride + r * LANES, total[t][r]);
            }
        }
}

// Row blocks [block, block + ROWS) for all tokens.
template <int BITS, int PLANES, bool SIGNED, bool LAST, int ROWS>
void panel_rows(const Weight& w, const Chunk* parts, int64_t count, const Activations& a, int64_t block, void* out, Type type,
                int64_t stride) {
    constexpr int PER_STEP = step_columns(BITS) / 4;
    Panel panel;
    const int64_t words = w.words(), quads = Activations::quads(BITS, w.columns, w.group);
    for (int64_t first = 0; first < a.tokens; first += PANEL_TOKENS) {
        const int64_t now = a.tokens - first < PANEL_TOKENS ? a.tokens - first : PANEL_TOKENS;
        const int64_t begin = first / MOST, blocks = (now + MOST - 1) / MOST;
        const uint32_t* p[ROWS];
        for (int r = 0; r < ROWS; ++r) p[r] = w.packed + (block + r) * words * LANES;
        int64_t done = 0;  // quads of the chunks before
        for (int64_t from = 0, to = 0; from < count; from = to) {
            int64_t held = 0;
            while (to < count && held + parts[to].steps * PER_STEP <= PANEL_QUADS) held += parts[to++].steps * PER_STEP;
            int64_t lines = 0;
            for (int r = 0; r < ROWS; ++r) {
                const uint32_t* const begins = p[r];
                const uint32_t* const end = w.packed + (block + r + 1) * words * LANES;
                p[r] = fill_panel<BITS, PLANES, SIGNED>(w, parts, from, to, block + r, begins, end, r, panel);
                lines = (p[r] - begins) / LANES;
            }
            const bool written = to == count && type == FP32;
            for (int64_t i = 0; i < blocks; ++i) {
                // what the next panel unpacks comes while this one is used; all at once it would be waited for
                for (int64_t line = lines * i / blocks; line < lines * (i + 1) / blocks; ++line)
                    for (int r = 0; r < ROWS; ++r)
                        prefetch_second_level((to < count ? p[r] : p[r] + (ROWS - 1) * words * LANES) + line * LANES);
                const int places = token_block(a.tokens, begin + i, MOST);
                const auto block_at = [&](int64_t n, int64_t quad) {
                    const int64_t at = (begin + n) * MOST;
                    return Tokens{a.bytes + (at * quads + quad * places) * 4 * PLANES, a.scale + at * count, a.sum + at * count};
                };
                // the first block comes again with the next panel
                const Tokens tokens = block_at(i, done), next = i + 1 < blocks ? block_at(i + 1, done) : block_at(0, done + held);
                auto* const totals = panel.totals + i * MOST;
                float* const lines = written ? static_cast<float*>(out) + (first + i * MOST) * stride + block * LANES : nullptr;
                const Results results{from == 0, lines, stride, now - i * MOST};
                const auto run = [&]<int TOKENS, int PLACES>(int t) {
                    panel_tokens<PLANES, SIGNED, LAST, ROWS, TOKENS, PLACES>(parts, from, to, PER_STEP, tokens.from(t), next.from(t), panel,
                                                                       totals + t, results.from(t));
                };
                // tokens that the last block lacks are left out: experts of a dozen tokens have many such
                const int64_t real = now - i * MOST;
                if (places == 1) run.template operator()<1, 1>(0);
                else if (real == 2) run.template operator()<2, 4>(0);
                else if (real == 3) run.template operator()<3, 4>(0);
                else if (places == 4) run.template operator()<4, 4>(0);
                else {
                    run.template operator()<4, MOST>(0);
                    if (real == 5) run.template operator()<1, MOST>(4);
                    else if (real == 6) run.template operator()<2, MOST>(4);
                    else if (real == 7) run.template operator()<3, MOST>(4);
                    else run.template operator()<4, MOST>(4);
                }
            }
            done += held;
        }
        for (int64_t t = 0; t < now && type != FP32; ++t)
            for (int r = 0; r < ROWS; ++r) {
                const Floats total = with_steps(w, PLANES, block + r, load_floats(panel.totals[t][r]));
                store_outputs(total, out, (first + t) * stride + (block + r) * LANES, type);
            }
    }
}

// Row blocks [first, last) for many blocks of tokens (Activations::many), of one or two planes.
template <int BITS, int PLANES>
void many_tokens(const Weight& w, const Chunk* parts, int64_t count, const Activations& a, int64_t first, int64_t last, void* out,
                 Type type, int64_t stride) {
    const auto all = [&]<bool SIGNED, bool LAST>() {
        int64_t block = first;
        for (; block + 2 <= last; block += 2)
            panel_rows<BITS, PLANES, SIGNED, LAST, 2>(w, parts, count, a, block, out, type, stride);
        if (block < last) panel_rows<BITS, PLANES, SIGNED, LAST, 1>(w, parts, count, a, block, out, type, stride);
    };
    const auto run = [&]<bool SIGNED>() {
        if constexpr (PLANES == 1 && BITS == 8) {
            if (steps_last(w, PLANES)) return all.template operator()<SIGNED, true>();
        }
        all.template operator()<SIGNED, false>();
    };
    if constexpr (PLANES == 1) {
        if (BITS < 8 || a.biased) return run.template operator()<true>();
    }
    if constexpr (PLANES > 1 || BITS == 8) run.template operator()<false>();
}
