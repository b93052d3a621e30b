// Sixteen lanes in four NEON registers; needs the dot products of Armv8.2 (Neoverse N1 and later, Apple's M1 and later).
#pragma once

constexpr int MOST = 4;  // tokens that share one unpacking of the weight: what the registers hold
constexpr int STREAMS = 2;  // blocks of rows that one token reads at once
#define UNROLL _Pragma("GCC unroll 8")
struct Ints {
    int32x4_t v[4];
};
struct Floats {
    float32x4_t v[4];
};

// One operation on all four.
#define EACH _Pragma("GCC unroll 4") for (int i = 0; i < 4; ++i)

inline Ints every(int32x4_t x) { return {{x, x, x, x}}; }
inline Ints zero_ints() { return every(vdupq_n_s32(0)); }
inline Floats spread(float x) {
    const float32x4_t all = vdupq_n_f32(x);
    return {{all, all, all, all}};
}
inline Floats zero_floats() { return spread(0.0f); }
inline Ints load_words(const uint32_t* p) {
    Ints r;
    EACH r.v[i] = vreinterpretq_s32_u32(vld1q_u32(p + 4 * i));
    return r;
}
// to the left, to the right where negative
inline int32x4_t shifted(int32x4_t x, int n) {
    return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x), vdupq_n_s32(n)));
}
inline Ints shift_right(Ints x, int n) {
    EACH x.v[i] = shifted(x.v[i], -n);
    return x;
}
template <int N>
inline Ints shift_right(Ints x) {
    return shift_right(x, N);
}
inline Ints shift_left(Ints x, int n) {
    EACH x.v[i] = shifted(x.v[i], n);
    return x;
}
inline Ints quarter(Ints x) {
    EACH x.v[i] = vshrq_n_s32(x.v[i], 2);
    return x;
}
inline Ints keep(Ints x, uint32_t mask) {
    EACH x.v[i] = vandq_s32(x.v[i], vdupq_n_s32(int32_t(mask)));
    return x;
}
inline Ints either(Ints x, Ints y) {
    EACH x.v[i] = vorrq_s32(x.v[i], y.v[i]);
    return x;
}
inline Ints add(Ints x, Ints y) {
    EACH x.v[i] = vaddq_s32(x.v[i], y.v[i]);
    return x;
}
template <int N>
inline Ints rotate_right(Ints x) {
    return either(shift_right(x, N), shift_left(x, 32 - N));
}
// bytes of `x` where the mask has ones, of `y` elsewhere
template <uint32_t MASK>
inline Ints merge_bytes(Ints x, Ints y) {
    EACH x.v[i] = vbslq_s32(vdupq_n_u32(MASK), x.v[i], y.v[i]);
    return x;
}
inline int32x4_t dot_part(int32x4_t sum, int32x4_t codes, int8x16_t x) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(codes), x);
}
template <int BITS>
inline Ints dot(Ints sum, Ints codes, const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, 4);
    const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(quad));
    if constexpr (BITS < 8) {
        EACH sum.v[i] = dot_part(sum.v[i], codes.v[i], all);
        return sum;
    }
    // 255 is no signed byte, so the two nibbles of a code go separately
    const Ints low = keep(codes, 0x0f0f0f0f), high = keep(shift_right(codes, 4), 0x0f0f0f0f);
    EACH {
        const int32x4_t above = dot_part(vdupq_n_s32(0), high.v[i], all);
        sum.v[i] = vaddq_s32(dot_part(sum.v[i], low.v[i], all), vshlq_n_s32(above, 4));
    }
    return sum;
}
template <int BITS>
inline Ints dot_once(Ints sum, Ints codes, const int8_t* x) {
    return dot<BITS>(sum, codes, x);
}
inline Floats to_floats(Ints x) {
    Floats r;
    EACH r.v[i] = vcvtq_f32_s32(x.v[i]);
    return r;
}
inline Floats multiply(Floats x, Floats y) {
    EACH x.v[i] = vmulq_f32(x.v[i], y.v[i]);
    return x;
}
inline Floats multiply_add(Floats x, Floats y, Floats z) {
    EACH z.v[i] = vfmaq_f32(z.v[i], x.v[i], y.v[i]);
    return z;
}
inline Floats multiply_subtract(Floats x, Floats y, Floats z) {
    EACH z.v[i] = vfmsq_f32(z.v[i], x.v[i], y.v[i]);
    return z;
}
// `a` times a power of two as kept_scale() keeps it
inline Floats scaled(Floats a, float kept) { return multiply(a, spread(kept)); }
inline float kept_scale(float power) { return power; }
inline Floats load_halves(const uint16_t* p) {
    Floats r;
    EACH r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
    return r;
}
inline Floats load_floats(const float* p) {
    Floats r;
    EACH r.v[i] = vld1q_f32(p + 4 * i);
    return r;
}
inline void store_floats(float* p, Floats x) {
    EACH vst1q_f32(p + 4 * i, x.v[i]);
}
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch_second_level(const void* p) { __builtin_prefetch(p, 0, 2); }

#undef EACH
