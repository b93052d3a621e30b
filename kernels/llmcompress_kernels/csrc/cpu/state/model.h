// A whole Mamba-2 model, natively: what Python and C++ agree on. Plain C structs, mirrored in llmcompress_kernels/mamba2.py.
//
// Legend: B sequences of a step, T tokens of a prompt, L layers, D hidden, H heads, P channels of a head, I = H P,
// G groups, N states, C = I + 2 G N channels of the convolution, V vocabulary, S slots.
#pragma once

#include <cstdint>

#include "../decode/decode.h"

namespace state {

using llmcompress::decode::Matrix;
using llmcompress::decode::Mixers;

struct MixerLayer {
  const float* norm;       // [D]
  Matrix in_proj;          // [I + C (+ H), D]: gate, convolution inputs, time steps unless `dt_proj` is there
  Matrix dt_proj;          // [H, D] dense, or ABSENT
  Matrix out_proj;         // [D, I]
  const float* conv_weight;  // [C, 4]
  const float* conv_bias;    // [C] or null
  const float *dt_bias, *a, *d;  // [H]; a is negative
  const float* gain;       // [I], the gated norm's weight
  const uint16_t* fixed;   // fp16 [H, P] calibrated channel scale, or null
  int32_t in_planes, out_planes;  // bytes of fixed-point activations (lowbit.h)
};

struct MixerModel {
  const MixerLayer* layers;
  const float* final_norm;  // [D]
  Matrix embedding, head;   // [V or more, D]
  int64_t vocabulary;
  int32_t layer_count, hidden, heads, channels, states, groups;
  int32_t bits;             // of the states' codes, 0 for fp32
  int32_t refit, head_planes;
  float epsilon, gate_epsilon;  // of the layers' norms and of the gated ones
  float low, high;          // limits of time steps, in prompts only
  int32_t dither;           // before states are rounded
  int32_t window;           // tokens between two roundings of states: R
};

// What is kept of each sequence: [L, S, ...]; `codes` null with fp32 states.
struct MixerStates {
  uint8_t* codes;     // [H, P, N bits / 8]
  uint16_t* channel;  // fp16 [H, P], or null where it is calibrated
  uint16_t* scale;    // fp16 [H, N]
  float* floats;      // [H, P, N], or null
  float* conv;        // [C, 4], newest last
  float* recent;      // [R - 1, I + H + G N], the tokens since states were rounded, or null
  int32_t* count;     // one for all layers [S]: how many of these rows are filled
  int64_t slots;
};

struct MixerStep {
  const int64_t* tokens;  // [B]
  const int32_t* slots;   // [B], all different
  float* logits;          // [B, V rounded up to 16]
  int64_t* best;          // [B] or null
  double* seconds;        // [kPhases], time of thread 0 by phase, added to, or null
  int64_t batch;
  int32_t threads, reserved;
};

// A part of a prompt. States stay in floats until the last part, whose end is stored.
struct MixerPrompt {
  const int64_t* tokens;  // [T]
  float* logits;          // [V rounded up to 16], written after the last part
  double* seconds;        // as in a step
  int64_t count;
  int32_t slot, first, last, threads;
};

enum MixerPhase : int { kInput, kInProj, kMix, kState, kGate, kOutProj, kHead, kWait, kPhases };

}  // namespace state
