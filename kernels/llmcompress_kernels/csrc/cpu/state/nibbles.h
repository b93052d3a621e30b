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
//
// A window of R tokens is R fused products instead of one, oldest token first, with z of token k by the decays up to it:
//
//   w = code + sum_k z_rk B_vk / s_v,     u = D_R channel_r s_v w,     z_rk = x_rk / (D_k channel_r),     D_k = decay_1 .. decay_k
//
// Partial sums are then the definition's, but for what is common to a row or column, and both round each of them once. With
// T_k = |E_k x_k B_k|, E_k the decays after token k, and T the code's part, they are at most T + T_1 + .. + T_k or
// |u| + T_k+1 + .. + T_R, so that |U - u| <= (4 R + 2.1) e |u| + (4 R + 8) e sum T_k as well as
// (4 R + 2.1) e T + e sum (4 (R - k) + 9.5) T_k: T takes 2 R + 2 roundings in both ways together, T_k the 2 (R - k) of decays
// and 7.2 more, and each partial sum 2.
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
#include "window.h"

namespace state {

// What is computed again by the definition; counted where somebody wants to know, from one thread.
enum Again { kRoots, kScales, kCodes, kHeads, kAgain };
inline int64_t* counted = nullptr;  // [kAgain]
STATE_INLINE void count_again(Again which, int64_t many) {
  if (counted != nullptr) counted[which] += many;
}

}  // namespace state

#ifdef LLMCOMPRESS_AVX2
namespace state {
constexpr int kFastWindow = 0;
template <int J, Mode mode, bool Windowed>
bool update_nibbles(uint8_t*, uint16_t*, uint16_t*, const uint16_t*, const Window&, const float*, const float*, float*, float*, int) {
  return false;
}
}  // namespace state
#else
#include "nibble_lanes.h"

LLMCOMPRESS_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,fma,f16c,bmi2")

namespace state {

constexpr float kUnit = 5.9604644775390625e-08f;   // 2^-24, by which one rounding may be off
constexpr float kQuotient = 6.4f;                  // roundings of u / channel, ours and the definition's
constexpr float kFixed = 3072.0f;                  // adding it leaves twelve binary digits
constexpr float kSure = 2048.0f;                   // 2^-13 in 2^-24: half of the last of them
constexpr int kMostIgnored = 5;                    // lowest of them that may be ignored
constexpr int kFastWindow = 16;                    // tokens of a window, at most
constexpr float kFar = 1125899906842624.0f;        // 2^50: what z and B / s may be at most, so that nothing overflows
constexpr float kSlow = 8.673617379884035e-19f;    // 2^-60: what decays may be at least, so that nothing underflows
constexpr float kGrowth = 1048576.0f;              // 2^20: at most

// Windowed: of several tokens.
template <int J, Mode mode, bool Windowed>
struct Nibbles {
  static constexpr bool Calibrated = calibrated(mode);
  static constexpr int n = 32 * J, vectors = 2 * J, bytes = 16 * J, most_tokens = Windowed ? kFastWindow : 1;
  static constexpr float qmax = 7.0f;

  uint8_t* codes;
  const Window& window;
  const float* b;  // [R, N] in pairs
  int ahead;       // bytes to the next head's codes
  float* tile;     // [P, N] in pairs: w, then u / channel in old state steps
  // by row: scales as stored before these tokens and after them, decays times the former, z, the one over the other
  alignas(64) float before[kMaxChannels], channel[kMaxChannels], rate[kMaxChannels], z[most_tokens][kMaxChannels], factor[kMaxChannels];
  // by column, in pairs: scale as stored after these tokens, s, B / s, C s, factor of a code, what is added to it
  alignas(64) float scale[n], step[n], fresh[most_tokens][n], read[n], times[n], offset[n], dither[n];
  // by token: decays up to it, those after it times the sum of |B|
  float faded[most_tokens], later[most_tokens];
  __m512 reach[most_tokens];  // largest |z| factor
  __m512 kept;                // largest factor
  __m512 largest[vectors];
  __m512i fraction;           // digits behind the point that make a code sure

  Nibbles(uint8_t* codes_of, const Window& tokens_of, const float* b_of, float* tile_of, int p)
      : codes(codes_of), window(tokens_of), b(b_of), ahead(p * bytes), tile(tile_of) {}

