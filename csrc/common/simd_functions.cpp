#include "common/simd_functions.h"

#include "common/simd.h"

namespace mtp {

template <>
void simd_function_run<SimdLevel::MTP_SIMD>(bool tanh_instead, const float* x, float* y,
                                            int64_t n) {
  using namespace MTP_SIMD;
  for (int64_t i = 0; i < n; i += Vec::kLanes) {
    const int64_t count = n - i < Vec::kLanes ? n - i : Vec::kLanes;
    const Vec v = Vec::load(x + i, count, Vec(0.0f));
    (tanh_instead ? tanh(v) : exp(v)).store(y + i, count);
  }
}

}  // namespace mtp
