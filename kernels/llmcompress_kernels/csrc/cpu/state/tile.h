// One head's state [P, N] in vectors of 16: decode, update, Decoupled Scale Quantization, encode.
//
// N is walked in "pairs": 32 neighbouring states as two vectors, the even ones and the odd ones, because that is how
// 4-bit codes lie in a byte. B and C are put into the same order once per token. Codes must equal those of the plain
// PyTorch definition, so nothing that decides a code may be fused or reordered, but where the definition says so: the mean
// is summed in halves, which the even/odd order keeps, and divisions by a scale are done as products with its reciprocal
// only where that provably rounds to the same code or scale; near a rounding boundary the division itself is done.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "wide.h"

namespace state {

constexpr float kSmallest = 5.9604644775390625e-08f;  // 2^-24
constexpr float kLargest = 65504.0f;
constexpr float kNormal = 6.2e-5f;  // above the smallest normal fp16, 2^-14
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
constexpr int kRows = 16;
constexpr int kMaxStates = 256;
constexpr int kMaxChannels = 256;

STATE_INLINE __m512 half_to_float(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

STATE_INLINE __m256i to_half(__m512 v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

STATE_INLINE __m512 clamp_scale(__m512 v) {
  return _mm512_min_ps(_mm512_max_ps(v, _mm512_set1_ps(kSmallest)), _mm512_set1_ps(kLargest));
}

// [N] in natural order -> pairs of (even, odd) vectors
STATE_INLINE void split_pairs(const float* in, float* out, int n) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (int i = 0; i < n; i += 32) {
    const __m512 low = _mm512_loadu_ps(in + i), high = _mm512_loadu_ps(in + i + 16);
    _mm512_storeu_ps(out + i, _mm512_permutex2var_ps(low, even, high));
    _mm512_storeu_ps(out + i + 16, _mm512_permutex2var_ps(low, odd, high));
  }
}

STATE_INLINE void join_pairs(const float* in, float* out, int n) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int i = 0; i < n; i += 32) {
    const __m512 even = _mm512_loadu_ps(in + i), odd = _mm512_loadu_ps(in + i + 16);
    _mm512_storeu_ps(out + i, _mm512_permutex2var_ps(even, low, odd));
    _mm512_storeu_ps(out + i + 16, _mm512_permutex2var_ps(even, high, odd));
  }
}