  inline __attribute__((always_inline)) int tokens() const { return Windowed ? window.tokens : 1; }
  // Roundings in |u|, and in |E_k x B| of an input.
  inline __attribute__((always_inline)) float of_state() const { return 4.0f * static_cast<float>(tokens()) + 2.1f; }
  inline __attribute__((always_inline)) float of_input() const { return Windowed ? 4.0f * static_cast<float>(tokens()) + 8.0f : 10.0f; }

  inline __attribute__((always_inline)) __m512i lanes(int q) const {
    return _mm512_permutexvar_epi8(to_lanes(), _mm512_loadu_si512(codes + 64 * q));
  }

  // What rows and columns have in common; false where numbers are so far apart that tile.h has to do it.
  inline __attribute__((always_inline)) bool prepare(const uint16_t* was, const uint16_t* state, const float* c, int p) {
    float product = 1.0f;
    for (int k = 0; k < tokens(); ++k) {
      faded[k] = product *= window.decay[k];
      if (!(product >= kSlow && product <= kGrowth)) return false;
      reach[k] = _mm512_setzero_ps();
    }
    kept = Calibrated ? _mm512_set1_ps(1.0f) : _mm512_setzero_ps();
    __mmask16 far = 0;
    const __m512 limit = _mm512_set1_ps(kFar);
    for (int r = 0; r < p; r += kRows) {
      const __m512 value = half_to_float(was + r);
      _mm512_store_ps(before + r, value);
      if constexpr (Calibrated) _mm512_store_ps(channel + r, value);
      for (int k = 0; k < tokens(); ++k) {
        const __m512 by = _mm512_mul_ps(_mm512_set1_ps(faded[k]), value);
        const __m512 input = _mm512_mul_ps(_mm512_loadu_ps(window.drive[k] + r), reciprocal(by));
        _mm512_store_ps(rate + r, by);  // the last one's
        _mm512_store_ps(z[k] + r, input);
        if constexpr (Calibrated) reach[k] = _mm512_max_ps(reach[k], size_of(input));
        far |= _mm512_cmp_ps_mask(size_of(input), limit, _CMP_NLE_UQ);
      }
    }
    alignas(64) float natural[n], held[n];
    for (int i = 0; i < n; i += 16) _mm512_store_ps(natural + i, half_to_float(state + i));
    split_pairs(natural, held, n);
    __m512 sum[most_tokens];
    for (int k = 0; k < tokens(); ++k) sum[k] = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) {
      const __m512 size = over_seven(_mm512_load_ps(held + i)), over = reciprocal(size);
      _mm512_store_ps(step + i, size);
      _mm512_store_ps(read + i, _mm512_mul_ps(_mm512_load_ps(c + i), size));
      for (int k = 0; k < tokens(); ++k) {
        const __m512 input = _mm512_load_ps(b + k * n + i), by = _mm512_mul_ps(input, over);
        _mm512_store_ps(fresh[k] + i, by);
        sum[k] = _mm512_add_ps(sum[k], size_of(input));
        far |= _mm512_cmp_ps_mask(size_of(by), limit, _CMP_NLE_UQ);
      }
    }
    product = 1.0f;
    for (int k = tokens() - 1; k >= 0; --k) {
      later[k] = product * _mm512_reduce_add_ps(sum[k]);
      product *= window.decay[k];
    }
    return far == 0;
  }

  // ---- by the definition, as long as the codes are the old ones

  // Fresh state of row r, vector v.
  inline __attribute__((always_inline)) __m512 exact(int r, int v) const {
    const int at = r * vectors + v;
    const __m512 code = code_of<0>(_mm512_srlv_epi32(lanes(at / 8), _mm512_set1_epi32(at % 8 * 4)));
    const __m512 size = _mm512_mul_ps(_mm512_set1_ps(before[r]), _mm512_load_ps(step + 16 * v));
    __m512 u = _mm512_mul_ps(code, size);
    for (int k = 0; k < tokens(); ++k) {
      const __m512 input = _mm512_mul_ps(_mm512_set1_ps(window.drive[k][r]), _mm512_load_ps(b + k * n + 16 * v));
      u = _mm512_add_ps(_mm512_mul_ps(_mm512_set1_ps(window.decay[k]), u), input);
    }
    return u;
  }

