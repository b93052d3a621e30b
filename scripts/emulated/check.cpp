// Holds definitions.h to a processor that has AVX-512, or, where SIMDE is defined, to SIMDe, without one.
//
// Prints how many numbers differ for every intrinsic that does not give the same bits, and how many were compared.
#include "definitions.h"

#include <cstdio>
#include <iterator>
#include <random>

#ifdef SIMDE
#define SIMDE_NO_INLINE
#include <simde/x86/avx512.h>
#endif

namespace {

constexpr int kRounds = 20000;

struct Input {
    alignas(64) unsigned char bytes[3][64];
    alignas(64) float finite[2][16];  // the same without NaN, of which other bits come out, and without infinities
    alignas(64) float small[16];
};

// A register of an input, as floats or integers, whole or half. No functions: with and without AVX-512 they would return
// registers in other ways.
#define F(i) (*reinterpret_cast<const __m512*>(in.bytes[i]))
#define I(i) (*reinterpret_cast<const __m512i*>(in.bytes[i]))
#define F8(i) (*reinterpret_cast<const __m256*>(in.bytes[i]))
#define I8(i) (*reinterpret_cast<const __m256i*>(in.bytes[i]))
#define I4(i) (*reinterpret_cast<const __m128i*>(in.bytes[i]))
#define K(i) (*reinterpret_cast<const uint16_t*>(in.bytes[i]))
#define FINITE(i) (*reinterpret_cast<const __m512*>(in.finite[i]))
#define SMALL (*reinterpret_cast<const __m512*>(in.small))

// Of every intrinsic of definitions.h a call. EITHER has those that SIMDe has too, and as the processor does.
#define EITHER(OP, _) \
    OP(cmp_eq, _(mm512_cmp_ps_mask)(F(0), F(1), _CMP_EQ_OQ)) \
    OP(cmp_lt, _(mm512_cmp_ps_mask)(F(0), F(1), _CMP_LT_OS)) \
    OP(cmp_le, _(mm512_cmp_ps_mask)(F(0), F(1), _CMP_LE_OS)) \
    OP(cmp_unordered, _(mm512_cmp_ps_mask)(F(0), F(1), _CMP_UNORD_Q)) \
    OP(cmp_neq, _(mm512_cmp_ps_mask)(F(0), F(1), _CMP_NEQ_UQ)) \
    OP(cmp_nlt, _(mm512_cmp_ps_mask)(F(0), F(1), _CMP_NLT_UQ)) \
    OP(cmp_nle, _(mm512_cmp_ps_mask)(F(0), F(1), _CMP_NLE_UQ)) \
    OP(cmp_ordered, _(mm512_cmp_ps_mask)(F(0), F(1), _CMP_ORD_Q)) \
    OP(cmp_nge, _(mm512_cmp_ps_mask)(F(0), F(1), _CMP_NGE_UQ)) \
    OP(cmp_ngt, _(mm512_cmp_ps_mask)(F(0), F(1), _CMP_NGT_UQ)) \
    OP(cmp_neq_ordered, _(mm512_cmp_ps_mask)(F(0), F(1), _CMP_NEQ_OQ)) \
    OP(cmp_ge, _(mm512_cmp_ps_mask)(F(0), F(1), _CMP_GE_OS)) \
    OP(cmp_gt, _(mm512_cmp_ps_mask)(F(0), F(1), _CMP_GT_OS)) \
    OP(cmp_half, _(mm256_cmp_ps_mask)(F8(0), F8(1), _CMP_LT_OS)) \
    OP(test, _(mm512_mask_test_epi16_mask)(*reinterpret_cast<const uint32_t*>(in.bytes[2]), I(0), I(1))) \
    OP(ternary, _(mm512_ternarylogic_epi32)(I(0), I(1), I(2), 0xca)) \
    OP(ternary_other, _(mm512_ternarylogic_epi32)(I(0), I(1), I(2), 0x28)) \
    OP(products, _(mm512_dpbusd_epi32)(I(0), I(1), I(2))) \
    OP(shuffle, _(mm512_shuffle_ps)(F(0), F(1), 0xdd)) \
    OP(shuffle_other, _(mm512_shuffle_ps)(F(0), F(1), 0x1b)) \
    OP(quarters, _(mm512_shuffle_i64x2)(I(0), I(1), 0xd8)) \
    OP(quarters_32, _(mm512_shuffle_i32x4)(I(0), I(1), 0x4e)) \
    OP(quarters_floats, _(mm512_shuffle_f32x4)(F(0), F(1), 0x88)) \
    OP(permute_bytes, _(mm512_permutexvar_epi8)(I(0), I(1))) \
    OP(permute_two, _(mm512_permutex2var_epi8)(I(0), I(1), I(2)))

// The others. Stores write over a part of the second register.
#define PROCESSOR(OP, _) \
    OP(load, _(mm512_load_ps)(in.bytes[0])) \
    OP(load_integers, _(mm512_load_si512)(in.bytes[0])) \
    OP(load_part, _(mm512_maskz_loadu_ps)(K(1), in.bytes[0] + 4)) \
    OP(store, (_(mm512_store_ps)(in.bytes[1], F(0)), I(1))) \
    OP(store_integers, (_(mm512_store_si512)(in.bytes[1], I(0)), I(1))) \
    OP(store_part, (_(mm512_mask_store_ps)(in.bytes[1], K(2), F(0)), I(1))) \
    OP(store_part_unaligned, (_(mm512_mask_storeu_ps)(in.bytes[1] + 4, K(2) & 0x7fff, F(0)), I(1))) \
    OP(store_halves, (_(mm256_mask_storeu_epi16)(in.bytes[1] + 2, K(2), I8(0)), I(1))) \
    OP(from_integers, _(mm512_cvtepi32_ps)(I(0))) \
    OP(to_integers, _(mm512_cvtps_epi32)(F(0))) \
    OP(from_halves, _(mm512_cvtph_ps)(I8(0))) \
    OP(to_halves, _(mm512_cvtps_ph)(F(0), 0)) \
    OP(widen_16_unsigned, _(mm512_cvtepu16_epi32)(I8(0))) \
    OP(widen_16, _(mm512_cvtepi16_epi32)(I8(0))) \
    OP(widen_8, _(mm512_cvtepu8_epi32)(I4(0))) \
    OP(narrow_16, _(mm512_cvtepi32_epi16)(I(0))) \
    OP(narrow_8, _(mm512_cvtepi32_epi8)(I(0))) \
    OP(cmp_masked, _(mm512_mask_cmp_ps_mask)(K(2), F(0), F(1), _CMP_NGE_UQ)) \
    OP(cmp_eq_or_unordered, _(mm512_cmp_ps_mask)(F(0), F(1), _CMP_EQ_UQ)) \
    OP(cmp_never, _(mm512_cmp_ps_mask)(F(0), F(1), _CMP_FALSE_OQ)) \
    OP(cmp_always, _(mm512_cmp_ps_mask)(F(0), F(1), _CMP_TRUE_UQ)) \
    OP(cmp_integers, _(mm256_cmplt_epu32_mask)(I8(0), I8(1))) \
    OP(test_none, _(mm512_testn_epi16_mask)(I(0), I(1))) \
    OP(sum, _(mm512_reduce_add_ps)(FINITE(0))) \
    OP(sum_integers, _(mm512_reduce_add_epi32)(I(0))) \
    OP(most, _(mm512_reduce_max_ps)(FINITE(0))) \
    OP(most_integers, _(mm512_reduce_max_epu32)(I(0))) \
    OP(scale, _(mm512_scalef_ps)(F(0), SMALL)) \
    OP(range_most, _(mm512_range_ps)(FINITE(0), FINITE(1), 0x0b)) \
    OP(range_least, _(mm512_range_ps)(FINITE(0), FINITE(1), 0x04)) \
    OP(round, _(mm512_roundscale_ps)(FINITE(0), 0)) \
    OP(shift, _(mm512_srai_epi32)(I(0), 7)) \
    OP(shift_out, _(mm512_srai_epi32)(I(0), 40)) \
    OP(shift_two, _(mm512_shldi_epi16)(I(0), I(1), 4)) \
    OP(permute, _(mm512_permute_ps)(F(0), 0x39)) \
    OP(half, _(mm512_extractf32x8_ps)(F(0), 1)) \
    OP(reciprocal, reciprocal_is_near(in, _(mm512_rcp14_ps)(F(0))))

using emulated::read;

// Lanes of which the reciprocal is a normal number and `y` is within 2^-14 of it; the others count as near.
template <class T>
int reciprocal_is_near(const Input& in, const T& y) {
    int near = 0;
    for (int i = 0; i < 16; ++i) {
        const double exact = 1 / double(read<float>(in.bytes[0], i));
        const bool normal = std::fabs(exact) > 2.4e-38 && std::fabs(exact) < 1.6e38;
        near += !normal || std::fabs(read<float>(&y, i) / exact - 1) <= std::ldexp(1, -14);
    }
    return near;
}

using Result = unsigned char[64];
template <class T>
void put(Result& out, const T& value) {
    static_assert(sizeof value <= sizeof out);
    std::memcpy(out, &value, sizeof value);
}

struct Case {
    const char* name;
    void (*run)(Input&, Result&);
};
#define CASE(name, call) {#name, [](Input& in, Result& out) { put(out, call); }},

#define OURS(name) emulated::name
const Case ours[] = {
    EITHER(CASE, OURS)
#ifndef SIMDE
    PROCESSOR(CASE, OURS)
#endif
};

#ifdef SIMDE
#define THEIRS(name) simde_##name
const Case theirs[] = {EITHER(CASE, THEIRS)};
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx512vbmi2")
#define THEIRS(name) _##name
const Case theirs[] = {EITHER(CASE, THEIRS) PROCESSOR(CASE, THEIRS)};
#pragma GCC pop_options
#endif

}  // namespace

