// Sixteen rows at a time in GCC's vector types, compiled to what the including file's target offers. No include guard:
// included once for each instruction set.
namespace LLMCOMPRESS_ISA {

using namespace llmcompress::columns;

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));

// whether sixteen sums and what they are made from fit the registers
constexpr bool kManyRegisters = LLMCOMPRESS_MANY_REGISTERS;
constexpr float kHalfMax = 65504.f;
constexpr float kHalfTiny = 0x1p-24f;
constexpr float kHalfNormal = 0x1p-14f;
// adding and taking away 1.5 * 2^23 rounds values below 2^22 to the nearest integer
constexpr float kMagic = 12582912.f;

inline F16 load(const float* p) {
    F16 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, F16 v) { std::memcpy(p, &v, sizeof v); }
inline F16 spread(float x) { return x - F16{}; }
inline F16 least(F16 a, F16 b) { return a < b ? a : b; }
inline F16 most(F16 a, F16 b) { return a > b ? a : b; }
inline F16 clamp(F16 x, F16 low, F16 high) { return least(most(x, low), high); }
inline F16 rounded(F16 x) { return (x + kMagic) - kMagic; }

// The nearest fp16 value of x in [2^-24, 65504].
inline F16 to_half(F16 x) {
    const U16 bits = (U16)x;
    const F16 normal = (F16)((bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fffu);
    const F16 small = rounded(x * 0x1p24f) * 0x1p-24f;
    return x < spread(kHalfNormal) ? small : normal;
}

inline uint16_t half_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return x < kHalfNormal ? uint16_t(x * 0x1p24f) : uint16_t((bits >> 13) - (112u << 10));
}

}  // namespace LLMCOMPRESS_ISA
