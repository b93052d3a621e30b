// Mamba-1's states: what channels.h declares. Codes and scales are those of the definition (reference/mamba1.py) to the last
// bit for the same fresh state; decays are within 1.5e-7 of exp's.
#include "channels.h"

#include <cmath>
#include <cstring>

namespace state {
namespace {

constexpr int kN = kChannelStates;

// 2^t for t of 0 and below, within 7e-8 of itself: 2^n times a polynomial on [-1/2, 1/2].
STATE_INLINE __m512 power_of_two(__m512 t) {
  t = _mm512_max_ps(t, _mm512_set1_ps(-126.0f));
  const __m512 n = _mm512_roundscale_ps(t, 0), r = _mm512_sub_ps(t, n);
  __m512 p = _mm512_set1_ps(1.54614475e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.33908674e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.61805667e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5503571e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40226509e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93147188e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// exp(dt a) h + drive B: products and their sum are rounded one by one, as in the definition.
STATE_INLINE void advance(__m512* h, const float* rates, __m512 dt, __m512 drive, const float* b) {
  for (int n = 0; n < kN; ++n) {
    const __m512 decay = power_of_two(_mm512_mul_ps(dt, _mm512_loadu_ps(rates + 16 * n)));
    h[n] = _mm512_add_ps(_mm512_mul_ps(decay, h[n]), _mm512_mul_ps(drive, _mm512_set1_ps(b[n])));
  }
}

STATE_INLINE __m512 read_out(const __m512* h, const float* c) {
  __m512 sum = _mm512_setzero_ps();
  for (int n = 0; n < kN; ++n) sum = _mm512_fmadd_ps(h[n], _mm512_set1_ps(c[n]), sum);
  return sum;
}

// The second half is added to the first until one is left.
STATE_INLINE __m512 folded(__m512* values) {
  for (int w = kN / 2; w >= 1; w /= 2) {
    for (int n = 0; n < w; ++n) values[n] = _mm512_add_ps(values[n], values[n + w]);
  }
  return values[0];
}

STATE_INLINE __m512 magnitude(__m512 v) { return _mm512_and_ps(v, _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff))); }

// Rows of codes of sixteen channels, a word of each to a vector: words [Bits / 2][16].
template <int Bits>
STATE_INLINE void load_words(const uint8_t* codes, float (*words)[16]) {
  constexpr int count = Bits / 2;
  for (int p = 0; p < 16; ++p) {
    for (int k = 0; k < count; ++k) std::memcpy(&words[k][p], codes + (p * count + k) * 4, 4);
  }
}

template <int Bits>
STATE_INLINE void store_words(const float (*words)[16], uint8_t* codes) {
  constexpr int count = Bits / 2;
  for (int p = 0; p < 16; ++p) {
    for (int k = 0; k < count; ++k) std::memcpy(codes + (p * count + k) * 4, &words[k][p], 4);
  }
}

// A stored state of sixteen channels: codes [16, N bits / 8], channel scales, and scales of states over qmax.
template <int Bits>
STATE_INLINE void decode(const uint8_t* codes, __m512 channel, const float* step, __m512* h) {
  alignas(64) float words[Bits / 2][16];
  load_words<Bits>(codes, words);
  const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  constexpr int in_word = 32 / Bits;
  for (int n = 0; n < kN; ++n) {
    const __m512i word = _mm512_castps_si512(_mm512_load_ps(words[n / in_word]));
    const unsigned at = unsigned(n % in_word * Bits);
    // a permutation looks at the lowest four bits of its index only
    const __m512 code = Bits == 4 ? _mm512_permutexvar_ps(_mm512_srli_epi32(word, at), values)
                                  : _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(word, 24 - at), 24));
    h[n] = _mm512_mul_ps(code, _mm512_mul_ps(channel, _mm512_set1_ps(step[n])));
  }
}

STATE_INLINE void steps_of(const uint16_t* scale, float qmax, float* step) {
  _mm512_storeu_ps(step, _mm512_div_ps(half_to_float(scale), _mm512_set1_ps(qmax)));
}

// Scales of a head's states from its largest |u| / channel.
struct StateScales {
  alignas(64) float most[kN][16], step[kN], unstep[kN], dither[kN];
  unsigned nan = 0;  // states that hold one

