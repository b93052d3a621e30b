// A token of a replay window that rounds nothing.
//
//   y = E sum_n code step C + sum_k E_k drive_k (B_k C)
//
// with E and E_k the products of all decays and of those after token k, so that codes are multiplied by what is common to a
// column, B_k C is the same for all heads of a group, and no state is written. In floats that takes four operations per vector of
// sixteen states: two to look a code up, a fused product, and 0.4 to turn sixteen rows. Bytes take two: 128 codes lie in 64
// bytes, and step C in three planes of signed bytes, 21 bits of the largest of a head, which is far below half a step of a code.
#include <bit>

#include "llmcompress/isa.h"
#include "pick.h"
#include "window.h"

#pragma GCC push_options
#ifndef LLMCOMPRESS_AVX2
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,fma,f16c,bmi2")
#endif

namespace state {
namespace {

// What tokens of a window add to y: their factors; and what is left of the state.
STATE_INLINE float factors(const Window& window, const float* dots, float* factor) {
  float kept = 1.0f;
  for (int k = window.tokens - 1; k >= 0; --k) {
    factor[k] = kept * dots[k];
    kept *= window.decay[k];
  }
  return kept;
}

// step C of a head in pairs.
template <int J, int Bits>
STATE_INLINE void columns(const uint16_t* scale, const float* c, float* by) {
  alignas(64) float natural[32 * J];
  const __m512 part = _mm512_set1_ps(1.0f / ((1 << (Bits - 1)) - 1));
  for (int i = 0; i < 32 * J; i += 16) {
    _mm512_store_ps(natural + i, _mm512_mul_ps(_mm512_mul_ps(half_to_float(scale + i), part), _mm512_loadu_ps(c + i)));
  }
  split_pairs(natural, by, 32 * J);
}

// The codes of what follows lie in another page, where the processor does not look ahead.
STATE_INLINE void fetch(const uint8_t* row, int bytes) {
  for (int line = 0; line < bytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(row + line), _MM_HINT_T0);
}

// Sixteen rows from their sums.
STATE_INLINE void finish(__m512 sums, const uint16_t* channel, float unit, const Window& window, const float* factor, int base,
                         float* y) {
  __m512 read = _mm512_mul_ps(sums, _mm512_mul_ps(half_to_float(channel + base), _mm512_set1_ps(unit)));
  for (int k = 0; k < window.tokens; ++k) {
    read = _mm512_fmadd_ps(_mm512_set1_ps(factor[k]), _mm512_loadu_ps(window.drive[k] + base), read);
  }
  _mm512_storeu_ps(y + base, read);
}

template <int Bits, int J>
STATE_INLINE void read_floats(const uint8_t* codes, const uint16_t* channel, const float* by, const Window& window,
                              const float* dots, float* y, int p) {
  constexpr int row_bytes = 4 * J * Bits;
  float factor[kMaxWindow];
  const float kept = factors(window, dots, factor);
  alignas(64) float out[kRows][16];
  for (int base = 0; base < p; base += kRows) {
    for (int i = 0; i < kRows; ++i) {
      const uint8_t* row = codes + (base + i) * row_bytes;
      __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      fetch(row + p * row_bytes, row_bytes);
      for (int j = 0; j < J; ++j) {
        __m512 even, odd;
        decode_pair<Bits>(row + j * pair_bytes<Bits>(), even, odd);
        sum[0] = _mm512_fmadd_ps(even, _mm512_load_ps(by + 32 * j), sum[0]);
        sum[1] = _mm512_fmadd_ps(odd, _mm512_load_ps(by + 32 * j + 16), sum[1]);
      }
      _mm512_store_ps(out[i], _mm512_add_ps(sum[0], sum[1]));
    }
    finish(sum_rows(out), channel, kept, window, factor, base, y);
  }
}

template <int Bits, int J>
void read_head(const uint8_t* codes, const uint16_t* channel, const uint16_t* scale, const Window& window, const float* dots,
               const float* c, float* y, int p) {
  alignas(64) float by[32 * J];
  columns<J, Bits>(scale, c, by);
  read_floats<Bits, J>(codes, channel, by, window, dots, y, p);
}

#ifndef LLMCOMPRESS_AVX2
// step C of 128 states as whole numbers: their bytes, for the low nibbles of 64 bytes of codes and for the high ones.
struct Planes {
  __m512i low[3], high[3];  // lowest byte first