  // Square roots of the means of rows, some of sixteen.
  __attribute__((noinline)) __m512 exact_roots(int base, __m512 roots, __mmask16 rows) const {
    count_again(kRoots, __builtin_popcount(rows));
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

  // Fresh state of row r, place i in pairs.
  inline __attribute__((always_inline)) float exact_one(int r, int i, int old) const {
    float u = static_cast<float>(old) * (before[r] * step[i]);
    for (int k = 0; k < tokens(); ++k) u = window.decay[k] * u + window.drive[k][r] * b[k * n + i];
    return u;
  }

  // The largest |u| / channel of the column at place i in pairs. Rows that may hold it are those that are not below `near`.
  float exact_most(int i, float near, int p) const {
    count_again(kScales, 1);
    float found = 0.0f;
    for (int base = 0; base < p; base += kRows) {
      uint32_t rows = 0;
      for (int r = 0; r < kRows; ++r) rows |= static_cast<uint32_t>(!(std::fabs(tile[(base + r) * n + i]) < near)) << r;
      for (; __builtin_expect(rows != 0, 0); rows &= rows - 1) {
        const int r = base + __builtin_ctz(rows), at = r * vectors + i / 16;
        const float part = std::fabs(exact_one(r, i, nibble(codes + 64 * (at / 8), at % 8, i % 16)) / channel[r]);
        found = found > part ? found : part;
      }
    }
    return found;
  }

  // One code; `i` is its place in pairs.
  inline __attribute__((always_inline)) int exact_code(int r, int i, int old) const {
    const float u = exact_one(r, i, old), size = scale[i] / qmax;
    float value = u / (channel[r] * size);
    if constexpr (dithered(mode)) value = __builtin_fmaf(u * (1.0f / channel[r]), 1.0f / size, dither[i]);
    value = value < -qmax ? -qmax : value > qmax ? qmax : value;
    return _mm_cvtss_si32(_mm_set_ss(value));
  }

  static int nibble(const uint8_t* row, int k, int lane) {
    return static_cast<int8_t>(row[16 * (k / 2) + lane] << (4 - 4 * (k % 2))) >> 4;
  }

  // All codes of 64 bytes.
  __attribute__((noinline)) void exact_codes(int q) {
    const __m512 one = _mm512_set1_ps(1.0f), most = _mm512_set1_ps(qmax);
    __m512i found = _mm512_setzero_si512();
    for (int k = 7; k >= 0; --k) {
      const int r = (8 * q + k) / vectors, v = (8 * q + k) % vectors;
      const __m512 u = exact(r, v), size = _mm512_div_ps(_mm512_load_ps(scale + 16 * v), most), by = _mm512_set1_ps(channel[r]);
      __m512 value;
      if constexpr (dithered(mode)) {
        const __m512 part = _mm512_mul_ps(u, _mm512_div_ps(one, by));
        value = _mm512_fmadd_ps(part, _mm512_div_ps(one, size), _mm512_load_ps(dither + 16 * v));
      } else {
        value = _mm512_div_ps(u, _mm512_mul_ps(by, size));
      }
      value = _mm512_min_ps(_mm512_max_ps(value, _mm512_set1_ps(-qmax)), most);
      const __m512i code = _mm512_and_si512(_mm512_cvtps_epi32(value), _mm512_set1_epi32(15));
      found = _mm512_or_si512(_mm512_slli_epi32(found, 4), code);
    }
    _mm512_storeu_si512(codes + 64 * q, _mm512_permutexvar_epi8(to_bytes(), found));
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
      const uint64_t low = _mm512_testn_epi16_mask(halves[2 * h], fraction);
      unsure[h] = low | static_cast<uint64_t>(_mm512_testn_epi16_mask(halves[2 * h + 1], fraction)) << 32;
    }
    count_again(kCodes, __builtin_popcountll(unsure[0]) + __builtin_popcountll(unsure[1]));
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
      __m512 out[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, sum[2] = {out[0], out[0]};
      if constexpr (Windowed) {
        for (int v = 0; v < vectors; v += 8) two_rows_of_window(base + i, v, out, sum, most);
      } else {
        __m512i raw[2];
        const __m512 by[2] = {_mm512_set1_ps(z[0][base + i]), _mm512_set1_ps(z[0][base + i + 1])};
        two_rows<0>(base + i, raw, by, out, sum, most);
      }
      for (int s = 0; s < 2; ++s) {
        _mm512_store_ps(reads[i + s], out[s]);
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
    use(r, V, _mm512_fmadd_ps(by, _mm512_load_ps(fresh[0] + 16 * V), code_of<K>(raw)), out, sum, most);
  }

  // w of row r, vector v.
  inline __attribute__((always_inline)) void use(int r, int v, __m512 w, __m512& out, __m512& sum, __m512* most) {
    _mm512_store_ps(tile + r * n + 16 * v, w);
    out = _mm512_fmadd_ps(w, _mm512_load_ps(read + 16 * v), out);
    if constexpr (Calibrated) {
      most[v] = _mm512_range_ps(most[v], w, 0x0b);
    } else {
      sum = _mm512_fmadd_ps(size_of(w), _mm512_load_ps(step + 16 * v), sum);
    }
  }

  // Up to eight vectors of two rows from `first` on: the tokens of a window are added while they lie in registers.
  inline __attribute__((always_inline)) void two_rows_of_window(int r, int first, __m512* out, __m512* sum, __m512* most) {
    constexpr int count = vectors < 8 ? vectors : 8;
    __m512 w[2][count];
    const __m512i raw = lanes((r * vectors + first) / 8);
    some_codes<0, 0>(raw, w[0]);
    some_codes<0, count % 8>(vectors < 8 ? raw : lanes(((r + 1) * vectors + first) / 8), w[1]);
    for (int k = 0; k < tokens(); ++k) {
      const __m512 by[2] = {_mm512_set1_ps(z[k][r]), _mm512_set1_ps(z[k][r + 1])};
#pragma GCC unroll 8
      for (int v = 0; v < count; ++v) {
        const __m512 input = _mm512_load_ps(fresh[k] + 16 * (first + v));
        w[0][v] = _mm512_fmadd_ps(by[0], input, w[0][v]);
        w[1][v] = _mm512_fmadd_ps(by[1], input, w[1][v]);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < count; ++v) {
      use(r, first + v, w[0][v], out[0], sum[0], most);
      use(r + 1, first + v, w[1][v], out[1], sum[1], most);
    }
  }

  // Codes First + V and later of every lane.
  template <int V, int First>
  static inline __attribute__((always_inline)) void some_codes(__m512i raw, __m512* w) {
    w[V] = code_of<First + V>(raw);
    if constexpr (V + 1 < (vectors < 8 ? vectors : 8)) some_codes<V + 1, First>(raw, w);
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
    __m512 inputs = _mm512_setzero_ps();
    for (int k = 0; k < tokens(); ++k) {
      const __m512 size = size_of(_mm512_loadu_ps(window.drive[k] + base));
      inputs = _mm512_fmadd_ps(size, _mm512_set1_ps(0.51f * kUnit / n * of_input() * later[k]), inputs);
    }
    // relative distance of the root: half that of the mean, to which 2 J + 5 of our sum and 5 + log2 J of theirs belong, and
    // three roundings follow
    const float of_root = (0.5f * of_state() + 9.6f + J) * kUnit;
    const __m512 some = _mm512_max_ps(mean, _mm512_set1_ps(1e-30f));
    const __m512 off = _mm512_fmadd_ps(inputs, _mm512_rcp14_ps(some), _mm512_set1_ps(of_root));
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
    kept = _mm512_max_ps(kept, over);
    for (int k = 0; k < tokens(); ++k) {
      reach[k] = _mm512_max_ps(reach[k], _mm512_mul_ps(size_of(_mm512_load_ps(z[k] + base)), over));
    }
  }

  // State scales; whether codes are to be found by the definition.
  inline __attribute__((always_inline)) bool columns(int p, uint16_t* out) {
    alignas(64) float natural[n], apart[n], found[n], near[n];
    alignas(64) uint16_t half[n];
    uint64_t unsure[(n + 63) / 64] = {};
    __m512 farthest[most_tokens];
    for (int k = 0; k < tokens(); ++k) {
      // roundings of an input, fewer for later tokens
      const float count = Windowed ? 4.0f * static_cast<float>(tokens() - k) + 5.5f : of_input();
      farthest[k] = _mm512_set1_ps(count * _mm512_reduce_max_ps(reach[k]));
    }
    const __m512 of_codes = _mm512_set1_ps(8.0f * of_state() * _mm512_reduce_max_ps(kept));
    for (int v = 0; v < vectors; ++v) {
      const __m512 most = largest[v], unit = unit_of(v);
      // how far u / channel may be from the definition's in any row, in 2^-24
      __m512 distance = Windowed ? of_codes : _mm512_mul_ps(most, _mm512_set1_ps(of_state()));
      for (int k = 0; k < tokens(); ++k) {
        distance = _mm512_fmadd_ps(farthest[k], size_of(_mm512_load_ps(fresh[k] + 16 * v)), distance);
      }
      const __m512 off = _mm512_mul_ps(_mm512_fmadd_ps(most, _mm512_set1_ps(kQuotient), distance), _mm512_set1_ps(kUnit));
      const __m256i low = to_half(clamp_scale(_mm512_mul_ps(_mm512_sub_ps(most, off), unit)));
      const __m256i high = to_half(clamp_scale(_mm512_mul_ps(_mm512_add_ps(most, off), unit)));
      unsure[v / 4] |= static_cast<uint64_t>(_mm256_cmpneq_epi16_mask(low, high)) << v % 4 * 16;
      _mm256_store_si256(reinterpret_cast<__m256i*>(half + 16 * v), low);
      _mm512_store_ps(found + 16 * v, _mm512_mul_ps(most, unit));
      _mm512_store_ps(near + 16 * v, _mm512_fnmadd_ps(off, _mm512_set1_ps(2.1f), most));
      _mm512_store_ps(apart + 16 * v, distance);
    }
    // in a loop of its own: what follows does not wait for a branch that goes wrong
    for (int word = 0; word < (n + 63) / 64; ++word) {
      for (uint64_t left = unsure[word]; __builtin_expect(left != 0, 0); left &= left - 1) {
        const int i = 64 * word + __builtin_ctzll(left);
        found[i] = exact_most(i, near[i], p);
        half[i] = static_cast<uint16_t>(_mm256_extract_epi16(to_half(clamp_scale(_mm512_set1_ps(found[i]))), 0));
      }
    }
    __m512 worst = _mm512_setzero_ps();
    __mmask16 careful = 0;
    for (int v = 0; v < vectors; ++v) {
      const __m512 most = _mm512_load_ps(found + 16 * v), zero = _mm512_setzero_ps();
      const __m256i scales = _mm256_load_si256(reinterpret_cast<const __m256i*>(half + 16 * v));
      const __m512 value = _mm512_cvtph_ps(scales);
      const __m512 by = _mm512_mul_ps(unit_of(v), _mm512_mul_ps(_mm512_set1_ps(qmax), reciprocal(value)));
      // beyond fp16's normal numbers a scale may be far below the maximum that it stands for
      careful |= _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(most, zero, _CMP_NEQ_UQ), most, _mm512_set1_ps(kNormal), _CMP_NGE_UQ);
      careful |= _mm512_cmp_ps_mask(most, _mm512_set1_ps(kLargest), _CMP_NLT_UQ);
      worst = _mm512_max_ps(_mm512_mul_ps(_mm512_load_ps(apart + 16 * v), by), worst);
      _mm512_store_ps(scale + 16 * v, value);
      _mm512_store_ps(times + 16 * v, by);
      if constexpr (dithered(mode)) _mm512_store_ps(dither + 16 * v, dither_of(scales));
    }
    join_pairs(scale, natural, n);
    for (int i = 0; i < n; i += 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), to_half(_mm512_load_ps(natural + i)));
    }
    return careful != 0 || !ignore_digits(_mm512_reduce_max_ps(worst));
  }

