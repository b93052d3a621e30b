// Sixteen floats as one value. GCC's vector types compile to whatever the including file's target offers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "decode.h"
#include "llmcompress/types.h"


// full unrolling pays where sixteen floats are one register, and elsewhere only costs compile time
#if LLMCOMPRESS_LEVEL >= 4
#define LLMCOMPRESS_UNROLL _Pragma("GCC unroll 8")
#else
#define LLMCOMPRESS_UNROLL _Pragma("GCC unroll 1")
#endif

namespace LLMCOMPRESS_ISA {

using namespace llmcompress;
using namespace llmcompress::decode;

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint16_t H16 __attribute__((vector_size(32)));

// stands for minus infinity: its exponential is 0, and it has a difference to itself
constexpr float LOWEST = -3.0e38f;

template <class V>
inline V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, F16 v) { std::memcpy(p, &v, sizeof v); }

inline F16 spread(float x) { return x - F16{}; }

inline F16 load_float(const float* p) { return load<F16>(p); }

// bf16 is the upper half of a float
inline F16 load_float(const uint16_t* p) {
    return (F16)(__builtin_convertvector(load<H16>(p), U16) << 16);
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

inline float sum(F16 v) {
    auto eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    auto four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

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

inline float largest(F16 v) {
    float m = v[0];
    for (int i = 1; i < 16; ++i) m = v[i] > m ? v[i] : m;
    return m;
}

inline F16 maximum(F16 a, F16 b) { return a > b ? a : b; }

// e^x to about 1 ulp for x <= 88, 0 below -87.3
inline F16 exponential(F16 x) {
    F16 top = spread(88.f), bottom = spread(-87.3f);
    I16 tiny = x < bottom;
    x = x > top ? top : x;
    x = x < bottom ? bottom : x;
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
    I16 e = (__builtin_convertvector(n, I16) + 127) << 23;
    F16 y = p * (F16)e;
    return tiny ? F16{} : y;
}

}  // namespace LLMCOMPRESS_ISA
