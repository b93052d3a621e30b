// Replay windows of R tokens: the state of a sequence is rounded with every R-th token only. The tokens since then are kept
// as rows `drive | decay | B` and taken in again where it is rounded; in between a state is only read.
#pragma once

#include <vector>

#include "tile.h"

namespace state {

constexpr int64_t kMaxWindow = 64;

// What a head has taken in since its state was rounded, oldest token first, the new one last.
struct Window {
  const float* drive[kMaxWindow];  // dt x [P] each
  float decay[kMaxWindow];
  int tokens;
};

// The last token of a window: as Head of heads.h; b [tokens, N] and c [N] lie in pairs.
using Replay = void (*)(uint8_t* codes, uint16_t* channel, uint16_t* scale, const uint16_t* fixed, const Window& window,
                        const float* b, const float* c, float* y, float* tile, int channels);

// Any other: y [P] only; c [N] in natural order, dots [tokens] the products of each token's B with C.
using Read = void (*)(const uint8_t* codes, const uint16_t* channel, const uint16_t* scale, const Window& window, const float* dots,
                      const float* c, float* y, int channels);

// Null for a width or size that has no kernel.
Replay head_replay(Mode mode, int bits, int64_t states);
Read head_read(int bits, int64_t states);

// What is kept of one head, and of its sequence: recent [R - 1, row], of which `count` rows are filled.
struct Kept {
  uint8_t* codes;
  uint16_t *channel, *scale;
  const uint16_t* fixed;
  float* recent;
  int64_t count;
};

// Heads of windows, one after the other; of one thread.
class WindowHeads {
 public:
  WindowHeads(Mode mode, int bits, int64_t window, int64_t heads, int64_t groups, int64_t channels, int64_t states);
  bool runs() const { return replay_ != nullptr && read_ != nullptr && window_ > 1 && window_ <= kMaxWindow; }
  // Floats that are kept of a token.
  int64_t row() const { return heads_ * channels_ + heads_ + groups_ * states_; }
  // One token of a head: x [P] is dt x, b and c [N] of its group in natural order, y [P], tile [P, N] is scratch. The row is
  // written, by the first head of a group its B; `count` is left to the caller, for it is the same for all heads. Heads of a
  // group that follow each other are known by where b is.
  void token(int64_t head, const Kept& kept, float decay, const float* x, const float* b, const float* c, float* y, float* tile);
  // Another group, sequence or token begins, whose b may be in the place of the last one's.
  void share() { last_ = nullptr; }

 private:
  void share_group(int64_t head, const Kept& kept, const float* b, const float* c);
  void look_ahead(int64_t head, const Kept& kept) const;

  Replay replay_;
  Read read_;
  const int64_t window_, heads_, groups_, channels_, states_;
  const float* last_ = nullptr;  // whose group the following is of
  std::vector<float> memory_;
  float *b_, *c_;  // in pairs, [R, N] and [N]
  float dots_[kMaxWindow];
};

// Where part `part` of `parts` begins among `heads` tasks of each sequence, one sequence after the other, when those of a
// sequence that rounds take `kRounding` times as long.
template <class Rounds>
int64_t first_task(int64_t part, int64_t parts, int64_t sequences, int64_t heads, Rounds rounds) {
  constexpr int64_t kRounding = 6;
  int64_t total = 0;
  for (int64_t s = 0; s < sequences; ++s) total += heads * (rounds(s) ? kRounding : 1);
  int64_t left = total * part / parts;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t each = rounds(s) ? kRounding : 1;
    if (left < heads * each) return s * heads + (left + each - 1) / each;
    left -= heads * each;
  }
  return sequences * heads;
}

}  // namespace state