int main() {
    std::mt19937 random(0);
    // the numbers at which floats, halves and small integers end
    const uint32_t edges[] = {0,          0x80000000, 1,          0x80000001, 0x007fffff, 0x00800000, 0x3f000000, 0x3fc00000,
                              0x40200000, 0x7f7fffff, 0x7f800000, 0xff800000, 0x7fc00000, 0x80008000, 0x7fff7fff, 0xffffffff};
    long differ = 0, compared = 0;
    for (size_t at = 0; at < std::size(ours); ++at) {
        long here = 0;
        for (int round = 0; round < kRounds; ++round) {
            Input in;
            for (auto& part : in.bytes)
                for (int i = 0; i < 16; ++i) {
                    uint32_t word = random();
                    // a third are edges, a third floats of one size, which may be equal
                    if (word % 3 == 0) word = edges[random() % 16];
                    else if (word % 3 == 1) word = emulated::same_bits<uint32_t>(float(int(random() % 2001) - 1000) / 8);
                    std::memcpy(part + 4 * i, &word, 4);
                }
            for (int i = 0; i < 16; ++i) {
                in.small[i] = float(int(read<uint32_t>(in.bytes[1], i) % 6001) - 3000) / 10;
                for (int which = 0; which < 2; ++which) {
                    uint32_t word = read<uint32_t>(in.bytes[which], i);
                    if ((word & 0x7f800000) == 0x7f800000) word ^= 0x40000000;
                    in.finite[which][i] = emulated::same_bits<float>(word);
                }
            }
            Result mine = {}, other = {};
            Input again = in;  // stores write over it
            ours[at].run(in, mine), theirs[at].run(again, other);
            here += std::memcmp(mine, other, 64) != 0;
        }
        if (here != 0) std::printf("%s: %ld of %d differ\n", ours[at].name, here, kRounds);
        differ += here, compared += kRounds;
    }
    std::printf("%ld compared, %ld off\n", compared, differ);
    return differ != 0;
}