// What an operation makes of each of 16 vectors, in any order.
template <class Fold>
STATE_INLINE __m512 fold_rows(const float (*rows)[16], Fold fold) {
  __m512 four[4];
  for (int q = 0; q < 4; ++q) {
    __m512 two[2];
    for (int h = 0; h < 2; ++h) {
      const __m512 a = _mm512_load_ps(rows[4 * q + 2 * h]), b = _mm512_load_ps(rows[4 * q + 2 * h + 1]);
      two[h] = fold(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    const __m512d x = _mm512_castps_pd(two[0]), y = _mm512_castps_pd(two[1]);
    four[q] = fold(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  // each vector: four 128-bit lanes of partial results of rows 4q .. 4q+3
  const __m512 ab = fold(_mm512_shuffle_f32x4(four[0], four[1], 0x88), _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
  const __m512 cd = fold(_mm512_shuffle_f32x4(four[2], four[3], 0x88), _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
  return fold(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}

// Sixteen vectors turned: lane i of vector j becomes lane j of vector i.
STATE_INLINE void turn_rows(__m512* rows) {
  __m512 two[16], four[16];
  for (int i = 0; i < 16; i += 2) {
    two[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    two[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int h = 0; h < 2; ++h) {
      const __m512d low = _mm512_castps_pd(two[i + h]), high = _mm512_castps_pd(two[i + 2 + h]);
      four[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      four[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // 128-bit lane q of four[4 p + k]: vectors 4 p to 4 p + 3 of lane 4 q + k
  for (int k = 0; k < 4; ++k) {
    const __m512 a = _mm512_shuffle_f32x4(four[k], four[4 + k], 0x44), b = _mm512_shuffle_f32x4(four[8 + k], four[12 + k], 0x44);
    const __m512 c = _mm512_shuffle_f32x4(four[k], four[4 + k], 0xee), d = _mm512_shuffle_f32x4(four[8 + k], four[12 + k], 0xee);
    rows[k] = _mm512_shuffle_f32x4(a, b, 0x88);
    rows[4 + k] = _mm512_shuffle_f32x4(a, b, 0xdd);
    rows[8 + k] = _mm512_shuffle_f32x4(c, d, 0x88);
    rows[12 + k] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
}

// Sixteen channels of a float state, of which from[n * lanes] has those of state n, become rows to [16, N]; in pairs if
// these are to be packed.
STATE_INLINE void turn_channels(const float* from, int64_t lanes, int64_t states, bool pairs, float* to) {
  // sixteen states at a time: those that follow, or of pairs the even or the odd ones of 32
  const int64_t step = pairs ? 2 : 1;
  for (int64_t n = 0; n < states; n += 16) {
    const int64_t first = pairs ? n / 32 * 32 + n % 32 / 16 : n;
    __m512 rows[16];
    for (int64_t k = 0; k < 16; ++k) rows[k] = _mm512_loadu_ps(from + (first + k * step) * lanes);
    turn_rows(rows);
    for (int64_t k = 0; k < 16; ++k) _mm512_storeu_ps(to + k * states + n, rows[k]);
  }
}

// Sums of 16 vectors; any order of additions.
STATE_INLINE __m512 sum_rows(const float (*rows)[16]) {
  return fold_rows(rows, [&](__m512 a, __m512 b) __attribute__((always_inline)) { return _mm512_add_ps(a, b); });
}

// The same of whole numbers, whose bits the vectors hold.
STATE_INLINE __m512i sum_integer_rows(const float (*rows)[16]) {
  return _mm512_castps_si512(fold_rows(rows, [&](__m512 a, __m512 b) __attribute__((always_inline)) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }));
}

// Sums of 16 rows given as (even, odd) vectors, the second half added to the first until one value is left:
// 8 onto 8, 4 onto 4, 2 onto 2, 1 onto 1 within each vector, at last odd onto even.
STATE_INLINE __m512 folded_sum_rows(const float (*even)[16], const float (*odd)[16]) {
  __m512 eight[8];
  for (int i = 0; i < 8; ++i) {
    __m512 row[2];
    for (int h = 0; h < 2; ++h) {
      const __m512 e = _mm512_load_ps(even[2 * i + h]), o = _mm512_load_ps(odd[2 * i + h]);
      // [e 0-7, o 0-7] + [e 8-15, o 8-15]
      row[h] = _mm512_add_ps(_mm512_shuffle_f32x4(e, o, 0x44), _mm512_shuffle_f32x4(e, o, 0xee));
    }
    // lanes: row0 even, row0 odd, row1 even, row1 odd; four values each
    eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(row[0], row[1], 0x88), _mm512_shuffle_f32x4(row[0], row[1], 0xdd));
  }
  __m512 four[4];
  for (int i = 0; i < 4; ++i) {
    four[i] = _mm512_add_ps(_mm512_shuffle_ps(eight[2 * i], eight[2 * i + 1], 0x44),
                            _mm512_shuffle_ps(eight[2 * i], eight[2 * i + 1], 0xee));
  }
  __m512 two[2];
  for (int i = 0; i < 2; ++i) {
    two[i] = _mm512_add_ps(_mm512_shuffle_ps(four[2 * i], four[2 * i + 1], 0x88),
                           _mm512_shuffle_ps(four[2 * i], four[2 * i + 1], 0xdd));
  }
  // lanes of two[i]: even sums of rows {0,2,4,6}+8i, odd sums of the same, even of {1,3,5,7}+8i, odd of them
  const __m512 evens = _mm512_shuffle_f32x4(two[0], two[1], 0x88), odds = _mm512_shuffle_f32x4(two[0], two[1], 0xdd);
  const __m512 sums = _mm512_add_ps(evens, odds);
  const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  return _mm512_permutexvar_ps(order, sums);
}

// Signed codes of one pair, from bytes.
template <int Bits>
STATE_INLINE void decode_pair(const uint8_t* bytes, __m512& even, __m512& odd) {
  if constexpr (Bits == 4) {
    const __m512i raw = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    if constexpr (!kAvx512) {  // two shifts and a conversion are less than what stands for a permutation of sixteen
      even = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(raw, 28), 28));
      odd = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(raw, 24), 28));
      return;
    }
    // a permutation looks at the lowest four bits of its index only
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    even = _mm512_permutexvar_ps(raw, values);
    odd = _mm512_permutexvar_ps(_mm512_srli_epi32(raw, 4), values);
  } else {
    const __m512i raw = _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
    even = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(raw, 24), 24));
    odd = _mm512_cvtepi32_ps(_mm512_srai_epi32(raw, 8));
  }
}

// Codes come as floats code + kRound, whose lowest bits are the code in two's complement; the narrowing drops the rest.
template <int Bits>
STATE_INLINE void encode_pair(uint8_t* bytes, __m512 even, __m512 odd) {
  const __m512i mask = _mm512_set1_epi32((1 << Bits) - 1), high = _mm512_slli_epi32(_mm512_castps_si512(odd), Bits);
  const __m512i both = _mm512_ternarylogic_epi32(mask, _mm512_castps_si512(even), high, 0xca);  // mask ? even : high
  if constexpr (Bits == 4) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtepi32_epi8(both));
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes), _mm512_cvtepi32_epi16(both));
  }
}

template <int Bits>
STATE_INLINE int pair_bytes() {
  return Bits == 4 ? 16 : 32;
}

STATE_INLINE float half_scalar(uint16_t h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }

// Scales of a tile. `even`, `odd` hold each row's folded |u| of the last sixteen rows.
struct Scales {
  alignas(64) float channel[kMaxChannels];
  alignas(64) float inverse[kMaxChannels];
  alignas(64) float step[kMaxStates];     // state scale / qmax, in pairs
  alignas(64) float unstep[kMaxStates];   // its reciprocal
  alignas(64) float dither[kMaxStates];   // what is added before rounding, where that is asked for
  bool wide;                              // a state scale was clamped or is subnormal: codes need clamping
};

// What the bits of state scales add before rounding, in units of a step: sixteen values between -1/2 and 1/2.
STATE_INLINE __m512 dither_of(__m256i half) {
  const __m512i product = _mm512_mullo_epi32(_mm512_cvtepu16_epi32(half), _mm512_set1_epi32(40503));
  const __m512i level = _mm512_and_si512(_mm512_srli_epi32(product, 12), _mm512_set1_epi32(15));
  return _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(level), _mm512_set1_ps(7.5f)), _mm512_set1_ps(0.0625f));
}

