// Fetching what will be needed.
#pragma once

#include <cstdint>

namespace mtp {
namespace MTP_SIMD {

constexpr int64_t kLineBytes = 64;

// Into the nearest cache, to be written. Not by a builtin: functions of nothing else are left out.
inline void prefetch_to_write(const void* p) {
#if defined(__x86_64__)
  __asm__ volatile("prefetchw %0" : : "m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 1, 3);
#endif
}

}  // namespace MTP_SIMD
}  // namespace mtp
