// A token of a replay window that rounds nothing.
//
//   y = E sum_n code step C + sum_k E_k drive_k (B_k C)
//
// with E and E_k the products of all decays and of those after token k, so that codes are multiplied by what is common to a
// column, B_k C is the same for all heads of a group, and no state is written. In floats that takes four operations per vector of
// sixteen states: two to look a code up, a fused product, and 0.4 to turn sixteen rows. Bytes take two: 128 codes lie in 64
// bytes, and step C in three planes of signed bytes, 21 bits of the largest of a head, which is far below half a step of a code.
#include <algorithm>
#include <bit>

#include "llmcompress/isa.h"
#include "pick.h"
#include "window.h"

#ifndef LLMCOMPRESS_AVX2
LLMCOMPRESS_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,fma,f16c,bmi2")
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

// A power of two of normal numbers.
STATE_INLINE float power(int exponent) { return std::bit_cast<float>((exponent + 127) << 23); }

#if defined(LLMCOMPRESS_AVX2) && !defined(LLMCOMPRESS_NARROW)
// How numbers become whole ones of 21 bits and back: the power of two above the largest becomes 2^21, so that sums of 128 codes of
// a row, up to 7, are below 2^31.
struct ByteScale {
  bool fits;
  float over, unit;
};
STATE_INLINE ByteScale byte_scale(const float* by, int count) {
  constexpr int digits = 21;
  // by their bits, in which NaN is above all numbers
  uint32_t most = 0;
  for (int i = 0; i < count; ++i) most = std::max(most, std::bit_cast<uint32_t>(by[i]) & 0x7fffffff);
  const float largest = std::bit_cast<float>(most);
  const int above = static_cast<int>(most >> 23) - 126;
  if (!(largest >= 1e-25f && largest <= 1e25f)) return {false, 0.0f, 0.0f};
  return {true, power(digits - above), power(above - digits)};
}

// The same on 64 states, whose codes lie in 32 bytes: sums of two products in 16 bits, which hold those of 128 states.
struct Planes {
  __m256i low[3], high[3];  // lowest byte first

  STATE_INLINE __m256i bytes_of(const __m256i* numbers, int k) {
    __m256i one[4];
    for (int i = 0; i < 4; ++i) one[i] = _mm256_and_si256(_mm256_srli_epi32(numbers[i], 8 * k), _mm256_set1_epi32(0xff));
    const __m256i mixed = _mm256_packus_epi16(_mm256_packus_epi32(one[0], one[1]), _mm256_packus_epi32(one[2], one[3]));
    return _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }

  inline __attribute__((always_inline)) void set(const float* by, float over) {
    // 128 is added to each signed byte, so that none borrows from the next, and taken off by turning its highest bit
    const __m256i half = _mm256_set1_epi32(0x808080);
    for (int h = 0; h < 2; ++h) {
      __m256i digits[4];
      for (int i = 0; i < 4; ++i) {
        const __m256 value = _mm256_load_ps(by + i / 2 * 32 + 16 * h + i % 2 * 8);
        const __m256i number = _mm256_cvtps_epi32(_mm256_mul_ps(value, _mm256_set1_ps(over)));
        digits[i] = _mm256_xor_si256(_mm256_add_epi32(number, half), half);
      }
      for (int k = 0; k < 3; ++k) (h == 0 ? low : high)[k] = bytes_of(digits, k);
    }
  }

  // Sums by lane and plane for nibbles that are counted from -8.
  inline __attribute__((always_inline)) void add(const uint8_t* codes, __m256i* sums) const {
    const __m256i from = _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), _mm256_set1_epi8(char(0x88)));
    const __m256i four = _mm256_set1_epi8(15), of_low = _mm256_and_si256(from, four);
    const __m256i of_high = _mm256_and_si256(_mm256_srli_epi16(from, 4), four);
    for (int k = 0; k < 3; ++k) {
      sums[k] = _mm256_add_epi16(sums[k], _mm256_maddubs_epi16(of_low, low[k]));
      sums[k] = _mm256_add_epi16(sums[k], _mm256_maddubs_epi16(of_high, high[k]));
    }
  }
};