// Adds the pairs of a row in halves, which is the order of the definition's sum; what is left goes to even and odd.
template <int J>
STATE_INLINE void fold_pairs(__m512* pairs, float* even, float* odd) {
  for (int w = J / 2; w >= 1; w /= 2) {
    for (int j = 0; j < w; ++j) {
      pairs[2 * j] = _mm512_add_ps(pairs[2 * j], pairs[2 * (j + w)]);
      pairs[2 * j + 1] = _mm512_add_ps(pairs[2 * j + 1], pairs[2 * (j + w) + 1]);
    }
  }
  _mm512_store_ps(even, pairs[0]);
  _mm512_store_ps(odd, pairs[1]);
}

// Channel scales of sixteen rows.
STATE_INLINE void channel_scales(Scales& s, int row, const float (*even)[16], const float (*odd)[16], int n, uint16_t* out) {
  const __m512 mean = _mm512_mul_ps(folded_sum_rows(even, odd), _mm512_set1_ps(1.0f / n));
  const __m256i half = to_half(clamp_scale(_mm512_sqrt_ps(mean)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + row), half);
  const __m512 value = _mm512_cvtph_ps(half);
  _mm512_store_ps(s.channel + row, value);
  _mm512_store_ps(s.inverse + row, _mm512_div_ps(_mm512_set1_ps(1.0f), value));
}