  StateScales() {
    for (int n = 0; n < kN; ++n) _mm512_store_ps(most[n], _mm512_setzero_ps());
  }
  void take_in(int n, __m512 part) {
    nan |= unsigned(_mm512_cmp_ps_mask(part, part, _CMP_UNORD_Q) != 0) << n;
    _mm512_store_ps(most[n], _mm512_max_ps(part, _mm512_load_ps(most[n])));
  }
  void finish(Mode mode, float qmax, uint16_t* out) {
    const __m512 largest =
        fold_rows(most, [&](__m512 a, __m512 b) __attribute__((always_inline)) { return _mm512_max_ps(a, b); });
    const __m256i half = to_half(clamp_scale(largest));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), half);
    _mm512_store_ps(dither, dither_of(half));
    // a state that has met NaN shows it: in all columns where the mean of a row is one
    if (nan != 0 && !calibrated(mode)) nan = (1u << kN) - 1;
    for (int n = 0; n < kN; ++n) {
      if (nan >> n & 1) out[n] = 0x7e00;
    }
    steps_of(out, qmax, step);
    _mm512_store_ps(unstep, _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(step)));
  }
};

// Codes of sixteen channels in floats, whole numbers.
STATE_INLINE void codes_of(const StateScales& s, Mode mode, float qmax, __m512 channel, __m512 inverse, const float* fresh,
                           __m512* codes) {
  const __m512 most = _mm512_set1_ps(qmax), least = _mm512_set1_ps(-qmax);
  for (int n = 0; n < kN; ++n) {
    const __m512 u = _mm512_loadu_ps(fresh + 16 * n);
    __m512 value;
    if (dithered(mode)) {
      value = _mm512_fmadd_ps(_mm512_mul_ps(u, inverse), _mm512_set1_ps(s.unstep[n]), _mm512_set1_ps(s.dither[n]));
    } else {
      value = _mm512_div_ps(u, _mm512_mul_ps(channel, _mm512_set1_ps(s.step[n])));
    }
    // halves to even, then clamped: a value between qmax and qmax + 1/2 gives qmax either way
    codes[n] = _mm512_roundscale_ps(_mm512_min_ps(_mm512_max_ps(value, least), most), 0);
  }
}

template <int Bits>
STATE_INLINE void encode(const __m512* codes, uint8_t* out) {
  alignas(64) float words[Bits / 2][16];
  constexpr int in_word = 32 / Bits;
  const __m512i mask = _mm512_set1_epi32((1 << Bits) - 1);
  for (int k = 0; k < Bits / 2; ++k) {
    __m512i word = _mm512_setzero_si512();
    for (int i = 0; i < in_word; ++i) {
      const __m512i code = _mm512_and_si512(_mm512_cvtps_epi32(codes[k * in_word + i]), mask);
      word = _mm512_xor_si512(word, _mm512_slli_epi32(code, unsigned(i * Bits)));
    }
    _mm512_store_ps(words[k], _mm512_castsi512_ps(word));
  }
  store_words<Bits>(words, out);
}

// Channel scales fitted to the codes by least squares: times sum q v / sum q^2, v = (u / channel) / step.
STATE_INLINE __m256i refitted(const StateScales& s, const float* fresh, const __m512* codes, __m512 channel, __m512 inverse) {
  __m512 product[kN], below = _mm512_setzero_ps();
  for (int n = 0; n < kN; ++n) {
    const __m512 value =
        _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(fresh + 16 * n), inverse), _mm512_set1_ps(s.unstep[n]));
    product[n] = _mm512_mul_ps(codes[n], value);
    below = _mm512_fmadd_ps(codes[n], codes[n], below);  // whole numbers: exact in any order
  }
  const __m512 top = folded(product), zero = _mm512_setzero_ps();
  const __mmask16 fits = _mm512_cmp_ps_mask(top, zero, _CMP_GT_OQ) & _mm512_cmp_ps_mask(below, zero, _CMP_GT_OQ);
  const __m512 ratio = _mm512_mask_div_ps(_mm512_set1_ps(1.0f), fits, top, below);
  return to_half(clamp_scale(_mm512_mul_ps(channel, ratio)));
}

