// Sixteen lanes in plain C++: the definition of the operations that the other lanes_*.h give in intrinsics.
#pragma once

constexpr int MOST = 4;  // tokens that share one unpacking of the weight: what the registers hold
constexpr int STREAMS = 1;  // blocks of rows that one token reads at once
#define UNROLL _Pragma("GCC unroll 1")
struct Ints {
    int32_t v[16];
};
struct Floats {
    float v[16];
};

#define EACH for (int i = 0; i < 16; ++i)

inline Ints zero_ints() { return Ints{}; }
inline Floats zero_floats() { return Floats{}; }
inline Ints load_words(const uint32_t* p) {
    Ints r;
    std::memcpy(r.v, p, 64);
    return r;
}
template <int N>
inline Ints shift_right(Ints a) {
    EACH a.v[i] = int32_t(uint32_t(a.v[i]) >> N);
    return a;
}
inline Ints shift_right(Ints a, int n) {
    EACH a.v[i] = int32_t(uint32_t(a.v[i]) >> n);
    return a;
}
inline Ints shift_left(Ints a, int n) {
    EACH a.v[i] = int32_t(uint32_t(a.v[i]) << n);
    return a;
}
inline Ints quarter(Ints a) {
    EACH a.v[i] >>= 2;
    return a;
}
inline Ints keep(Ints a, uint32_t mask) {
    EACH a.v[i] = int32_t(uint32_t(a.v[i]) & mask);
    return a;
}
inline Ints either(Ints a, Ints b) {
    EACH a.v[i] |= b.v[i];
    return a;
}
inline Ints add(Ints a, Ints b) {
    EACH a.v[i] = int32_t(uint32_t(a.v[i]) + uint32_t(b.v[i]));
    return a;
}
template <int N>
inline Ints rotate_right(Ints a) {
    EACH a.v[i] = int32_t((uint32_t(a.v[i]) >> N) | (uint32_t(a.v[i]) << (32 - N)));
    return a;
}
// Bytes of `a` where the mask has ones, of `b` elsewhere.
template <uint32_t MASK>
inline Ints merge_bytes(Ints a, Ints b) {
    EACH a.v[i] = int32_t((uint32_t(a.v[i]) & MASK) | (uint32_t(b.v[i]) & ~MASK));
    return a;
}
// sum += four unsigned codes times four signed activations, the same ones in every lane.
template <int BITS>
__attribute__((noinline)) Ints dot(Ints sum, Ints codes, const int8_t* x) {
    const int32_t a = x[0], b = x[1], c = x[2], d = x[3];
    EACH {
        const uint32_t w = uint32_t(codes.v[i]);
        sum.v[i] += int32_t(w & 255) * a + int32_t(w >> 8 & 255) * b + int32_t(w >> 16 & 255) * c + int32_t(w >> 24) * d;
    }
    return sum;
}
template <int BITS>
inline Ints dot_once(Ints sum, Ints codes, const int8_t* x) {
    return dot<BITS>(sum, codes, x);
}
inline Floats to_floats(Ints a) {
    Floats r;
    EACH r.v[i] = float(a.v[i]);
    return r;
}
inline Floats spread(float a) {
    Floats r;
    EACH r.v[i] = a;
    return r;
}
inline Floats multiply(Floats a, Floats b) {
    EACH a.v[i] *= b.v[i];
    return a;
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
    EACH c.v[i] += a.v[i] * b.v[i];
    return c;
}
inline Floats multiply_subtract(Floats a, Floats b, Floats c) {
    EACH c.v[i] -= a.v[i] * b.v[i];
    return c;
}
// `a` times a power of two as kept_scale() keeps it
inline Floats scaled(Floats a, float kept) { return multiply(a, spread(kept)); }
inline float kept_scale(float power) { return power; }
inline Floats load_halves(const uint16_t* p) {
    Floats r;
    EACH r.v[i] = half_to_float(p[i]);
    return r;
}
inline Floats load_floats(const float* p) {
    Floats r;
    std::memcpy(r.v, p, 64);
    return r;
}
inline void store_floats(float* p, Floats a) { std::memcpy(p, a.v, 64); }
inline void prefetch(const void*) {}
inline void prefetch_second_level(const void*) {}

#undef EACH