// State scales of a finished tile from the largest |u| / channel, found by products; `out` is in natural order.
template <int J>
STATE_INLINE void state_scales(Scales& s, const float* tile, const __m512* largest, int p, float qmax, uint16_t* out) {
  constexpr int n = 32 * J;
  const __m512 magnitude = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
  alignas(64) float scale[n], natural[n];
  s.wide = false;
  for (int v = 0; v < 2 * J; ++v) {
    __m512 most = largest[v];
    const __m256i low = to_half(clamp_scale(_mm512_mul_ps(most, _mm512_set1_ps(1.0f - 4e-7f))));
    const __m256i high = to_half(clamp_scale(_mm512_mul_ps(most, _mm512_set1_ps(1.0f + 4e-7f))));
    if (_mm256_movemask_epi8(_mm256_cmpeq_epi16(low, high)) != -1) {
      most = _mm512_setzero_ps();
      for (int r = 0; r < p; ++r) {
        const __m512 size = _mm512_and_ps(_mm512_load_ps(tile + r * n + 16 * v), magnitude);
        most = _mm512_max_ps(most, _mm512_div_ps(size, _mm512_set1_ps(s.channel[r])));
      }
    }
    // beyond fp16's normal numbers a scale may be far below the maximum that it stands for
    const __mmask16 tiny = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(most, _mm512_setzero_ps(), _CMP_GT_OQ), most,
                                                   _mm512_set1_ps(kNormal), _CMP_LT_OQ);
    s.wide |= (tiny | _mm512_cmp_ps_mask(most, _mm512_set1_ps(kLargest), _CMP_GE_OQ)) != 0;
    const __m256i half = to_half(clamp_scale(most));
    const __m512 value = _mm512_cvtph_ps(half);
    _mm512_store_ps(s.dither + 16 * v, dither_of(half));
    const __m512 step = _mm512_div_ps(value, _mm512_set1_ps(qmax));
    _mm512_store_ps(scale + 16 * v, value);
    _mm512_store_ps(s.step + 16 * v, step);
    _mm512_store_ps(s.unstep + 16 * v, _mm512_div_ps(_mm512_set1_ps(1.0f), step));
  }
  if (out != nullptr) {
    join_pairs(scale, natural, n);
    for (int i = 0; i < n; i += 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), to_half(_mm512_load_ps(natural + i)));
    }
  }
}

// A state that holds NaN stays NaN, as in the definition: the maxima above leave NaN out, and scales came out finite. It is
// in all columns where the mean of a row is one.
template <int J, bool Static>
__attribute__((noinline)) void keep_nan(Scales& s, const float* tile, int p, uint16_t* out) {
  constexpr int n = 32 * J;
  alignas(64) float marks[n], natural[n];
  __mmask16 columns[2 * J], any = 0;
  for (int v = 0; v < 2 * J; ++v) {
    columns[v] = 0;
    for (int r = 0; r < p; ++r) {
      const __m512 u = _mm512_load_ps(tile + r * n + 16 * v);
      columns[v] |= _mm512_cmp_ps_mask(u, u, _CMP_UNORD_Q);
    }
    any |= columns[v];
  }
  const __m512 nan = _mm512_set1_ps(__builtin_nanf(""));
  for (int v = 0; v < 2 * J; ++v) {
    const __mmask16 mask = Static ? columns[v] : any != 0 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>(0);
    _mm512_mask_store_ps(s.step + 16 * v, mask, nan);
    _mm512_store_ps(marks + 16 * v, _mm512_maskz_mov_ps(mask, nan));
  }
  if (out == nullptr) return;
  join_pairs(marks, natural, n);
  for (int i = 0; i < n; i += 16) {
    const __m512 mark = _mm512_load_ps(natural + i);
    _mm256_mask_storeu_epi16(out + i, _mm512_cmp_ps_mask(mark, mark, _CMP_UNORD_Q), to_half(mark));
  }
}

// The same after adding a dither, of products with reciprocals, as the definition has them then.
template <int J>
STATE_INLINE void dithered_codes(const Scales& s, const float* row, int r, float qmax, __m512* codes) {
  const __m512 inverse = _mm512_set1_ps(s.inverse[r]), most = _mm512_set1_ps(qmax), least = _mm512_set1_ps(-qmax);
  for (int v = 0; v < 2 * J; ++v) {
    const __m512 part = _mm512_mul_ps(_mm512_load_ps(row + 16 * v), inverse);
    // halves to even, then clamped: a value between qmax and qmax + 1/2 gives qmax either way
    const __m512 value = _mm512_fmadd_ps(part, _mm512_load_ps(s.unstep + 16 * v), _mm512_load_ps(s.dither + 16 * v));
    codes[v] = _mm512_add_ps(_mm512_min_ps(_mm512_max_ps(value, least), most), _mm512_set1_ps(kRound));
  }
}

