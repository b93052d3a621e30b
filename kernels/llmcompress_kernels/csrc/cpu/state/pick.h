// Kernels are templates by width of codes, N and mode; which instance takes a call is chosen here, once for all heads.
#pragma once

#include <cstdint>

#include "tile.h"

namespace state {

// What `of.operator()<J>()` gives for N = 32 J; null for an N without kernels.
template <class Kernel, class Of>
Kernel for_states(int64_t states, Of of) {
  switch (states) {
    case 32: return of.template operator()<1>();
    case 64: return of.template operator()<2>();
    case 128: return of.template operator()<4>();
    case 256: return of.template operator()<8>();
    default: return nullptr;
  }
}

// Likewise `of.operator()<J, mode>()`.
template <class Kernel, class Of>
Kernel for_mode(Mode mode, int64_t states, Of of) {
  switch (mode) {
    case kDynamic: return for_states<Kernel>(states, [&]<int J> { return of.template operator()<J, kDynamic>(); });
    case kCalibrated: return for_states<Kernel>(states, [&]<int J> { return of.template operator()<J, kCalibrated>(); });
    case kRefitted: return for_states<Kernel>(states, [&]<int J> { return of.template operator()<J, kRefitted>(); });
    case kDithered: return for_states<Kernel>(states, [&]<int J> { return of.template operator()<J, kDithered>(); });
    case kCalibratedDithered:
      return for_states<Kernel>(states, [&]<int J> { return of.template operator()<J, kCalibratedDithered>(); });
  }
  return nullptr;
}

// Likewise `of.operator()<Bits, J, mode>()`; null for a width without kernels too.
template <class Kernel, class Of>
Kernel for_bits(int bits, Mode mode, int64_t states, Of of) {
  switch (bits) {
    case 4: return for_mode<Kernel>(mode, states, [&]<int J, Mode M> { return of.template operator()<4, J, M>(); });
    case 8: return for_mode<Kernel>(mode, states, [&]<int J, Mode M> { return of.template operator()<8, J, M>(); });
    default: return nullptr;
  }
}

// Whether nibbles.h has a kernel.
constexpr bool in_nibbles(int bits, int j, Mode mode) { return kAvx512 && bits == 4 && j >= 2 && mode != kRefitted; }

}  // namespace state
