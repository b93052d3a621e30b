// Low-bit states of all delta rules of a model, for the decode step (decode.h), which does everything else.
#include "../decode/decode.h"
#include "delta.h"
#include "memory.h"

namespace state {
namespace {

using llmcompress::decode::LowStates;

// What Python holds of sequences, mirrored in llmcompress_kernels/decode_low_states.py; S slots, L layers.
struct Held {
  uint8_t* codes;         // [L, S, H, P, N bits / 8]
  uint16_t* channel;      // [L, S, H, P] or null
  uint16_t* scale;        // [L, S, H, N]
  const uint16_t* fixed;  // [L, H, P] or null
  float* recent;          // [L, S, R - 1, row] or null
  int32_t* count;         // [S]
  int64_t slots, heads, groups, channels, states, bits, window, refit, dither;

  int64_t share() const { return heads / groups; }
  Mode mode() const { return mode_of(fixed, refit, dither); }
  bool like(const Held& o) const {
    return mode() == o.mode() && heads == o.heads && groups == o.groups && channels == o.channels && states == o.states &&
           bits == o.bits && window == o.window;
  }
  Kept head(int64_t layer, int64_t slot, int64_t head, int64_t row) const {
    const int64_t place = layer * slots + slot, i = place * heads + head;
    return {codes + i * channels * states * bits / 8, channel == nullptr ? nullptr : channel + i * channels, scale + i * states,
            fixed == nullptr ? nullptr : fixed + (layer * heads + head) * channels,
            window > 1 ? recent + place * (window - 1) * row : nullptr, window > 1 ? count[slot] : 0};
  }
};

// What a thread works with, made anew where sizes change.
struct Worker {
  Held of{};
  std::unique_ptr<DeltaHeads> heads;
  Floats tile;

  void suit(const Held& h) {
    if (heads != nullptr && of.like(h)) return;
    heads = std::make_unique<DeltaHeads>(h.mode(), static_cast<int>(h.bits), h.window, h.heads, h.groups, h.channels, h.states);
    tile = floats(h.channels * h.states);
    of = h;
  }
};

thread_local Worker worker;

void step(const void* held, int32_t layer, int32_t slot, int32_t group, const LowStates::Token& token, float* out) {
  const Held& h = *static_cast<const Held*>(held);
  worker.suit(h);
  DeltaHeads& run = *worker.heads;
  for (int64_t i = 0; i < h.share(); ++i) {
    const int64_t head = group * h.share() + i;
    const Kept kept = h.head(layer, slot, head, run.row());
    if (i == 0) run.share(head, kept, token.key, token.query);
    run.token(head, kept, {token.value + i * h.channels, token.decay[i], token.step[i]}, out + i * h.channels, worker.tile.get());
  }
}

void round_group(const void* held, int32_t layer, int32_t slot, int32_t group, const float* states) {
  const Held& h = *static_cast<const Held*>(held);
  worker.suit(h);
  const Pack pack = head_pack(h.mode(), static_cast<int>(h.bits), h.states);
  float* const tile = worker.tile.get();
  for (int64_t i = 0; i < h.share(); ++i) {
    for (int64_t p = 0; p < h.channels; p += 16) {
      turn_channels(states + (i * h.channels + p) * h.states, 16, h.states, true, tile + p * h.states);
    }
    const Kept kept = h.head(layer, slot, group * h.share() + i, worker.heads->row());
    pack(tile, kept.codes, kept.channel, kept.scale, kept.fixed, static_cast<int>(h.channels));
  }
  if (layer == 0 && group == 0 && h.window > 1) h.count[slot] = 0;
}

void advance(const void* held, const int32_t* slots, int64_t count) {
  const Held& h = *static_cast<const Held*>(held);
  for (int64_t b = 0; h.window > 1 && b < count; ++b) {
    int32_t& filled = h.count[slots[b]];
    filled = filled == h.window - 1 ? 0 : filled + 1;
  }
}

}  // namespace
}  // namespace state

extern "C" __attribute__((visibility("default"))) const llmcompress::decode::LowStates* llmc_delta_rules() {
  static const llmcompress::decode::LowStates run = {state::step, state::round_group, state::advance};
  return &run;
}
