// Conversions between fp32, bf16 and fp16, one value at a time.
#pragma once

#include <cstdint>
#include <cstring>

namespace llmcompress {

inline uint32_t bits_of(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return u;
}
inline float float_of(uint32_t u) {
    float x;
    std::memcpy(&x, &u, 4);
    return x;
}
inline float bf16_to_float(uint16_t h) { return float_of(uint32_t(h) << 16); }
inline uint16_t float_to_bf16(float x) {
    const uint32_t u = bits_of(x);
    if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16 | 0x40);  // a NaN stays one
    return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float half_to_float(uint16_t h) {
    // the exponent is moved by multiplying, which also normalizes subnormal numbers
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13;
    if (rest >= 0x0f800000) return float_of(sign | 0x7f800000 | (rest & 0x7fffff));
    return float_of(sign | bits_of(float_of(rest) * 0x1p112f));
}
inline uint16_t float_to_half(float x) {
    const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000;
    uint32_t rest = u & 0x7fffffff;
    if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
    if (rest < 0x38800000) {                                  // subnormal: let the adder round
        const float shifted = float_of(rest) + 0.5f;
        return uint16_t(sign | (bits_of(shifted) - 0x3f000000));
    }
    rest += 0xfff + (rest >> 13 & 1);
    return uint16_t(sign | (rest - 0x38000000) >> 13);
}

}  // namespace llmcompress
