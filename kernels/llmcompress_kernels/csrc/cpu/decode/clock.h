// Time of one thread by phase.
#pragma once

#include <chrono>

#include "decode.h"

namespace llmcompress::decode {

class Clock {
  public:
    explicit Clock(double* seconds) : seconds_(seconds), mark_(now()) {}

    // what has been done since the last call was this; nothing without a place for it
    void took(Phase phase) {
        if (seconds_ == nullptr) return;
        const double t = now();
        seconds_[phase] += t - mark_;
        mark_ = t;
    }

  private:
    static double now() {
        return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    }

    double* seconds_;
    double mark_;
};

}  // namespace llmcompress::decode