template <int Bits>
void pack_head(const ChannelHeads& how, const float* tile, const ChannelKept& kept) {
  constexpr float qmax = (1 << (Bits - 1)) - 1;
  const Mode mode = how.mode;
  const int64_t channels = how.channels;
  alignas(64) uint16_t wide[kHeadChannels];
  const uint16_t* const given = calibrated(mode) ? kept.fixed : wide;
  StateScales scales;
  for (int64_t p = 0; p < channels; p += 16) {
    const float* fresh = tile + p * kN;
    if (!calibrated(mode)) {
      __m512 size[kN];
      for (int n = 0; n < kN; ++n) size[n] = magnitude(_mm512_loadu_ps(fresh + 16 * n));
      const __m512 mean = _mm512_mul_ps(folded(size), _mm512_set1_ps(1.0f / kN));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(wide + p), to_half(clamp_scale(_mm512_sqrt_ps(mean))));
    }
    const __m512 channel = half_to_float(given + p);
    for (int n = 0; n < kN; ++n) {
      scales.take_in(n, _mm512_div_ps(magnitude(_mm512_loadu_ps(fresh + 16 * n)), channel));
    }
  }
  scales.finish(mode, qmax, kept.scale);
  for (int64_t p = 0; p < channels; p += 16) {
    const float* fresh = tile + p * kN;
    const __m512 channel = half_to_float(given + p), inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), channel);
    __m512 codes[kN];
    codes_of(scales, mode, qmax, channel, inverse, fresh, codes);
    encode<Bits>(codes, kept.codes + p * kN * Bits / 8);
    if (calibrated(mode)) continue;
    __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(wide + p));
    if (mode == kRefitted) stored = refitted(scales, fresh, codes, channel, inverse);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(kept.channel + p), stored);
  }
}

// With 0 bits the state is kept in floats.
template <int Bits>
void token_of_head(const ChannelHeads& how, int64_t head, const ChannelKept& kept, const float* rates, const float* dt,
                   const float* x, const float* b, const float* c, float* y) {
  const bool goes_on = kept.recent != nullptr && kept.count < how.window - 1;
  float* const now = goes_on ? kept.recent + kept.count * how.row() : nullptr;
  const int64_t channels = how.channels, inner = how.inner;
  alignas(64) float tile[kHeadChannels * kN], step[kN];
  if constexpr (Bits != 0) steps_of(kept.scale, (1 << (Bits - 1)) - 1, step);
  for (int64_t p = 0; p < channels; p += 16) {
    const int64_t at = head * channels + p;
    __m512 h[kN];
    if constexpr (Bits != 0) {
      const __m512 channel = half_to_float((calibrated(how.mode) ? kept.fixed : kept.channel) + p);
      decode<Bits>(kept.codes + p * kN * Bits / 8, channel, step, h);
    } else {
      for (int n = 0; n < kN; ++n) h[n] = _mm512_loadu_ps(kept.floats + p * kN + 16 * n);
    }
    for (int64_t k = 0; kept.recent != nullptr && k < kept.count; ++k) {
      const float* old = kept.recent + k * how.row();
      advance(h, rates + p * kN, _mm512_loadu_ps(old + inner + at), _mm512_loadu_ps(old + at), old + 2 * inner);
    }
    const __m512 times = _mm512_loadu_ps(dt + p), drive = _mm512_mul_ps(times, _mm512_loadu_ps(x + p));
    advance(h, rates + p * kN, times, drive, b);
    _mm512_storeu_ps(y + p, read_out(h, c));
    if (goes_on) {
      _mm512_storeu_ps(now + at, drive);
      _mm512_storeu_ps(now + inner + at, times);
      continue;
    }
    float* to = Bits != 0 ? tile : kept.floats;
    for (int n = 0; n < kN; ++n) _mm512_storeu_ps(to + p * kN + 16 * n, h[n]);
  }
  if (goes_on && head == 0) std::memcpy(now + 2 * inner, b, sizeof(float) * kN);
  if constexpr (Bits != 0) {
    if (!goes_on) pack_head<Bits>(how, tile, kept);
  }
}

}  // namespace

std::vector<float> rates_of(const float* a, int64_t channels, int64_t states) {
  std::vector<float> rates(static_cast<size_t>(channels * states));
  for (int64_t i = 0; i < channels; ++i) {
    for (int64_t n = 0; n < states; ++n) {
      const double exact = double(a[i * states + n]) * 1.4426950408889634;
      rates[size_t((i / 16 * states + n) * 16 + i % 16)] = float(exact);
    }
  }
  return rates;
}

ChannelKept ChannelHeads::kept(const MixerStates& held, int64_t layer, int64_t slot, int64_t head) const {
  const int64_t place = layer * held.slots + slot, from = place * inner + head * channels;
  return {held.codes == nullptr ? nullptr : held.codes + from * kN * bits / 8,
          held.channel == nullptr ? nullptr : held.channel + from,
          held.scale == nullptr ? nullptr : held.scale + from / channels * kN,
          fixed == nullptr ? nullptr : fixed + head * channels,
          held.floats == nullptr ? nullptr : held.floats + from * kN,
          held.recent == nullptr ? nullptr : held.recent + place * (window - 1) * row(),
          held.recent == nullptr ? 0 : held.count[slot]};
}

