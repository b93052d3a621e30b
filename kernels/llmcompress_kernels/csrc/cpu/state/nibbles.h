// One token of a head whose state lies in 4-bit codes, for processors with VBMI and VBMI2 (Ice Lake, Zen 4, and later).
// Codes and scales are those of tile.h to the last bit; it serves the rest.
//
// tile.h computes what the definition says, in the definition's order. Here everything is computed in units of the old
// step of its row and column, in which the fresh state is the old code and one fused product,
//
//   w = code + z_r B_v / s_v,     u = (decay channel_r) s_v w,     z_r = x_r / (decay channel_r),
//
// and what is common to a row or a column is multiplied in where rows or columns are few. That is not the definition's
// arithmetic, but it is within a known distance of it: |U - u| <= 6.1 e |u| + 9.4 e |x_r B_v|, e = 2^-24, where u is the
// definition's value and U the one found here. A scale or a code is taken only where every number within that distance
// rounds to it; where not, it is computed again by the definition: of 64 rows and 128 columns some 0.2 channel scales,
// 0.3 state scales and 2 of 8192 codes a head and token, which costs a branch gone wrong each.
// Where numbers are too far apart for that, tile.h does the head.
//
// Operations per vector of sixteen states:
//
//                                                                              dynamic  calibrated channel scale
//   old codes     a byte permutation turns a row of codes into eight nibbles      1.5     1.5
//                 a lane; shift (for two nibbles), table
//   fresh state   one fused product                                               1       1
//   read-out      one fused product; sixteen rows turned                          1.4     1.4
//   channel       |w|, one fused product; sixteen rows turned                     2.4     -
//   state scale   w / channel, largest (w alone where channels stay)              2       1
//   new codes     one fused product, to a fixed point of 4.12 bits                1       1
//   sure?         two vectors' halves of 16 bits put together, fraction not 0     1       1
//   pack          a funnel shift pushes nibbles of 16-bit lanes, a permutation    0.7     0.7
//                                                                                11.0     7.6
//
// where the definition's own arithmetic takes 16 and 13.5 (with a dither; 17 and 14.5 rounding to nearest), and a division
// per scale. Two of them can begin in a cycle, one of shifts and one of permutations: 5.5 and 3.8 cycles at best, before
// what a head does once and the branches. fp32 moves 128 bytes in that place, 14 cycles where two cores share 49 GB/s.
// scripts/acceptance/q_mamba_5_speed.py times both.
#pragma once

#include "tile.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,fma,f16c,bmi2")

namespace state {

// Eight vectors in pairs come from 64 bytes of codes: lane i, byte j is byte 16 j + i. The permutation and its inverse.
STATE_INLINE __m512i to_lanes() {
  alignas(64) static constexpr uint8_t index[64] = {
      0, 16, 32, 48, 1, 17, 33, 49, 2,  18, 34, 50, 3,  19, 35, 51, 4,  20, 36, 52, 5,  21, 37, 53, 6,  22, 38, 54, 7,  23, 39, 55,
      8, 24, 40, 56, 9, 25, 41, 57, 10, 26, 42, 58, 11, 27, 43, 59, 12, 28, 44, 60, 13, 29, 45, 61, 14, 30, 46, 62, 15, 31, 47, 63};
  return _mm512_load_si512(index);
}

STATE_INLINE __m512i to_bytes() {
  alignas(64) static constexpr uint8_t index[64] = {
      0, 4, 8,  12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 1, 5, 9,  13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61,
      2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62, 3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47, 51, 55, 59, 63};
  return _mm512_load_si512(index);
}

// Code K of every lane as a float. The upper half of a float's bits tells a code, so codes 4 to 7, which lie in the upper
// half of their lane, are looked up there, by five bits of which the highest does not count.
template <int K>
STATE_INLINE __m512 code_of(__m512i raw) {
  const __m512i at = K % 4 == 0 ? raw : _mm512_srli_epi32(raw, 4 * (K % 4));
  if constexpr (K < 4) {
    return _mm512_permutexvar_ps(at, _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
  } else {
    alignas(64) static constexpr uint16_t halves[32] = {
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, at, _mm512_load_si512(halves)));
  }
}

// 1 / v of normal numbers, within 1.1 2^-24.
STATE_INLINE __m512 reciprocal(__m512 v) {
  const __m512 found = _mm512_rcp14_ps(v);
  return _mm512_fmadd_ps(found, _mm512_fnmadd_ps(v, found, _mm512_set1_ps(1.0f)), found);
}

// fp16 numbers over 7, rounded as the quotient is.
STATE_INLINE __m512 over_seven(__m512 v) {
  const __m512 part = _mm512_set1_ps(1.0f / 7.0f), found = _mm512_mul_ps(v, part);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(found, _mm512_set1_ps(7.0f), v), part, found);
}

