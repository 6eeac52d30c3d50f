// Which instruction set the CPU kernels use. Every cpu.cpp is compiled once per level, each time
// with MTP_SIMD defined as the level's name, and the level is chosen when the process runs: the
// best that the processor has, or a lower one on request (environment variable MTP_FAST_SIMD,
// tests). AMX is avx512_bf16, and kernels that have a use for it ask.
#pragma once

#include <type_traits>

namespace mtp {

enum class SimdLevel : int { portable, avx2, avx512, avx512_bf16, amx };

const char* name_of(SimdLevel level);
SimdLevel best_simd_level();
SimdLevel simd_level();
// Levels above the best one are lowered to it.
void set_simd_level(SimdLevel level);

inline bool has_amx() { return simd_level() >= SimdLevel::amx; }

template <SimdLevel level>
using SimdConstant = std::integral_constant<SimdLevel, level>;

// Calls f(SimdConstant<level>{}) with the current level.
template <class F>
void with_simd_level(F&& f) {
#if defined(__x86_64__)
  switch (simd_level()) {
    case SimdLevel::amx:
    case SimdLevel::avx512_bf16:
      return f(SimdConstant<SimdLevel::avx512_bf16>{});
    case SimdLevel::avx512:
      return f(SimdConstant<SimdLevel::avx512>{});
    case SimdLevel::avx2:
      return f(SimdConstant<SimdLevel::avx2>{});
    default:
      break;
  }
#endif
  f(SimdConstant<SimdLevel::portable>{});
}

}  // namespace mtp
