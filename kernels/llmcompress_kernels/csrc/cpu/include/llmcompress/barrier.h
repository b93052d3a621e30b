// A barrier for threads that meet some hundred times a token: it spins, and yields when a partner is not running.
#pragma once

#include <atomic>
#include <sched.h>

namespace llmcompress {

class Barrier {
  public:
    void expect(int threads) { threads_ = threads; }
    int threads() const { return threads_; }

    void wait() {
        if (threads_ == 1) return;
        const int turn = turn_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins) {
            if (spins < 4000) {
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
            }
            else sched_yield();
        }
    }

  private:
    int threads_ = 1;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> turn_{0};
};

}  // namespace llmcompress
