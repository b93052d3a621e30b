// Heads of a gated delta rule with packed states: what delta.cpp offers.
#pragma once

#include <vector>

#include "heads.h"
#include "window.h"

namespace state {

// What a packed state says of a key: told [P] = h k; key [N] in natural order.
using Tell = void (*)(const uint8_t* codes, const uint16_t* channel, const uint16_t* scale, const float* key, float* told,
                      int channels);

// What a token brings to a head beside key and query: value [P].
struct DeltaToken {
  const float* value;
  float decay, step;
};

// Heads one after the other; of one thread. `window` is 1 where every token rounds.
class DeltaHeads {
 public:
  DeltaHeads(Mode mode, int bits, int64_t window, int64_t heads, int64_t groups, int64_t channels, int64_t states);
  bool runs() const { return tell_ != nullptr && (window_ > 1 ? windows_.runs() : update_ != nullptr); }
  int64_t row() const { return windows_.row(); }
  // One token of a head: y [P]; tile [P, N] is scratch. Heads of a group that follow each other share what `share` was told.
  void token(int64_t head, const Kept& kept, const DeltaToken& token, float* y, float* tile);
  // Another group, sequence or token begins; key and query [N] stay where they are until the next one does.
  void share(int64_t head, const Kept& kept, const float* key, const float* query);

 private:
  Head update_;
  Tell tell_;
  WindowHeads windows_;
  const int64_t window_, heads_, groups_, channels_, states_;
  std::vector<float> memory_;
  const float *key_ = nullptr, *query_ = nullptr;
  float* pairs_;            // [2, N], both in pairs
  float dots_[kMaxWindow];  // of each kept token's key with this one
};

}  // namespace state