STATE_INLINE __m512 size_of(__m512 v) { return _mm512_and_ps(v, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff))); }

// The sum of one row, in the order of folded_sum_rows.
STATE_INLINE float folded_sum(__m512 even, __m512 odd) {
  __m512 both[2] = {even, odd};
  float sum[2];
  for (int h = 0; h < 2; ++h) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(both[h]), _mm512_extractf32x8_ps(both[h], 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    sum[h] = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  return sum[0] + sum[1];
}

constexpr float kUnit = 5.9604644775390625e-08f;   // 2^-24, by which one rounding may be off
constexpr float kOfInput = 10.0f * kUnit;          // distance in |x B|, see above
constexpr float kOfMost = 12.5f * kUnit;           // of a column's largest u / channel: 6.1, our products, their quotient
constexpr float kFixed = 3072.0f;                  // adding it leaves twelve binary digits
constexpr float kCancelled = 128.0f;               // |x B| in new steps up to which codes are within 2^-13 of the definition's
constexpr float kFar = 1125899906842624.0f;        // 2^50: what z and B / s may be at most, so that nothing overflows
constexpr float kSlow = 8.673617379884035e-19f;    // 2^-60: what decay may be at least, so that nothing underflows
constexpr float kGrowth = 1048576.0f;              // 2^20: at most

template <int J, Mode mode>
struct Nibbles {
  static constexpr bool Calibrated = calibrated(mode);
  static constexpr int n = 32 * J, vectors = 2 * J, bytes = 16 * J;
  static constexpr float qmax = 7.0f;
  // of a mean: 6.1, 2 J + 5 of our sum, 5 + log2 J of theirs; a square root halves that, and three roundings follow
  static constexpr float kOfRoot = (12.7f + J) * kUnit;

  uint8_t* codes;
  const float *x, *b;  // b in pairs
  float decay;
  int ahead;    // bytes to the next head's codes
  float* tile;  // [P, N] in pairs: w, then u / channel in old state steps
  // by row: scales as stored before this token and after it, decay times the former, z, the one over the other
  alignas(64) float before[kMaxChannels], channel[kMaxChannels], rate[kMaxChannels], z[kMaxChannels], factor[kMaxChannels];
  // by column, in pairs: scale as stored after this token, s, B / s, C s, factor of a code, what is added to it
  alignas(64) float scale[n], step[n], fresh[n], read[n], times[n], offset[n];
  float total;    // sum of |B|
  __m512 reach;   // largest |z| factor
  __m512 largest[vectors];

  inline __attribute__((always_inline)) __m512i lanes(int q) const {
    return _mm512_permutexvar_epi8(to_lanes(), _mm512_loadu_si512(codes + 64 * q));
  }

  // What rows and columns have in common; false where numbers are so far apart that tile.h has to do it.
  inline __attribute__((always_inline)) bool prepare(const uint16_t* was, const uint16_t* state, const float* c, int p) {
    if (!(decay >= kSlow && decay <= kGrowth)) return false;
    __mmask16 far = 0;
    const __m512 limit = _mm512_set1_ps(kFar);
    reach = _mm512_setzero_ps();
    for (int r = 0; r < p; r += kRows) {
      const __m512 value = half_to_float(was + r), product = _mm512_mul_ps(_mm512_set1_ps(decay), value);
      const __m512 by = _mm512_mul_ps(_mm512_loadu_ps(x + r), reciprocal(product));
      _mm512_store_ps(before + r, value);
      if constexpr (Calibrated) {
        _mm512_store_ps(channel + r, value);
        reach = _mm512_max_ps(reach, size_of(by));
      }
      _mm512_store_ps(rate + r, product);
      _mm512_store_ps(z + r, by);
      far |= _mm512_cmp_ps_mask(size_of(by), limit, _CMP_NLE_UQ);
    }
    alignas(64) float natural[n];
    for (int i = 0; i < n; i += 16) _mm512_store_ps(natural + i, half_to_float(state + i));
    alignas(64) float held[n];
    split_pairs(natural, held, n);
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) {
      const __m512 size = over_seven(_mm512_load_ps(held + i)), input = _mm512_load_ps(b + i);
      const __m512 by = _mm512_mul_ps(input, reciprocal(size));
      _mm512_store_ps(step + i, size);
      _mm512_store_ps(fresh + i, by);
      _mm512_store_ps(read + i, _mm512_mul_ps(_mm512_load_ps(c + i), size));
      sum = _mm512_add_ps(sum, size_of(input));
      far |= _mm512_cmp_ps_mask(size_of(by), limit, _CMP_NLE_UQ);
    }
    total = _mm512_reduce_add_ps(sum);
    return far == 0;
  }

  // ---- by the definition, as long as the codes are the old ones

  // Fresh state of row r, vector v.
  inline __attribute__((always_inline)) __m512 exact(int r, int v) const {
    const int at = r * vectors + v;
    const __m512 code = code_of<0>(_mm512_srlv_epi32(lanes(at / 8), _mm512_set1_epi32(at % 8 * 4)));
    const __m512 size = _mm512_mul_ps(_mm512_set1_ps(before[r]), _mm512_load_ps(step + 16 * v));
    const __m512 old = _mm512_mul_ps(_mm512_set1_ps(decay), _mm512_mul_ps(code, size));
    return _mm512_add_ps(old, _mm512_mul_ps(_mm512_set1_ps(x[r]), _mm512_load_ps(b + 16 * v)));
  }

  // Square roots of the means of rows, some of sixteen.
  __attribute__((noinline)) __m512 exact_roots(int base, __m512 roots, __mmask16 rows) const {
    alignas(64) float found[kRows];
    _mm512_store_ps(found, roots);
    for (uint32_t left = rows; left != 0; left &= left - 1) {
      const int i = __builtin_ctz(left);
      __m512 sizes[vectors];
      alignas(64) float even[16], odd[16];
      for (int v = 0; v < vectors; ++v) sizes[v] = size_of(exact(base + i, v));
      fold_pairs<J>(sizes, even, odd);
      found[i] = std::sqrt(folded_sum(_mm512_load_ps(even), _mm512_load_ps(odd)) * (1.0f / n));
    }
    return _mm512_load_ps(found);
  }

  // The largest |u| / channel of some columns. Rows that may hold it are those that come near to what was found.
  __attribute__((noinline)) __m512 exact_most(int v, __m512 most, __m512 near, __mmask16 columns, int p) const {
    __m512 found = _mm512_setzero_ps();
    for (int first = 0; first < p; first += 8) {
      __m512 some = _mm512_setzero_ps();
      for (int r = first; r < first + 8; ++r) some = _mm512_range_ps(some, _mm512_load_ps(tile + r * n + 16 * v), 0x0b);
      if (_mm512_mask_cmp_ps_mask(columns, some, near, _CMP_NLT_UQ) == 0) continue;
      for (int r = first; r < first + 8; ++r) {
        const __m512 size = size_of(_mm512_load_ps(tile + r * n + 16 * v));
        if (_mm512_mask_cmp_ps_mask(columns, size, near, _CMP_NLT_UQ) == 0) continue;
        found = _mm512_max_ps(found, size_of(_mm512_div_ps(exact(r, v), _mm512_set1_ps(channel[r]))));
      }
    }
    return _mm512_mask_mov_ps(most, columns, found);
  }

  // One code; `i` is its place in pairs.
  inline __attribute__((always_inline)) int exact_code(int r, int i, int old) const {
    const float u = decay * (static_cast<float>(old) * (before[r] * step[i])) + x[r] * b[i], size = scale[i] / qmax;
    float value = u / (channel[r] * size);
    if constexpr (dithered(mode)) value = __builtin_fmaf(u * (1.0f / channel[r]), 1.0f / size, offset[i] - (kFixed + 0.5f));
    value = value < -qmax ? -qmax : value > qmax ? qmax : value;
    return _mm_cvtss_si32(_mm_set_ss(value));
  }

  static int nibble(const uint8_t* row, int k, int lane) {
    return static_cast<int8_t>(row[16 * (k / 2) + lane] << (4 - 4 * (k % 2))) >> 4;
  }

  // All codes of 64 bytes.
  __attribute__((noinline)) void exact_codes(int q) {
    alignas(64) uint8_t old[64];
    std::memcpy(old, codes + 64 * q, 64);
    for (int k = 0; k < 8; ++k) {
      for (int lane = 0; lane < 16; ++lane) put(q, k, lane, nibble(old, k, lane));
    }
  }

  inline __attribute__((always_inline)) void put(int q, int k, int lane, int old) {
    const int at = 8 * q + k, code = exact_code(at / vectors, at % vectors * 16 + lane, old) & 15;
    uint8_t& both = codes[64 * q + 16 * (k / 2) + lane];
    both = static_cast<uint8_t>((both & (k % 2 == 0 ? 0xf0 : 0x0f)) | code << 4 * (k % 2));
  }

  // Codes of 64 bytes that are sure, and by the definition those that are not: one, nearly always, so branches expect that.
  __attribute__((noinline)) void mend(int q, __m512i packed, const __m512i* halves) {
    alignas(64) uint8_t old[64];
    _mm512_store_si512(old, _mm512_loadu_si512(codes + 64 * q));
    _mm512_storeu_si512(codes + 64 * q, packed);
    uint64_t unsure[2];
    for (int h = 0; h < 2; ++h) {
      const uint64_t low = _mm512_testn_epi16_mask(halves[2 * h], _mm512_set1_epi16(0xfff));
      unsure[h] = low | static_cast<uint64_t>(_mm512_testn_epi16_mask(halves[2 * h + 1], _mm512_set1_epi16(0xfff))) << 32;
    }
    do {
      const int h = unsure[0] == 0;
      const int at = __builtin_ctzll(h != 0 ? unsure[1] : unsure[0]), lane = at % 32 / 2, k = 2 * h + at / 32 + 4 * (at % 2);
      unsure[h] &= unsure[h] - 1;
      put(q, k, lane, nibble(old, k, lane));
    } while (__builtin_expect((unsure[0] | unsure[1]) != 0, 0));
  }

  // ---- and here

  // Sixteen rows: w into the tile, read-outs, channel scales; and the sixteen before them divided by theirs, because the
  // latter come late (a square root).
  template <bool First>
  inline __attribute__((always_inline)) void rows(int base, float* y, uint16_t* out) {
    alignas(64) float sizes[kRows][16], reads[kRows][16];
    __m512 most[vectors];
    for (int v = 0; v < vectors; ++v) most[v] = First ? _mm512_setzero_ps() : largest[v];
    for (int i = 0; i < kRows; i += 2) {
      __m512i raw[2];
      const __m512 by[2] = {_mm512_set1_ps(z[base + i]), _mm512_set1_ps(z[base + i + 1])};
      __m512 read[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, sum[2] = {read[0], read[0]};
      two_rows<0>(base + i, raw, by, read, sum, most);
      for (int s = 0; s < 2; ++s) {
        _mm512_store_ps(reads[i + s], read[s]);
        if constexpr (!Calibrated) _mm512_store_ps(sizes[i + s], sum[s]);
        if constexpr (!Calibrated && !First) divide(base - kRows + (i + 2 + s) % kRows, most);
      }
    }
    for (int v = 0; v < vectors; ++v) largest[v] = most[v];
    _mm512_storeu_ps(y + base, _mm512_mul_ps(sum_rows(reads), _mm512_load_ps(rate + base)));
    if constexpr (!Calibrated) channels(base, sum_rows(sizes), out);
  }

  // Vectors V and later of two rows side by side, so that no product waits for the one before it.
  template <int V>
  inline __attribute__((always_inline)) void two_rows(int r, __m512i* raw, const __m512* by, __m512* out, __m512* sum, __m512* most) {
    if constexpr (V % 8 == 0) {
      raw[0] = lanes((r * vectors + V) / 8);
      raw[1] = vectors < 8 ? raw[0] : lanes(((r + 1) * vectors + V) / 8);
    }
    one_vector<V % 8, V>(r, raw[0], by[0], out[0], sum[0], most);
    one_vector<vectors < 8 ? V + 4 : V % 8, V>(r + 1, raw[1], by[1], out[1], sum[1], most);
    if constexpr (V + 1 < vectors) two_rows<V + 1>(r, raw, by, out, sum, most);
  }

  template <int K, int V>
  inline __attribute__((always_inline)) void one_vector(int r, __m512i raw, __m512 by, __m512& out, __m512& sum, __m512* most) {
    const __m512 w = _mm512_fmadd_ps(by, _mm512_load_ps(fresh + 16 * V), code_of<K>(raw));
    _mm512_store_ps(tile + r * n + 16 * V, w);
    out = _mm512_fmadd_ps(w, _mm512_load_ps(read + 16 * V), out);
    if constexpr (Calibrated) {
      most[V] = _mm512_range_ps(most[V], w, 0x0b);
    } else {
      sum = _mm512_fmadd_ps(size_of(w), _mm512_load_ps(step + 16 * V), sum);
    }
  }

  // One row: from w to u / channel, and the largest of each column.
  inline __attribute__((always_inline)) void divide(int r, __m512* most) {
    const __m512 by = _mm512_set1_ps(factor[r]);
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      const __m512 part = _mm512_mul_ps(_mm512_load_ps(tile + r * n + 16 * v), by);
      _mm512_store_ps(tile + r * n + 16 * v, part);
      most[v] = _mm512_range_ps(most[v], part, 0x0b);
    }
  }

  inline __attribute__((always_inline)) void divide_last(int p) {
    __m512 most[vectors];
    for (int v = 0; v < vectors; ++v) most[v] = largest[v];
    for (int r = p - kRows; r < p; ++r) divide(r, most);
    for (int v = 0; v < vectors; ++v) largest[v] = most[v];
  }

  // Channel scales of sixteen rows from their sums of |w| s.
  inline __attribute__((always_inline)) void channels(int base, __m512 sums, uint16_t* out) {
    const __m512 by = _mm512_load_ps(rate + base), mean = _mm512_mul_ps(sums, _mm512_mul_ps(by, _mm512_set1_ps(1.0f / n)));
    const __m512 size = size_of(_mm512_loadu_ps(x + base));
    // relative distance of the root: half that of the mean
    const __m512 of_input = _mm512_mul_ps(size, _mm512_set1_ps(0.51f * kOfInput / n * total));
    const __m512 some = _mm512_max_ps(mean, _mm512_set1_ps(1e-30f));
    const __m512 off = _mm512_fmadd_ps(of_input, _mm512_rcp14_ps(some), _mm512_set1_ps(kOfRoot));
    __m512 root = _mm512_sqrt_ps(mean);
    const __m256i low = to_half(clamp_scale(_mm512_fnmadd_ps(root, off, root)));
    const __m256i high = to_half(clamp_scale(_mm512_fmadd_ps(root, off, root)));
    __mmask16 unsure = _mm256_cmpneq_epi16_mask(low, high) | _mm512_cmp_ps_mask(off, _mm512_set1_ps(1e-2f), _CMP_NLT_UQ);
    __m256i half = low;
    if (__builtin_expect(unsure != 0, 0)) half = to_half(clamp_scale(exact_roots(base, root, unsure)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + base), half);
    const __m512 value = _mm512_cvtph_ps(half), over = _mm512_mul_ps(by, reciprocal(value));
    _mm512_store_ps(channel + base, value);
    _mm512_store_ps(factor + base, over);
    reach = _mm512_max_ps(reach, _mm512_mul_ps(size_of(_mm512_load_ps(z + base)), over));
  }

  // State scales; whether codes are to be found by the definition.
  inline __attribute__((always_inline)) bool columns(int p, uint16_t* out) {
    alignas(64) float natural[n];
    const __m512 farthest = _mm512_set1_ps(_mm512_reduce_max_ps(reach)), zero = _mm512_setzero_ps();
    __mmask16 careful = 0;
    for (int v = 0; v < vectors; ++v) {
      __m512 unit = _mm512_load_ps(step + 16 * v);
      if constexpr (Calibrated) unit = _mm512_mul_ps(unit, _mm512_set1_ps(decay));
      const __m512 most = largest[v], input = _mm512_mul_ps(farthest, size_of(_mm512_load_ps(fresh + 16 * v)));
      const __m512 off = _mm512_fmadd_ps(most, _mm512_set1_ps(kOfMost), _mm512_mul_ps(input, _mm512_set1_ps(kOfInput)));
      const __m256i low = to_half(clamp_scale(_mm512_mul_ps(_mm512_sub_ps(most, off), unit)));
      const __m256i high = to_half(clamp_scale(_mm512_mul_ps(_mm512_add_ps(most, off), unit)));
      const __mmask16 unsure = _mm256_cmpneq_epi16_mask(low, high);
      __m512 found = _mm512_mul_ps(most, unit);
      __m256i half = low;
      if (__builtin_expect(unsure != 0, 0)) {
        found = exact_most(v, found, _mm512_fnmadd_ps(off, _mm512_set1_ps(2.1f), most), unsure, p);
        half = to_half(clamp_scale(found));
      }
      const __m512 value = _mm512_cvtph_ps(half);
      const __m512 by = _mm512_mul_ps(unit, _mm512_mul_ps(_mm512_set1_ps(qmax), reciprocal(value)));
      // beyond fp16's normal numbers a scale may be far below the maximum that it stands for
      careful |= _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(found, zero, _CMP_NEQ_UQ), found, _mm512_set1_ps(kNormal), _CMP_NGE_UQ);
      careful |= _mm512_cmp_ps_mask(found, _mm512_set1_ps(kLargest), _CMP_NLT_UQ);
      careful |= _mm512_cmp_ps_mask(_mm512_mul_ps(input, by), _mm512_set1_ps(kCancelled), _CMP_NLE_UQ);
      _mm512_store_ps(scale + 16 * v, value);
      _mm512_store_ps(times + 16 * v, by);
      const __m512 half_step = _mm512_set1_ps(kFixed + 0.5f);
      _mm512_store_ps(offset + 16 * v, dithered(mode) ? _mm512_add_ps(dither_of(half), half_step) : half_step);
    }
    join_pairs(scale, natural, n);
    for (int i = 0; i < n; i += 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), to_half(_mm512_load_ps(natural + i)));
    }
    return careful != 0;
  }

  // Code plus 1/2 (and dither) of vector `at` of the tile in the lowest sixteen bits: twelve behind the point.
  inline __attribute__((always_inline)) __m512i fixed_point(int at, __m512 by, __m512 more) const {
    return _mm512_castps_si512(_mm512_fmadd_ps(_mm512_load_ps(tile + 16 * at), by, more));
  }

  // A number within 2^-13 of a whole one has a fraction of 0; all others have the same code as whatever is so near to them.
  inline __attribute__((always_inline)) void encode(int p) {
    const __m512i fraction = _mm512_set1_epi16(0xfff), bytes_of = to_bytes();
    const __m512i up = _mm512_set4_epi32(0x0d0c0d0c, 0x09080908, 0x05040504, 0x01000100);
    for (int first = 0; first < p * vectors / 8; first += vectors / 8 > 0 ? vectors / 8 : 1) {
      group<0>(first, fraction, bytes_of, up);
      if constexpr (vectors > 8) group<8>(first + 1, fraction, bytes_of, up);
    }
  }

  // 64 bytes, whose first vector is vector V of a row.
  template <int V>
  inline __attribute__((always_inline)) void group(int q, __m512i fraction, __m512i bytes_of, __m512i up) {
    __m512i packed = _mm512_setzero_si512();
    __mmask32 sure = ~0u;
    __m512i both[4];
#pragma GCC unroll 4
    for (int j = 3; j >= 0; --j) {
      const int v = (V + j) % vectors, other = (V + j + 4) % vectors;
      const __m512i low = fixed_point(8 * q + j, _mm512_load_ps(times + 16 * v), _mm512_load_ps(offset + 16 * v));
      const __m512i high = fixed_point(8 * q + j + 4, _mm512_load_ps(times + 16 * other), _mm512_load_ps(offset + 16 * other));
      both[j] = _mm512_mask_shuffle_epi8(low, 0xccccccccccccccccull, high, up);
      sure = _mm512_mask_test_epi16_mask(sure, both[j], fraction);
      packed = _mm512_shldi_epi16(packed, both[j], 4);
    }
    packed = _mm512_permutexvar_epi8(bytes_of, packed);
    if (__builtin_expect(sure != ~0u, 0)) {
      mend(q, packed, both);
    } else {
      _mm512_storeu_si512(codes + 64 * q, packed);
    }
    _mm_prefetch(reinterpret_cast<const char*>(codes + ahead + 64 * q), _MM_HINT_T1);
  }
};

// As Head of heads.h; false, and nothing written, where tile.h has to do it.
template <int J, Mode mode>
bool update_nibbles(uint8_t* codes, uint16_t* channel, uint16_t* scale, const uint16_t* fixed, float decay, const float* x,
                    const float* b, const float* c, float* y, float* tile, int p) {
  static_assert(J >= 2);
  Nibbles<J, mode> head;
  head.codes = codes, head.x = x, head.b = b, head.decay = decay, head.tile = tile;
  head.ahead = p * head.bytes;
  if (!head.prepare(calibrated(mode) ? fixed : channel, scale, c, p)) return false;
  head.template rows<true>(0, y, channel);
  for (int base = kRows; base < p; base += kRows) head.template rows<false>(base, y, channel);
  if constexpr (!calibrated(mode)) head.divide_last(p);
  if (__builtin_expect(head.columns(p, scale), 0)) {
    for (int q = 0; q < p * head.vectors / 8; ++q) head.exact_codes(q);
  } else {
    head.encode(p);
  }
  return true;
}

}  // namespace state

#pragma GCC pop_options