void ChannelHeads::pack(const float* tile, const ChannelKept& kept) const {
  bits == 4 ? pack_head<4>(*this, tile, kept) : pack_head<8>(*this, tile, kept);
}

void ChannelHeads::token(int64_t head, const ChannelKept& kept, const float* rates, const float* dt, const float* x,
                         const float* b, const float* c, float* y) const {
  if (bits == 4) return token_of_head<4>(*this, head, kept, rates, dt, x, b, c, y);
  bits == 8 ? token_of_head<8>(*this, head, kept, rates, dt, x, b, c, y) : token_of_head<0>(*this, head, kept, rates, dt, x, b, c, y);
}

void scan_channels(float* state, const float* rates, int64_t tokens, const float* dt, float* x, int64_t stride, const float* bc,
                   const float* d) {
  const __m512 straight = _mm512_loadu_ps(d);
  __m512 h[kN];
  for (int n = 0; n < kN; ++n) h[n] = _mm512_loadu_ps(state + 16 * n);
  for (int64_t t = 0; t < tokens; ++t) {
    const __m512 times = _mm512_loadu_ps(dt + t * stride), in = _mm512_loadu_ps(x + t * stride);
    const float* b = bc + t * 2 * kN;
    advance(h, rates, times, _mm512_mul_ps(times, in), b);
    _mm512_storeu_ps(x + t * stride, _mm512_fmadd_ps(straight, in, read_out(h, b + kN)));
  }
  for (int n = 0; n < kN; ++n) _mm512_storeu_ps(state + 16 * n, h[n]);
}

}  // namespace state

extern "C" {

// One token of each sequence: codes [S, I, N bits / 8], channel [S, I] or null with fixed [I], scale [S, I / P, N], or floats
// [S, I / 16, N, 16], are replaced; with `recent` [S, window - 1, 2 I + N] and count [S], which are too, states have a replay
// window. x, dt and y [S, I], a [I, N], b and c [S, N]. Returns 1 for a shape or width that has no kernel, 2 where a count is
// none of a window.
__attribute__((visibility("default"))) int llmc_mamba1_update(
    uint8_t* codes, uint16_t* channel, uint16_t* scale, const uint16_t* fixed, float* floats, float* recent, int32_t* count,
    const float* x, const float* dt, const float* a, const float* b, const float* c, float* y, int64_t window, int64_t sequences,
    int64_t inner, int64_t channels, int64_t states, int64_t bits, int64_t refit, int64_t dither) {
  using namespace state;
  if (states != kChannelStates || channels % 16 != 0 || channels > kHeadChannels || inner % channels != 0) return 1;
  if (codes == nullptr ? floats == nullptr : bits != 4 && bits != 8) return 1;
  for (int64_t s = 0; recent != nullptr && s < sequences; ++s) {
    if (count[s] < 0 || count[s] >= window) return 2;
  }
  const ChannelHeads run{mode_of(fixed, refit, dither), codes == nullptr ? 0 : int(bits), window, inner, channels, fixed};
  const MixerStates held{codes, channel, scale, floats, nullptr, recent, count, sequences};
  const std::vector<float> rates = rates_of(a, inner, states);
  const int64_t heads = inner / channels;
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t from = s * inner + head * channels;
      run.token(head, run.kept(held, 0, s, head), rates.data() + head * channels * states, dt + from, x + from, b + s * states, c + s * states, y + from);
    }
    if (recent != nullptr) count[s] = count[s] == window - 1 ? 0 : count[s] + 1;
  }
  return 0;
}

// A prompt of each sequence: x [S, T, I] becomes y + d x; dt [S, T, I], a [I, N], bc [S, T, 2 N], d [I]; floats [S, I / 16, N, 16]
// before and after.
__attribute__((visibility("default"))) int llmc_mamba1_scan(float* x, const float* dt, const float* a, const float* bc,
                                                            const float* d, float* floats, int64_t sequences, int64_t tokens,
                                                            int64_t inner, int64_t states) {
  using namespace state;
  if (states != kChannelStates || inner % 16 != 0) return 1;
  const std::vector<float> rates = rates_of(a, inner, states);
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t i = 0; i < inner; i += 16) {
      const int64_t at = s * tokens * inner + i;
      scan_channels(floats + (s * inner + i) * states, rates.data() + i * states, tokens, dt + at, x + at, inner,
                    bc + s * tokens * 2 * states, d + i);
    }
  }
  return 0;
}

}  // extern "C"
