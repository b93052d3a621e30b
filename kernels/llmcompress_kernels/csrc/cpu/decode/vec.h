// Sixteen floats as one value: one register with AVX-512, elsewhere halves of halves that are registers. GCC 12 takes vectors
// wider than a register through memory wherever one meets a number, which was most of the time of attention with AVX2.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "decode.h"
#include "llmcompress/types.h"

#define LLMCOMPRESS_UNROLL _Pragma("GCC unroll 8")
#define LLMCOMPRESS_INLINE inline __attribute__((always_inline))

namespace LLMCOMPRESS_ISA {

using namespace llmcompress;
using namespace llmcompress::decode;

// floats of a register
#if LLMCOMPRESS_LEVEL >= 4
constexpr int NATIVE = 16;
#elif LLMCOMPRESS_LEVEL == 3
constexpr int NATIVE = 8;
#else
constexpr int NATIVE = 4;
#endif
constexpr int PARTS = LANES / NATIVE;

typedef float FN __attribute__((vector_size(4 * NATIVE)));
typedef int32_t IN __attribute__((vector_size(4 * NATIVE)));
typedef uint32_t UN __attribute__((vector_size(4 * NATIVE)));
typedef uint16_t HN __attribute__((vector_size(2 * NATIVE)));

// stands for minus infinity: its exponential is 0, and it has a difference to itself
constexpr float LOWEST = -3.0e38f;

template <class V>
LLMCOMPRESS_INLINE V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
struct Two {
    V a, b;
    float operator[](int i) const { return i < int(sizeof(V) / 4) ? a[i] : b[i - int(sizeof(V) / 4)]; }
};

#if LLMCOMPRESS_LEVEL >= 4
typedef FN F16;
#elif LLMCOMPRESS_LEVEL == 3
typedef Two<FN> F16;
#else
typedef Two<Two<FN>> F16;
#endif

#define LLMCOMPRESS_OPERATOR(op)                                                                                        \
    template <class V>                                                                                                  \
    LLMCOMPRESS_INLINE auto operator op(Two<V> x, Two<V> y)->Two<decltype(x.a op y.a)> { return {x.a op y.a, x.b op y.b}; } \
    template <class V>                                                                                                  \
    LLMCOMPRESS_INLINE auto operator op(Two<V> x, float y)->Two<decltype(x.a op y)> { return {x.a op y, x.b op y}; }    \
    template <class V>                                                                                                  \
    LLMCOMPRESS_INLINE auto operator op(float x, Two<V> y)->Two<decltype(x op y.a)> { return {x op y.a, x op y.b}; }
LLMCOMPRESS_OPERATOR(+)
LLMCOMPRESS_OPERATOR(-)
LLMCOMPRESS_OPERATOR(*)
LLMCOMPRESS_OPERATOR(/)
LLMCOMPRESS_OPERATOR(<)
LLMCOMPRESS_OPERATOR(>)
#undef LLMCOMPRESS_OPERATOR
template <class V>
LLMCOMPRESS_INLINE Two<V> operator-(Two<V> x) { return {-x.a, -x.b}; }
template <class V>
LLMCOMPRESS_INLINE Two<V>& operator+=(Two<V>& x, Two<V> y) { return x = x + y; }

// Lane by lane `a` where a comparison holds.
LLMCOMPRESS_INLINE FN choose(IN which, FN a, FN b) { return which ? a : b; }
template <class M, class V>
LLMCOMPRESS_INLINE Two<V> choose(Two<M> which, Two<V> a, Two<V> b) {
    return {choose(which.a, a.a, b.a), choose(which.b, a.b, b.b)};
}

template <class V>
LLMCOMPRESS_INLINE V spread_as(float x) {
    if constexpr (sizeof(V) == sizeof(FN)) return x - V{};
    else return {spread_as<decltype(V::a)>(x), spread_as<decltype(V::a)>(x)};
}
LLMCOMPRESS_INLINE F16 spread(float x) { return spread_as<F16>(x); }

LLMCOMPRESS_INLINE void store(float* p, FN v) { std::memcpy(p, &v, sizeof v); }
template <class V>
LLMCOMPRESS_INLINE void store(float* p, Two<V> v) { store(p, v.a), store(p + sizeof(V) / 4, v.b); }

// bf16 is the upper half of a float
LLMCOMPRESS_INLINE FN load_native(const float* p) { return load<FN>(p); }
LLMCOMPRESS_INLINE FN load_native(const uint16_t* p) { return (FN)(__builtin_convertvector(load<HN>(p), UN) << 16); }
template <class V, class T>
LLMCOMPRESS_INLINE V load_as(const T* p) {
    if constexpr (sizeof(V) == sizeof(FN)) return load_native(p);
    else return {load_as<decltype(V::a)>(p), load_as<decltype(V::a)>(p + sizeof(V) / 8)};
}
template <class T>
LLMCOMPRESS_INLINE F16 load_float(const T* p) { return load_as<F16>(p); }

// Sixteen floats of PARTS registers, which are `apart` from each to the next.
template <class V = F16>
LLMCOMPRESS_INLINE V joined(const FN* parts, int apart) {
    if constexpr (sizeof(V) == sizeof(FN)) return *parts;
    else return {joined<decltype(V::a)>(parts, apart), joined<decltype(V::a)>(parts + sizeof(V) / (2 * sizeof(FN)) * apart, apart)};
}

// Even and odd ones of twice as many numbers of bf16 as a register has floats: widened apart, one operation instead of two for each.
LLMCOMPRESS_INLINE FN even_columns(UN both) { return (FN)(both << 16); }
LLMCOMPRESS_INLINE FN odd_columns(UN both) { return (FN)(both & 0xffff0000u); }
// Stored side by side again.
LLMCOMPRESS_INLINE void store_woven(float* p, FN a, FN b) {
#if LLMCOMPRESS_LEVEL >= 4
    store(p, __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
    store(p + NATIVE, __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
#elif LLMCOMPRESS_LEVEL == 3
    store(p, __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11));
    store(p + NATIVE, __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15));
#else
    store(p, __builtin_shufflevector(a, b, 0, 4, 1, 5));
    store(p + NATIVE, __builtin_shufflevector(a, b, 2, 6, 3, 7));
#endif
}

inline float widen(float x) { return x; }
inline float widen(uint16_t x) {
    const uint32_t u = uint32_t(x) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

inline void store_one(float* p, float x) { *p = x; }
inline void store_one(uint16_t* p, float x) { *p = float_to_bf16(x); }

// Four of sixteen lanes, to each of which the others that are multiples of four from it are added, halves first.
typedef float F4 __attribute__((vector_size(16)));
#if LLMCOMPRESS_LEVEL >= 3
typedef float F8 __attribute__((vector_size(32)));
LLMCOMPRESS_INLINE F4 folded(F16 v) {
#if LLMCOMPRESS_LEVEL >= 4
    const F8 eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    const F8 eight = v.a + v.b;
#endif
    return __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
}
#else
LLMCOMPRESS_INLINE F4 folded(F16 v) { return (v.a.a + v.b.a) + (v.a.b + v.b.b); }
#endif

inline float sum(F16 v) {
    const F4 four = folded(v);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

#if LLMCOMPRESS_LEVEL >= 4
// Lane 4 g + i becomes the sum of v[g][i] over its lanes, added up in the order of sum().
inline F16 sums(const F16 (*v)[4]) {
    F16 by_eight[8], by_four[4], by_two[2];
    for (int g = 0; g < 4; g += 2)
        for (int i = 0; i < 4; ++i) {
            const F16 a = v[g][i], b = v[g + 1][i];
            by_eight[2 * i + g / 2] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                                      __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        }
    for (int i = 0; i < 4; ++i) {
        const F16 a = by_eight[2 * i], b = by_eight[2 * i + 1];
        by_four[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                     __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    for (int i = 0; i < 2; ++i) {
        const F16 a = by_four[2 * i], b = by_four[2 * i + 1];
        by_two[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                    __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    return __builtin_shufflevector(by_two[0], by_two[1], 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           __builtin_shufflevector(by_two[0], by_two[1], 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}

// Four vectors of four fours each become the fours of each place: v[g] has the g-th of v[0] to v[3].
inline void fours_of_rows(F16* v) {
    const F16 a = __builtin_shufflevector(v[0], v[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const F16 b = __builtin_shufflevector(v[2], v[3], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const F16 c = __builtin_shufflevector(v[0], v[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    const F16 d = __builtin_shufflevector(v[2], v[3], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    v[0] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    v[1] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    v[2] = __builtin_shufflevector(c, d, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    v[3] = __builtin_shufflevector(c, d, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
#else
// Lane i becomes the sum of v[i] over its lanes, added up in the order of sum().
LLMCOMPRESS_INLINE F4 sums(const F16* v) {
    const F4 a = folded(v[0]), b = folded(v[1]), c = folded(v[2]), d = folded(v[3]);
    const F4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const F4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    const F4 first = ab + ab_high, second = cd + cd_high;  // lanes 0 + 2 of both, then 1 + 3
    return __builtin_shufflevector(first, second, 0, 1, 4, 5) + __builtin_shufflevector(first, second, 2, 3, 6, 7);
}
#endif

LLMCOMPRESS_INLINE F16 maximum(F16 a, F16 b) { return choose(a > b, a, b); }

inline float largest(F16 v) {
#if LLMCOMPRESS_LEVEL >= 4
    float m = v[0];
    for (int i = 1; i < 16; ++i) m = v[i] > m ? v[i] : m;
    return m;
#else
    float all[LANES];
    store(all, v);
    float m = all[0];
    for (int i = 1; i < LANES; ++i) m = all[i] > m ? all[i] : m;
    return m;
#endif
}

// v in lanes [from, to), LOWEST in others
template <class V>
LLMCOMPRESS_INLINE V within(V v, int64_t from, int64_t to) {
    if constexpr (sizeof(V) == sizeof(FN)) {
        constexpr int32_t count[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const IN lanes = load<IN>(count);
        const int32_t low = int32_t(std::max<int64_t>(from, 0)), high = int32_t(std::min<int64_t>(to, LANES));
        return choose((lanes >= low) & (lanes < high), v, spread_as<V>(LOWEST));
    } else {
        constexpr int half = sizeof(V) / 8;
        return {within(v.a, from, to), within(v.b, from - half, to - half)};
    }
}

// 2^n of whole numbers
LLMCOMPRESS_INLINE FN power_of_two(FN n) { return (FN)((__builtin_convertvector(n, IN) + 127) << 23); }
template <class V>
LLMCOMPRESS_INLINE Two<V> power_of_two(Two<V> n) { return {power_of_two(n.a), power_of_two(n.b)}; }

// e^x to about 1 ulp for x <= 88, 0 below -87.3
LLMCOMPRESS_INLINE F16 exponential(F16 x) {
    const F16 top = spread(88.f), bottom = spread(-87.3f);
    const auto tiny = x < bottom;
    x = choose(x > top, top, x);
    x = choose(x < bottom, bottom, x);
    F16 n = x * 1.44269504088896341f;
    // adding and taking away 1.5 * 2^23 rounds to the nearest integer
    n = (n + 12582912.f) - 12582912.f;
    F16 r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    F16 p = spread(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    return choose(tiny, F16{}, p * power_of_two(n));
}

}  // namespace LLMCOMPRESS_ISA
