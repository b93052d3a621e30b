// Memory that begins at a cache line.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace state {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float, Free>;

inline Floats floats(int64_t count) { return Floats(static_cast<float*>(std::aligned_alloc(64, (count * 4 + 63) / 64 * 64))); }

}  // namespace state
