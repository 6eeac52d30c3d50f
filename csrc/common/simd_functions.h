// The vector functions of simd.h on arrays, so that tests can measure their error.
#pragma once

#include <cstdint>

#include "common/simd_level.h"

namespace mtp {

// y = exp(x), or tanh(x)
template <SimdLevel level>
void simd_function_run(bool tanh_instead, const float* x, float* y, int64_t n);

inline void simd_function(bool tanh_instead, uintptr_t x, uintptr_t y, int64_t n) {
  with_simd_level([&](auto level) {
    simd_function_run<level.value>(tanh_instead, reinterpret_cast<const float*>(x),
                                   reinterpret_cast<float*>(y), n);
  });
}

}  // namespace mtp
