// The CPU kernel of few_row_linear: threads share the weight's rows.
#include <algorithm>

#include "common/parallel.h"
#include "common/scratch.h"
#include "few_row_linear/params.h"
#include "few_row_linear/products.h"

namespace mtp {

template <>
void few_row_linear_run<SimdLevel::MTP_SIMD>(const FewRowLinearParams& p, int threads) {
  using namespace MTP_SIMD::few_rows;
  dispatch_dtype(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    Workspace workspace;
    const MTP_SIMD::Scratch<typename Rows<T>::X> packed(workspace, 1, 1,
                                                        Rows<T>::packed_size(p.rows, p.in));
    const Rows<T> x(static_cast<const T*>(p.x), p.in, p.rows, p.in, packed.row(0, 0));
    for (int64_t r = 0; r < p.rows; ++r) x.pack(r);
    parallel_for(threads, p.out, outputs_per_piece<T>(p.out, p.in, threads),
                 [&](int64_t begin, int64_t end) {
                   const T* weight = static_cast<const T*>(p.weight) + begin * p.weight_ld;
                   float* y = p.y + begin;
                   products(x, weight, p.weight_ld, end - begin,
                            [&](int64_t r, int64_t o, const float* values, int64_t n) {
                              std::copy_n(values, n, y + r * p.out + o);
                            });
                   MTP_SIMD::release_matrix_registers();
                 });
  });
}

}  // namespace mtp