  inline __attribute__((always_inline)) void set(const float* by, __m512 over) {
    // 128 is added to each signed byte, so that none borrows from the next, and taken off by turning its highest bit
    const __m512i half = _mm512_set1_epi32(0x808080), two = _mm512_set4_epi32(0x3c383430, 0x2c282420, 0x1c181410, 0x0c080400);
    // every fourth byte of two vectors
    const __m512i fourth = _mm512_mask_or_epi32(two, 0xf0, two, _mm512_set1_epi8(64));
    for (int h = 0; h < 2; ++h) {
      __m512i* to = h == 0 ? low : high;
      __m512i digits[4];
      for (int j = 0; j < 4; ++j) {
        const __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(by + 32 * j + 16 * h), over));
        digits[j] = _mm512_xor_si512(_mm512_add_epi32(number, half), half);
      }
      for (int k = 0; k < 3; ++k) {
        const __m512i at = _mm512_or_si512(fourth, _mm512_set1_epi8(static_cast<char>(k)));
        to[k] = _mm512_shuffle_i64x2(_mm512_permutex2var_epi8(digits[0], at, digits[1]),
                                     _mm512_permutex2var_epi8(digits[2], at, digits[3]), 0x44);
      }
    }
  }

  // Sums by lane for nibbles that are counted from -8.
  inline __attribute__((always_inline)) __m512i dot(__m512i of_low, __m512i of_high) const {
    __m512i sum = _mm512_setzero_si512();
    for (int k = 2; k >= 0; --k) {
      if (k < 2) sum = _mm512_slli_epi32(sum, 8);
      sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sum, of_low, low[k]), of_high, high[k]);
    }
    return sum;
  }

  // What codes that are all 0 give.
  inline __attribute__((always_inline)) int bias() const {
    return _mm512_reduce_add_epi32(dot(_mm512_set1_epi8(8), _mm512_set1_epi8(8)));
  }

  inline __attribute__((always_inline)) __m512i row(const uint8_t* codes) const {
    const __m512i from = _mm512_loadu_si512(codes), eight = _mm512_set1_epi8(8), four = _mm512_set1_epi8(15);
    // (code ^ 8) & 15
    return dot(_mm512_ternarylogic_epi32(from, eight, four, 0x28),
               _mm512_ternarylogic_epi32(_mm512_srli_epi16(from, 4), eight, four, 0x28));
  }
};

// A power of two of normal numbers.
STATE_INLINE float power(int exponent) { return std::bit_cast<float>((exponent + 127) << 23); }

template <int J>
void read_bytes(const uint8_t* codes, const uint16_t* channel, const uint16_t* scale, const Window& window, const float* dots,
                const float* c, float* y, int p) {
  static_assert(J % 4 == 0);
  constexpr int parts = J / 4, row_bytes = 16 * J;
  alignas(64) float by[32 * J];
  columns<J, 4>(scale, c, by);
  // by their bits, in which NaN is above all numbers
  __m512i most = _mm512_setzero_si512();
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int i = 0; i < 32 * J; i += 16) most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_load_si512(by + i), magnitude));
  const uint32_t bits = _mm512_reduce_max_epu32(most);
  const float largest = std::bit_cast<float>(bits);
  if (!(largest >= 1e-25f && largest <= 1e25f)) return read_floats<4, J>(codes, channel, by, window, dots, y, p);
  // the power of two above it, which becomes 2^21: sums of 128 codes of a row, up to 7, are below 2^31
  constexpr int digits = 21;
  const int above = static_cast<int>(bits >> 23) - 126;
  Planes planes[parts];
  __m512i bias[parts];
  for (int part = 0; part < parts; ++part) planes[part].set(by + 128 * part, _mm512_set1_ps(power(digits - above)));
  for (int part = 0; part < parts; ++part) bias[part] = _mm512_set1_epi32(planes[part].bias());
  float factor[kMaxWindow];
  const float unit = factors(window, dots, factor) * power(above - digits);
  alignas(64) float out[parts][kRows][16];
  for (int base = 0; base < p; base += kRows) {
    for (int i = 0; i < kRows; ++i) {
      const uint8_t* row = codes + (base + i) * row_bytes;
      for (int part = 0; part < parts; ++part) {
        _mm512_store_ps(out[part][i], _mm512_castsi512_ps(planes[part].row(row + 64 * part)));
      }
      fetch(row + p * row_bytes, row_bytes);
    }
    // whole numbers to the end: one conversion for sixteen rows, and additions that any unit does
    __m512 sums = _mm512_setzero_ps();
    for (int part = 0; part < parts; ++part) {
      sums = _mm512_add_ps(sums, _mm512_cvtepi32_ps(_mm512_sub_epi32(sum_integer_rows(out[part]), bias[part])));
    }
    finish(sums, channel, unit, window, factor, base, y);
  }
}
#endif

}  // namespace

Read head_read(int bits, int64_t states) {
  const auto bytes = []<int J>() -> Read {
#ifndef LLMCOMPRESS_AVX2
    static const bool planes = llmcompress::has_avx512();
    if constexpr (J % 4 == 0) {
      if (planes) return read_bytes<J>;
    }
#endif
    return read_head<4, J>;
  };
  if (bits == 4) return for_states<Read>(states, bytes);
  return bits == 8 ? for_states<Read>(states, []<int J>() -> Read { return read_head<8, J>; }) : nullptr;
}

}  // namespace state

#pragma GCC pop_options
