// The Python face of the kernels, and the only file that knows Python. Tensors arrive as integers
// (data pointers, sizes, strides, dtype codes) that mtp_fast/ops has checked; nothing here checks
// them again. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/huge_pages.h"
#include "common/parallel.h"
#include "common/simd_level.h"
#include "cross_entropy/params.h"

namespace py = pybind11;

namespace mtp {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void cross_entropy(int threads, int dtype, uintptr_t logits, int64_t ld, uintptr_t grad,
                   int64_t grad_ld, int64_t rows, int64_t vocab, uintptr_t target,
                   uintptr_t row_weight, uintptr_t class_weight, uintptr_t grad_output,
                   uintptr_t workspace, uintptr_t loss, uintptr_t lse, uintptr_t correct,
                   int64_t ignore_index, float label_smoothing, float z_loss, float softcap,
                   float class_weight_sum) {
  CrossEntropyParams p{};
  p.logits = pointer<const void>(logits);
  p.grad = pointer<void>(grad);
  p.target = pointer<const int64_t>(target);
  p.row_weight = pointer<const float>(row_weight);
  p.class_weight = pointer<const float>(class_weight);
  p.grad_output = pointer<const float>(grad_output);
  p.workspace = pointer<float>(workspace);
  p.loss = pointer<float>(loss);
  p.lse = pointer<float>(lse);
  p.correct = pointer<bool>(correct);
  p.rows = rows;
  p.vocab = vocab;
  p.ld = ld;
  p.grad_ld = grad_ld;
  p.ignore_index = ignore_index;
  p.label_smoothing = label_smoothing;
  p.z_loss = z_loss;
  p.softcap = softcap;
  p.class_weight_sum = class_weight_sum;
  p.dtype = static_cast<DType>(dtype);
  cross_entropy_cpu(p, threads);
}

void scaled_add(int threads, int x_dtype, uintptr_t x, int y_dtype, uintptr_t y, int64_t n,
                float alpha, bool accumulate) {
  scaled_add_cpu({pointer<const void>(x), pointer<void>(y), n, alpha, accumulate,
                  static_cast<DType>(x_dtype), static_cast<DType>(y_dtype)},
                 threads);
}

const char* name_of(SimdLevel level) {
  switch (level) {
    case SimdLevel::avx512:
      return "avx512";
    case SimdLevel::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = MTP_COMPILER;
  info["pybind11"] = MTP_PYBIND11_VERSION;
  info["cuda"] = MTP_CUDA_VERSION;
  info["cuda_architectures"] = MTP_CUDA_ARCHS;
  std::vector<std::string> levels;
  for (int level = 0; level <= static_cast<int>(best_simd_level()); ++level) {
    levels.push_back(name_of(static_cast<SimdLevel>(level)));
  }
  info["simd_levels"] = levels;
  info["simd"] = name_of(simd_level());
  info["threads_from"] = thread_source();
  return info;
}

}  // namespace
}  // namespace mtp

PYBIND11_MODULE(_C, m) {
  using namespace mtp;
  using without_gil = py::call_guard<py::gil_scoped_release>;
  m.def("cross_entropy", &mtp::cross_entropy, without_gil());
  m.def("scaled_add", &mtp::scaled_add, without_gil());
  m.def("advise_huge_pages", &advise_huge_pages);
  m.def("build_info", &build_info);
  m.def("set_simd_level", [](int level) { set_simd_level(static_cast<SimdLevel>(level)); });
}