// Codes of one row, each as the float code + kRound.
template <int J>
STATE_INLINE void row_codes(const Scales& s, const float* row, int r, float qmax, __m512* codes) {
  const __m512 inverse = _mm512_set1_ps(s.inverse[r]), round = _mm512_set1_ps(kRound);
  __m512 worst = _mm512_setzero_ps();
  for (int v = 0; v < 2 * J; ++v) {
    const __m512 part = _mm512_mul_ps(_mm512_load_ps(row + 16 * v), inverse), unstep = _mm512_load_ps(s.unstep + 16 * v);
    codes[v] = _mm512_fmadd_ps(part, unstep, round);
    const __m512 off = _mm512_fmsub_ps(part, unstep, _mm512_sub_ps(codes[v], round));
    worst = _mm512_range_ps(worst, off, 0x0b);  // larger magnitude, sign cleared
  }
  const float edge = 0.5f - 8e-7f * qmax;
  if (__builtin_expect(!s.wide && _mm512_cmp_ps_mask(worst, _mm512_set1_ps(edge), _CMP_NLT_UQ) == 0, 1)) return;
  const __m512 channel = _mm512_set1_ps(s.channel[r]);
  for (int v = 0; v < 2 * J; ++v) {
    const __m512 step = _mm512_mul_ps(channel, _mm512_load_ps(s.step + 16 * v));
    __m512 value = _mm512_div_ps(_mm512_load_ps(row + 16 * v), step);
    value = _mm512_min_ps(_mm512_max_ps(value, _mm512_set1_ps(-qmax)), _mm512_set1_ps(qmax));
    codes[v] = _mm512_add_ps(value, round);
  }
}

// How the channel scale comes about: from the state, calibrated, or from the state and then refitted to the codes; and the
// first two with a dither before rounding.
enum Mode { kDynamic, kCalibrated, kRefitted, kDithered, kCalibratedDithered };

constexpr bool calibrated(Mode mode) { return mode == kCalibrated || mode == kCalibratedDithered; }
constexpr bool dithered(Mode mode) { return mode == kDithered || mode == kCalibratedDithered; }

inline Mode mode_of(const void* fixed, int64_t refit, int64_t dither) {
  if (dither != 0) return fixed != nullptr ? kCalibratedDithered : kDithered;
  return fixed != nullptr ? kCalibrated : refit != 0 ? kRefitted : kDynamic;
}

template <int J, Mode mode>
STATE_INLINE void codes_of_row(const Scales& s, const float* row, int r, float qmax, __m512* codes) {
  if constexpr (dithered(mode)) {
    dithered_codes<J>(s, row, r, qmax, codes);
  } else {
    row_codes<J>(s, row, r, qmax, codes);
  }
}

// Refits the channel scales of sixteen rows by least squares: times sum q v / sum q^2, v = (u / channel) / step.
struct Refit {
  alignas(64) float even[kRows][16], odd[kRows][16], squares[kRows][16];

  // Row i of the sixteen; `codes` as row_codes gives them.
  template <int J>
  inline __attribute__((always_inline)) void add(const Scales& s, const float* row, int r, int i, const __m512* codes) {
    const __m512 inverse = _mm512_set1_ps(s.inverse[r]);
    __m512 product[2 * J], square = _mm512_setzero_ps();
    for (int v = 0; v < 2 * J; ++v) {
      const __m512 code = _mm512_sub_ps(codes[v], _mm512_set1_ps(kRound));
      const __m512 value = _mm512_mul_ps(_mm512_mul_ps(_mm512_load_ps(row + 16 * v), inverse), _mm512_load_ps(s.unstep + 16 * v));
      product[v] = _mm512_mul_ps(code, value);
      square = _mm512_fmadd_ps(code, code, square);  // integers below 2^24: exact in any order
    }
    fold_pairs<J>(product, even[i], odd[i]);
    _mm512_store_ps(squares[i], square);
  }

