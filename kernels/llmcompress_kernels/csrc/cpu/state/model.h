// A whole Mamba model, natively: what Python and C++ agree on. Plain C structs, mirrored in llmcompress_kernels/mamba2.py.
//
// Legend: B sequences of a step, T tokens of a prompt, L layers, D hidden, H heads, P channels of a head, I = H P,
// G groups, N states, C = I + 2 G N channels of the convolution, V vocabulary, S slots. With a rank R the mixers are those of
// Mamba-1: time steps and decays for each channel, C = I, G = 1, heads only a way to cut channels for their scales.
#pragma once

#include <cstdint>

#include "../decode/decode.h"

namespace state {

using llmcompress::decode::Matrix;
using llmcompress::decode::Mixers;

struct MixerLayer {
  const float* norm;       // [D]
  Matrix in_proj;          // [I + C (+ H), D]: gate, convolution inputs, time steps unless `dt_proj` is there;
                           // of Mamba-1 [2 I, D], the gate last
  Matrix x_proj;           // of Mamba-1 [R + 2 N, I]: inputs of time steps, B, C; else ABSENT
  Matrix dt_proj;          // [H, D] dense, or ABSENT; of Mamba-1 [I, R] dense, without bias
  Matrix out_proj;         // [D, I]
  const float* conv_weight;  // [C, 4]
  const float* conv_bias;    // [C] or null
  const float *dt_bias, *a, *d;  // [H], of Mamba-1 [I], a [I, N]; a is negative
  const float* gain;       // [I], the gated norm's weight, null for a gate without a norm; of Mamba-1 [R + 2 N], those of the
                           // norms of dt, B and C, or null
  const uint16_t* fixed;   // fp16 [H, P] calibrated channel scale, or null
  int32_t in_planes, x_planes, out_planes, reserved;  // bytes of fixed-point activations (lowbit.h)
};

struct MixerModel {
  const MixerLayer* layers;
  const float* final_norm;  // [D]
  Matrix embedding, head;   // [V or more, D]
  int64_t vocabulary;
  int32_t layer_count, hidden, heads, channels, states, groups;
  int32_t bits;             // of the states' codes, 0 for fp32
  int32_t refit, head_planes;
  float epsilon, gate_epsilon;  // of the layers' norms; of the gated ones, or of those of dt, B and C, negative without
  float low, high;          // limits of time steps, in prompts only
  int32_t dither;           // before states are rounded
  int32_t window;           // tokens between two roundings of states
  int32_t rank;             // R of Mamba-1, 0 in Mamba-2
};

// What is kept of each sequence: [L, S, ...]; `codes` null with fp32 states.
struct MixerStates {
  uint8_t* codes;     // [H, P, N bits / 8]
  uint16_t* channel;  // fp16 [H, P], or null where it is calibrated
  uint16_t* scale;    // fp16 [H, N]
  float* floats;      // [H, P, N], of Mamba-1 [I / 16, N, 16], or null
  float* conv;        // [C, 4], newest last
  float* recent;      // [window - 1, I + H (of Mamba-1 I) + G N], the tokens since states were rounded, or null
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
