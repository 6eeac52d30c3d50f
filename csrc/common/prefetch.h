// Fetching what will be needed.
#pragma once

#include <cstdint>

namespace mtp {
namespace MTP_SIMD {

constexpr int64_t kLineBytes = 64;

// Not by builtins where it can be helped: GCC leaves out loops and functions of nothing else.
#if defined(__x86_64__)
#define MTP_PREFETCH(instruction, builtin) \
  __asm__ volatile(instruction " %0" : : "m"(*static_cast<const char*>(p)))
#else
#define MTP_PREFETCH(instruction, builtin) builtin
#endif

// Into the nearest cache.
inline void prefetch(const void* p) { MTP_PREFETCH("prefetcht0", __builtin_prefetch(p, 0, 3)); }

// Into the second-level cache.
inline void prefetch_far(const void* p) { MTP_PREFETCH("prefetcht1", __builtin_prefetch(p, 0, 2)); }

// Into the nearest cache, to be written.
inline void prefetch_to_write(const void* p) {
  MTP_PREFETCH("prefetchw", __builtin_prefetch(p, 1, 3));
}

#undef MTP_PREFETCH

}  // namespace MTP_SIMD
}  // namespace mtp
