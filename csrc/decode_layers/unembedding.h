// From the last rows to logits.
#pragma once

#include <algorithm>

#include "common/rounds.h"
#include "common/scratch.h"
#include "decode_layers/params.h"
#include "decode_layers/rows.h"
#include "few_row_linear/products.h"

namespace mtp {
namespace MTP_SIMD {

// The final norm of x (rows, dim) and the products with the unembedding: one round. Each thread
// makes the norm for itself: rows packed side by side share lines.
template <class T>
class Unembedding {
 public:
  Unembedding(const DecodeParams& params, int threads, int64_t rows)
      : p_(params),
        rows_(rows),
        grain_(few_rows::outputs_per_piece<T>(params.vocab, params.dim, threads)),
        normalized_(*params.workspace, threads, rows, params.dim),
        packed_(*params.workspace, threads, 1, Rows::packed_size(rows, params.dim)) {}

  // Row r gives row to(r) of the logits.
  template <class F>
  void run(Worker& worker, const float* x, const F& to) {
    const T* weight = static_cast<const T*>(p_.unembedding);
    worker.pieces(p_.vocab, grain_, [&](const auto& next) {
      int64_t begin, end;
      if (!next(begin, end)) return;
      T* y = normalized_.row(worker.index(), 0);
      const Rows packed(y, normalized_.ld, rows_, p_.dim, packed_.row(worker.index(), 0));
      packed.prepare();
      few_rows::prefetch_first(weight + begin * p_.dim, p_.dim, end - begin);
      normalize(x, p_.dim, rows_, p_.final_scale, p_.dim, p_.norm_eps, y, normalized_.ld);
      for (int64_t r = 0; r < rows_; ++r) packed.pack(r);
      do {
        few_rows::products(packed, weight + begin * p_.dim, p_.dim, end - begin,
                           [&](int64_t r, int64_t o, const float* values, int64_t n) {
                             std::copy_n(values, n, p_.logits + to(r) * p_.vocab + begin + o);
                           });
      } while (next(begin, end));
    });
  }

 private:
  using Rows = few_rows::Rows<T>;

  const DecodeParams& p_;
  const int64_t rows_, grain_;
  const Scratch<T> normalized_;             // (threads; rows) of dim
  const Scratch<typename Rows::X> packed_;  // (threads)
};

}  // namespace MTP_SIMD
}  // namespace mtp