  // What a column's |w|, or |u| / channel, is multiplied by to be a state scale.
  inline __attribute__((always_inline)) __m512 unit_of(int v) const {
    const __m512 unit = _mm512_load_ps(step + 16 * v);
    return Calibrated ? _mm512_mul_ps(unit, _mm512_set1_ps(faded[tokens() - 1])) : unit;
  }

  // How many digits are ignored when values of codes are up to `worst` 2^-24 from the definition's before they are multiplied
  // by what is common to a column; false where they are too many.
  inline __attribute__((always_inline)) bool ignore_digits(float worst) {
    // quotients and products of numbers up to 8, with what was left out
    const float apart = 1.02f * worst + 8.0f * 16.0f;
    int ignored = 0;
    float shift = 0.0f;
    if (!(apart <= kSure)) {
      // half the range that is ignored, but for the rounding of the sum
      for (ignored = 2; !(apart <= kSure * static_cast<float>((1 << ignored) - 1)); ++ignored) {
        if (ignored == kMostIgnored) return false;
      }
      shift = static_cast<float>(1 << (ignored - 1)) / 4096.0f;
    }
    fraction = _mm512_set1_epi16(static_cast<int16_t>(0x1000 - (1 << ignored)));
    const __m512 more = _mm512_set1_ps(kFixed + 0.5f + shift);
    for (int v = 0; v < vectors; ++v) {
      _mm512_store_ps(offset + 16 * v, dithered(mode) ? _mm512_add_ps(_mm512_load_ps(dither + 16 * v), more) : more);
    }
    return true;
  }

