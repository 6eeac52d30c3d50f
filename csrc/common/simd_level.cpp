#include "common/simd_level.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mtp {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

// Linux gives the registers of AMX, which make each thread's saved state larger, on request.
bool may_use_matrix_registers() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, asm/prctl.h
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

SimdLevel supported_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) {
      return SimdLevel::avx512;
    }
    if (!__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16") ||
        !__builtin_cpu_supports("amx-int8") || !may_use_matrix_registers()) {
      return SimdLevel::avx512_bf16;
    }
    return SimdLevel::amx;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return SimdLevel::avx2;
  }
#endif
  return SimdLevel::portable;
}

SimdLevel wanted_level() {
  const char* variable = std::getenv("MTP_FAST_SIMD");
  if (variable == nullptr) return best_simd_level();
  const std::string wanted = variable;
  std::string names;
  for (int level = 0; level < static_cast<int>(std::size(kNames)); ++level) {
    if (wanted == kNames[level]) return std::min(static_cast<SimdLevel>(level), best_simd_level());
    names += (level > 0 ? ", " : "") + std::string(kNames[level]);
  }
  throw std::runtime_error("MTP_FAST_SIMD: expected one of " + names + "; got \"" + wanted + "\"");
}

std::atomic<SimdLevel>& current() {
  static std::atomic<SimdLevel> level{wanted_level()};
  return level;
}

}  // namespace

const char* name_of(SimdLevel level) { return kNames[static_cast<int>(level)]; }

SimdLevel best_simd_level() {
  static const SimdLevel best = supported_level();
  return best;
}

SimdLevel simd_level() { return current().load(std::memory_order_relaxed); }

void set_simd_level(SimdLevel level) {
  current().store(std::min(level, best_simd_level()), std::memory_order_relaxed);
}

}  // namespace mtp