  // The refitted scales of rows base .. base + 15.
  inline __attribute__((always_inline)) __m256i scales(const Scales& s, int base) {
    const __m512 top = folded_sum_rows(even, odd), below = sum_rows(squares), zero = _mm512_setzero_ps();
    const __mmask16 fits = _mm512_cmp_ps_mask(top, zero, _CMP_GT_OQ) & _mm512_cmp_ps_mask(below, zero, _CMP_GT_OQ);
    const __m512 ratio = _mm512_mask_div_ps(_mm512_set1_ps(1.0f), fits, top, below);
    return to_half(clamp_scale(_mm512_mul_ps(_mm512_load_ps(s.channel + base), ratio)));
  }
};

// Fresh state of a tile from codes or floats, its read-out, and the scales it will be stored with.
// load(r, pairs, old) gives the stored state of some pairs of row r, even and odd vectors.
template <int J, bool Static, class Load>
STATE_INLINE void refresh(Scales& s, float* tile, int p, float decay, const float* x, const float* b, const float* c,
                          float* y, float qmax, uint16_t* channel_out, uint16_t* state_out, Load load) {
  constexpr int n = 32 * J;
  const __m512 magnitude = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
  const __m512 a = _mm512_set1_ps(decay);
  __m512 largest[2 * J];
  __mmask16 nan = 0;
  for (int v = 0; v < 2 * J; ++v) largest[v] = _mm512_setzero_ps();
  alignas(64) float even[kRows][16], odd[kRows][16], out[kRows][16];
  for (int base = 0; base < p; base += kRows) {
    for (int i = 0; i < kRows; ++i) {
      const int r = base + i;
      float* row = tile + r * n;
      const __m512 xr = _mm512_set1_ps(x[r]);
      __m512 read = _mm512_setzero_ps();
      __m512 size[2 * J];
      // pairs that are added to each other first go together, where they are several registers: more of them can begin at once
      constexpr int some = !kAvx512 && J > 1 ? 2 : 1, apart = J / some;
      for (int j = 0; j < apart; ++j) {
        __m512 old[2 * some];
        if constexpr (some == 1) load(r, {j}, old);
        else load(r, {j, j + apart}, old);
        for (int i = 0; i < 2 * some; ++i) {
          const int at = 32 * (j + i / 2 * apart) + i % 2 * 16;
          old[i] = _mm512_add_ps(_mm512_mul_ps(a, old[i]), _mm512_mul_ps(xr, _mm512_load_ps(b + at)));
          _mm512_store_ps(row + at, old[i]);
          read = _mm512_fmadd_ps(old[i], _mm512_load_ps(c + at), read);
          old[i] = _mm512_and_ps(old[i], magnitude);
        }
        for (int h = 0; h < 2; ++h) size[2 * j + h] = some == 1 ? old[h] : _mm512_add_ps(old[h], old[2 * some - 2 + h]);
      }
      _mm512_store_ps(out[i], read);
      if constexpr (!Static) {
        fold_pairs<apart>(size, even[i], odd[i]);
      }
    }
    const __m512 reads = sum_rows(out);
    nan |= _mm512_cmp_ps_mask(reads, reads, _CMP_UNORD_Q);  // so is the read-out of a row that holds one
    _mm512_storeu_ps(y + base, reads);
    if constexpr (!Static) channel_scales(s, base, even, odd, n, channel_out);
    for (int r = base; r < base + kRows; ++r) {
      const __m512 inverse = _mm512_set1_ps(s.inverse[r]);
      for (int v = 0; v < 2 * J; ++v) {
        largest[v] = _mm512_range_ps(largest[v], _mm512_mul_ps(_mm512_load_ps(tile + r * n + 16 * v), inverse), 0x0b);
      }
    }
  }
  state_scales<J>(s, tile, largest, p, qmax, state_out);
  if (__builtin_expect(nan != 0, 0)) keep_nan<J, Static>(s, tile, p, state_out);
}

// Calibrated channel scales of a head, read once.
STATE_INLINE void fixed_channels(Scales& s, const uint16_t* fixed, int p) {
  for (int r = 0; r < p; r += kRows) {
    const __m512 value = half_to_float(fixed + r);
    _mm512_store_ps(s.channel + r, value);
    _mm512_store_ps(s.inverse + r, _mm512_div_ps(_mm512_set1_ps(1.0f), value));
  }
}

}  // namespace state
