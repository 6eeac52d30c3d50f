#include "common/simd_level.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace mtp {
namespace {

std::atomic<SimdLevel>& current() {
  static std::atomic<SimdLevel> level{[] {
    const char* wanted = std::getenv("MTP_FAST_SIMD");
    const SimdLevel best = best_simd_level();
    if (wanted == nullptr) return best;
    if (std::strcmp(wanted, "portable") == 0) return SimdLevel::portable;
    if (std::strcmp(wanted, "avx2") == 0 && best > SimdLevel::avx2) return SimdLevel::avx2;
    return best;
  }()};
  return level;
}

}  // namespace

SimdLevel best_simd_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return SimdLevel::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return SimdLevel::avx2;
  }
#endif
  return SimdLevel::portable;
}

SimdLevel simd_level() { return current().load(std::memory_order_relaxed); }

void set_simd_level(SimdLevel level) {
  const SimdLevel best = best_simd_level();
  current().store(level > best ? best : level, std::memory_order_relaxed);
}

}  // namespace mtp
