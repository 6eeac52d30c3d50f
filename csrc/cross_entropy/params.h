// What the cross-entropy row kernel reads and writes. One call handles `rows` rows of logits; the
// CPU and the CUDA kernel take the same struct.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/simd_level.h"
#include "common/status.h"

namespace mtp {

// Statistics of one row: all that its loss needs, and its gradient beside the logits. Those of the
// parts of a vocabulary merge into those of the whole. lse = max + log(sum) is not among them,
// since it rounds at the size of max.
struct RowStats {
  float max;           // of the softcapped logits z
  float sum;           // sum_v exp(z_v - max)
  float target_logit;  // z_y; NaN where the target y is outside [0, vocab)
  float smooth_sum;    // sum_v a_v z_v, a = class weights; only with label smoothing
};
static_assert(sizeof(RowStats) == 4 * sizeof(float), "(rows, 4) float32 in Python");

struct CrossEntropyParams {
  const void* logits;         // (rows, vocab), row stride ld
  void* grad;                 // (rows, vocab), row stride grad_ld; may be logits; null: loss only
  const int64_t* target;      // (rows)
  const float* row_weight;    // (rows), or null for 1
  const float* class_weight;  // (vocab), or null for 1
  const float* grad_output;   // (rows): upstream gradient of each row's loss, or null for 1
  const float* class_weight_sum;  // (1), or null for vocab; read under label smoothing
  const RowStats* saved;  // (rows): what `stats` was, then the gradient alone is made; or null
  float* workspace;  // (threads, vocab): 16-bit gradients without `saved` on the CPU; else unused
  float* loss;       // (rows), or null
  float* lse;        // (rows), or null
  bool* correct;     // (rows), or null: argmax == target
  int64_t* argmax;   // (rows), or null: lowest id of the largest logit; -1 where none is finite
  RowStats* stats;   // (rows), or null
  int64_t rows, vocab, ld, grad_ld;
  int64_t ignore_index;
  float label_smoothing, z_loss;
  float softcap;  // 0: off
  DType dtype;
};

// Rows whose target is ignore_index: every result 0, but for argmax, which is -1; their logits are
// not read. Rows whose target is outside [0, vocab): loss NaN, and so is the gradient wherever the
// statistics' target_logit is NaN.
template <SimdLevel level>  // defined in cpu.cpp, which is compiled once per level
void cross_entropy_rows(const CrossEntropyParams& params, int threads);

inline void cross_entropy_cpu(const CrossEntropyParams& params, int threads) {
  with_simd_level([&](auto level) { cross_entropy_rows<level.value>(params, threads); });
}

// On the current device, queued on `stream` (a cudaStream_t). Defined in cuda.cu.
Status cross_entropy_cuda(const CrossEntropyParams& params, void* stream);

// y = x * alpha, or y + x * alpha: the float32 accumulator of d(weight) and the final scaling of
// the gradients, which torch does slowly across dtypes.
struct ScaledAddParams {
  const void* x;  // (n)
  void* y;        // (n); may be x where the dtypes agree
  int64_t n;
  float alpha;
  bool accumulate;
  DType x_dtype, y_dtype;
};

template <SimdLevel level>
void scaled_add_run(const ScaledAddParams& params, int threads);

inline void scaled_add_cpu(const ScaledAddParams& params, int threads) {
  with_simd_level([&](auto level) { scaled_add_run<level.value>(params, threads); });
}

}  // namespace mtp
