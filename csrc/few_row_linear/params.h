// y = x @ weight.T for so few rows that reading the weight is all the work: the unembedding of a
// decode step. The weight is read from memory once, in place, as the model stores it. A row's
// result is the same whatever the number of rows and threads, so that a sequence's output does not
// depend on what is decoded beside it.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/simd_level.h"

namespace mtp {

struct FewRowLinearParams {
  const void* x;       // (rows, in), contiguous
  const void* weight;  // (out, in), row stride weight_ld, dtype as x
  float* y;            // (rows, out), contiguous
  int64_t rows, in, out, weight_ld;
  DType dtype;
};

template <SimdLevel level>  // defined in cpu.cpp, which is compiled once per level
void few_row_linear_run(const FewRowLinearParams& params, int threads);

inline void few_row_linear_cpu(const FewRowLinearParams& params, int threads) {
  with_simd_level([&](auto level) { few_row_linear_run<level.value>(params, threads); });
}

}  // namespace mtp
