// States of channels that have time steps and decays of their own, as Mamba-1 has them, N = 16 states each.
//
// A vector holds one state of sixteen channels, so that time steps, inputs and scales of channels are vectors too, and what
// belongs to a state is a number. Heads are only a way to cut channels: those of one share the scales of states.
#pragma once

#include <cstdint>
#include <vector>

#include "model.h"
#include "tile.h"

namespace state {

constexpr int kChannelStates = 16;
constexpr int kBlockFloats = kChannelStates * 16;  // a state of sixteen channels, [N][16]
constexpr int kHeadChannels = 64;                  // of a head, at most; a multiple of sixteen

// a / ln 2 of channels, from [I, N] to [I / 16, N, 16].
std::vector<float> rates_of(const float* a, int64_t channels, int64_t states);

// What is kept of one head of a sequence, and of its replay window: rows `dt x` [I], dt [I], B [N].
struct ChannelKept {
  uint8_t* codes;         // [P, N bits / 8], or null with floats
  uint16_t* channel;      // fp16 [P], or null where it is calibrated
  uint16_t* scale;        // fp16 [N]
  const uint16_t* fixed;  // fp16 [P], or null
  float* floats;          // [P / 16, N, 16], or null
  float* recent;          // the sequence's [window - 1, 2 I + N], or null
  int64_t count;          // rows of it that are filled
};

// How states of a layer are kept.
struct ChannelHeads {
  Mode mode;
  int bits;         // 0 for floats
  int64_t window, inner, channels;
  const uint16_t* fixed;  // fp16 [I], or null

  int64_t row() const { return 2 * inner + kChannelStates; }
  ChannelKept kept(const MixerStates& held, int64_t layer, int64_t slot, int64_t head) const;
  // One token of a head; rates [P / 16, N, 16], dt and x [P], b and c [N], y [P] is read from the fresh state. Of a window that
  // goes on its row is written, B by the first head; `count` is left to the caller.
  void token(int64_t head, const ChannelKept& kept, const float* rates, const float* dt, const float* x, const float* b,
             const float* c, float* y) const;
  // Codes and scales of a head's state [P / 16, N, 16]; a multiple of 64 bytes is where it lies.
  void pack(const float* tile, const ChannelKept& kept) const;
};

// Sixteen channels through tokens of a prompt in floats; state [N][16] before and after, dt [T] and x [T] with rows `stride`
// floats apart, bc [T] rows of B [N] and C [N]. x becomes y + d x.
void scan_channels(float* state, const float* rates, int64_t tokens, const float* dt, float* x, int64_t stride, const float* bc,
                   const float* d);

}  // namespace state
