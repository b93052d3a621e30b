// Quantization of a token's chunk in AVX-512 registers, 64 columns at a time; part of lowbit.inc. Gives the bytes, scales and
// sums of quantize_chunk and ordered bit for bit, in a fraction of their time: with one token everything waits for it.
#pragma once

inline Floats load_16(const void* x, int64_t at, Type type) {
    if (type == FP32) return _mm512_loadu_ps(static_cast<const float*>(x) + at);
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(x) + at));
    if (type == FP16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline uint32_t largest_size(const void* x, int64_t at, Type type, int width) {
    const Ints sizes = _mm512_set1_epi32(0x7fffffff);
    Ints largest = _mm512_setzero_si512();
    for (int i = 0; i < width; i += LANES)
        largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(load_16(x, at + i, type)), sizes));
    return _mm512_reduce_max_epu32(largest);
}

// Byte 0 of the lanes of four vectors: byte 4 * i + j of the result is that of lane i of vector j.
inline Ints low_bytes(const Ints (&q)[4]) {
    Ints all = _mm512_mask_mov_epi8(q[0], 0x2222222222222222, _mm512_slli_epi32(q[1], 8));
    all = _mm512_mask_mov_epi8(all, 0x4444444444444444, _mm512_slli_epi32(q[2], 16));
    return _mm512_mask_mov_epi8(all, 0x8888888888888888, _mm512_slli_epi32(q[3], 24));
}

// Takes low_bytes() of 64 columns to the order in which a weight of some bits yields them.
template <int BITS>
struct Order {
    alignas(64) uint8_t from[64];

    constexpr Order() : from{} {
        for (int place = 0; place < 64; ++place) {
            const int i = place % step_columns(BITS), column = place - i + Step<BITS>::column(i / 4, i % 4);
            from[place] = uint8_t(column % 16 * 4 + column / 16);
        }
    }
};

inline Ints column_order(int bits) {
    static constexpr Order<2> two;
    static constexpr Order<3> three;
    static constexpr Order<4> four;
    static constexpr Order<8> eight;
    return _mm512_load_si512(bits == 2 ? two.from : bits == 3 ? three.from : bits == 4 ? four.from : eight.from);
}

// A chunk of `width` columns, a multiple of 64: its bytes in the weight's order, one array to a plane, scale and sum.
template <int PLANES>
inline void quantize_wide(const void* x, int64_t at, Type type, int width, Ints order, int8_t (*bytes)[MAX_CHUNK],
                          float& scale, float& sum) {
    const Fixed fixed = fixed_point<PLANES>(largest_size(x, at, type, width));
    scale = PLANES == 1 ? fixed.scale : kept_scale(fixed.scale);
    if (!fixed.finite) {
        for (int p = 0; p < PLANES; ++p) std::memset(bytes[p], 0, MAX_CHUNK);
        sum = PLANES == 1 ? 0.0f : fixed.scale;
        return;
    }
    const Floats factor = _mm512_set1_ps(fixed.factor);
    const Ints half = _mm512_set1_epi32(128);
    Ints total = _mm512_setzero_si512();
    for (int i = 0; i < width; i += 64) {
        Ints q[4];
        UNROLL
        for (int j = 0; j < 4; ++j) {
            q[j] = _mm512_cvtps_epi32(_mm512_mul_ps(load_16(x, at + i + j * LANES, type), factor));
            total = _mm512_add_epi32(total, q[j]);
        }
        UNROLL
        for (int p = PLANES - 1; p >= 0; --p) {
            _mm512_storeu_si512(bytes[p] + i, _mm512_permutexvar_epi8(order, low_bytes(q)));
            // what is left after taking away the signed low byte
            if (p > 0)
                for (int j = 0; j < 4; ++j) q[j] = _mm512_srai_epi32(_mm512_add_epi32(q[j], half), 8);
        }
    }
    const float all = float(_mm512_reduce_add_epi32(total));
    sum = PLANES == 1 ? all : fixed.scale * all;
}

// Two planes of one token: their quads side by side.
inline void place_two_planes(const int8_t* high, const int8_t* low, int quads, int8_t* to) {
    const Ints first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const Ints second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int q = 0; q < quads; q += 16) {
        const Ints a = _mm512_loadu_si512(high + q * 4), b = _mm512_loadu_si512(low + q * 4);
        _mm512_storeu_si512(to + q * 8, _mm512_permutex2var_epi32(a, first, b));
        _mm512_storeu_si512(to + q * 8 + 64, _mm512_permutex2var_epi32(a, second, b));
    }
}