  // Code plus 1/2 (and dither) of vector `at` of the tile in the lowest sixteen bits: twelve behind the point.
  inline __attribute__((always_inline)) __m512i fixed_point(int at, __m512 by, __m512 more) const {
    return _mm512_castps_si512(_mm512_fmadd_ps(_mm512_load_ps(tile + 16 * at), by, more));
  }

  // A number within 2^-13 of a whole one has a fraction of 0; all others have the same code as whatever is so near to them.
  // Where the lowest d > 1 digits are ignored, half their range is added, and 2^-13 is (2^d - 1) 2^-13.
  inline __attribute__((always_inline)) void encode(int p) {
    const __m512i digits = fraction, bytes_of = to_bytes();
    const __m512i up = _mm512_set4_epi32(0x0d0c0d0c, 0x09080908, 0x05040504, 0x01000100);
    for (int first = 0; first < p * vectors / 8; first += vectors / 8 > 0 ? vectors / 8 : 1) {
      group<0>(first, digits, bytes_of, up);
      if constexpr (vectors > 8) group<8>(first + 1, digits, bytes_of, up);
    }
  }

  // 64 bytes, whose first vector is vector V of a row.
  template <int V>
  inline __attribute__((always_inline)) void group(int q, __m512i digits, __m512i bytes_of, __m512i up) {
    __m512i packed = _mm512_setzero_si512();
    __mmask32 sure = ~0u;
    __m512i both[4];
#pragma GCC unroll 4
    for (int j = 3; j >= 0; --j) {
      const int v = (V + j) % vectors, other = (V + j + 4) % vectors;
      const __m512i low = fixed_point(8 * q + j, _mm512_load_ps(times + 16 * v), _mm512_load_ps(offset + 16 * v));
      const __m512i high = fixed_point(8 * q + j + 4, _mm512_load_ps(times + 16 * other), _mm512_load_ps(offset + 16 * other));
      both[j] = _mm512_mask_shuffle_epi8(low, 0xccccccccccccccccull, high, up);
      sure = _mm512_mask_test_epi16_mask(sure, both[j], digits);
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

// The tokens of a window, or one; false, and nothing written, where tile.h has to do it.
template <int J, Mode mode, bool Windowed>
bool update_nibbles(uint8_t* codes, uint16_t* channel, uint16_t* scale, const uint16_t* fixed, const Window& window, const float* b,
                    const float* c, float* y, float* tile, int p) {
  static_assert(J >= 2);
  Nibbles<J, mode, Windowed> head(codes, window, b, tile, p);
  if (!head.prepare(calibrated(mode) ? fixed : channel, scale, c, p)) {
    count_again(kHeads, 1);
    return false;
  }
  head.template rows<true>(0, y, channel);
  for (int base = kRows; base < p; base += kRows) head.template rows<false>(base, y, channel);
  if constexpr (!calibrated(mode)) head.divide_last(p);
  if (__builtin_expect(head.columns(p, scale), 0)) {
    count_again(kHeads, 1);
    for (int q = 0; q < p * head.vectors / 8; ++q) head.exact_codes(q);
  } else {
    head.encode(p);
  }
  return true;
}

}  // namespace state

LLMCOMPRESS_TARGET_END
#endif
