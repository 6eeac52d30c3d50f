// C = A @ B, or C + A @ B, of large matrices on a processor with AMX. C is float32; A and B are
// float32, or bfloat16, of which torch makes no float32 products on a CPU.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mtp {

// A matrix as it is stored: element (i, j) at i * ld + j, or transposed, at j * ld + i.
struct GemmOperand {
  const void* data;
  int64_t ld;
  bool transposed;
};

struct GemmParams {
  GemmOperand a;  // (m, k)
  GemmOperand b;  // (k, n)
  float* c;       // (m, n), contiguous
  int64_t m, n, k;
  bool accumulate;  // onto what C holds
  DType dtype;      // of A and B: float32 or bfloat16
};

// Only where has_amx(); k is not 0.
void gemm_amx(const GemmParams& params, int threads);

}  // namespace mtp