// Planes put together.
STATE_INLINE __m256i whole(const __m256i* sums) {
  const __m256i top = _mm256_slli_epi32(_mm256_madd_epi16(sums[2], _mm256_set1_epi16(1)), 16);
  const __m256i middle = _mm256_madd_epi16(sums[1], _mm256_set1_epi16(256));
  return _mm256_add_epi32(_mm256_add_epi32(top, middle), _mm256_madd_epi16(sums[0], _mm256_set1_epi16(1)));
}

// Sums of the lanes of eight vectors.
STATE_INLINE __m256i sum_eight(const __m256i* rows) {
  __m256i four[2];
  for (int i = 0; i < 2; ++i) {
    four[i] = _mm256_hadd_epi32(_mm256_hadd_epi32(rows[4 * i], rows[4 * i + 1]), _mm256_hadd_epi32(rows[4 * i + 2], rows[4 * i + 3]));
  }
  return _mm256_add_epi32(_mm256_permute2x128_si256(four[0], four[1], 0x20), _mm256_permute2x128_si256(four[0], four[1], 0x31));
}

template <int J>
void read_bytes(const uint8_t* codes, const uint16_t* channel, const uint16_t* scale, const Window& window, const float* dots,
                const float* c, float* y, int p) {
  static_assert(J % 2 == 0);
  constexpr int each = J == 2 ? 1 : 2, parts = J / 2 / each, row_bytes = 16 * J;
  alignas(64) float by[32 * J];
  columns<J, 4>(scale, c, by);
  const ByteScale to = byte_scale(by, 32 * J);
  if (!to.fits) return read_floats<4, J>(codes, channel, by, window, dots, y, p);
  Planes planes[parts * each];
  for (int i = 0; i < parts * each; ++i) planes[i].set(by + 64 * i, to.over);
  __m256i bias[parts];
  const auto sum = [&](int part, const uint8_t* row, int hop) __attribute__((always_inline)) {
    __m256i sums[3] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int i = 0; i < each; ++i) planes[part * each + i].add(row + (part * each + i) * hop, sums);
    return whole(sums);
  };
  // what codes that are all 0 give
  alignas(32) static constexpr uint8_t zeros[32] = {};
  for (int part = 0; part < parts; ++part) {
    const __m256i same = sum(part, zeros, 0), all[8] = {same, same, same, same, same, same, same, same};
    bias[part] = sum_eight(all);
  }
  float factor[kMaxWindow];
  const float unit = factors(window, dots, factor) * to.unit;
  for (int base = 0; base < p; base += kRows) {
    __m512 sums = _mm512_setzero_ps();
    for (int part = 0; part < parts; ++part) {
      __m256i half[2];
      for (int h = 0; h < 2; ++h) {
        __m256i rows[8];
        for (int i = 0; i < 8; ++i) {
          const uint8_t* row = codes + (base + 8 * h + i) * row_bytes;
          rows[i] = sum(part, row, 32);
          if (part == 0) fetch(row + p * row_bytes, row_bytes);
        }
        half[h] = _mm256_sub_epi32(sum_eight(rows), bias[part]);
      }
      sums = _mm512_add_ps(sums, _mm512_cvtepi32_ps({half[0], half[1]}));
    }
    finish(sums, channel, unit, window, factor, base, y);
  }
}
#endif

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
#elif !defined(LLMCOMPRESS_NARROW)
    if constexpr (J % 2 == 0) return read_bytes<J>;
#endif
    return read_head<4, J>;
  };
  if (bits == 4) return for_states<Read>(states, bytes);
  return bits == 8 ? for_states<Read>(states, []<int J>() -> Read { return read_head<8, J>; }) : nullptr;
}

}  // namespace state

#ifndef LLMCOMPRESS_AVX2
LLMCOMPRESS_TARGET_END
#endif
