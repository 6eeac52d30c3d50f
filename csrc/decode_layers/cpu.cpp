// The CPU kernels of a decode step, from tokens to logits: layers, then drafting heads.
#include <cstring>

#include "common/halves.h"
#include "common/parallel.h"
#include "common/rounds.h"
#include "common/scratch.h"
#include "decode_layers/packed.h"
#include "decode_layers/params.h"
#include "decode_layers/rows.h"
#include "decode_layers/step.h"
#include "decode_layers/unembedding.h"

namespace mtp {
namespace MTP_SIMD {
namespace {

// Calls f(r) for rows r < n: one round.
template <class F>
void for_rows(Worker& worker, int64_t n, const F& f) {
  worker.round(n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) f(r);
  });
}

}  // namespace
}  // namespace MTP_SIMD

template <>
int64_t decode_packed_bytes<SimdLevel::MTP_SIMD>(const DecodeShape& shape, bool drafting) {
  using namespace MTP_SIMD;
  int64_t bytes = 0;
  with_packed_types(shape, drafting, [&](auto, auto packed, auto row) {
    using T = decltype(packed);
    bytes = PackedBlock<T, decltype(row)>(shape).size * sizeof(T);
  });
  return bytes;
}

template <>
int64_t decode_cache_bytes<SimdLevel::MTP_SIMD>(const DecodeShape& shape, int64_t capacity) {
  using namespace MTP_SIMD;
  int64_t bytes = 0;
  with_types(shape.dtype, [&](auto, auto row) {
    bytes = CacheLayout<decltype(row)>(shape, capacity).size * sizeof row;
  });
  return bytes;
}

template <>
void decode_pack<SimdLevel::MTP_SIMD>(const DecodeShape& shape, const DecodeWeights* weights,
                                      int64_t n, bool drafting, void* to, int threads) {
  using namespace MTP_SIMD;
  with_packed_types(shape, drafting, [&](auto storage, auto packed, auto row) {
    using T = decltype(packed);
    const PackedBlock<T, decltype(row)> layout(shape);
    parallel_for(threads, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        T* block = static_cast<T*>(to) + i * layout.size;
        layout.template pack<decltype(storage)>(shape, weights[i], block);
      }
    });
  });
}

template <>
void decode_layers_run<SimdLevel::MTP_SIMD>(const DecodeParams& p, int threads) {
  using namespace MTP_SIMD;
  if (p.batch * p.rows == 0) return;
  with_drafting_types(p, [&](auto storage, auto factor, auto row) {
    using T = decltype(storage);
    using X = decltype(factor);
    using A = decltype(row);
    const int64_t rows = p.batch * p.rows, heads = p.n_blocks - p.n_layers;
    p.workspace->reset();
    const Scratch<float> xs(*p.workspace, threads, rows, p.dim);
    Halves halves;
    Step<T, A, A> layers(p, 0, p.packed, threads, 1);
    Step<int8_t, X, A> drafting(p, p.n_layers, p.packed_drafting, threads, heads);
    Unembedding<T> unembedding(p, threads, p.logits == nullptr ? 0 : rows);
    run_rounds(threads, [&](Worker& worker) {
      const bool in_halves = layers.in_halves(worker);
      float* x = xs.row(in_halves ? worker.index() : 0, 0);
      const auto embed = [&](int64_t r) {
        convert(static_cast<const T*>(p.embedding) + p.tokens[r] * p.dim, p.dim, x + r * p.dim);
      };
      if (in_halves) {
        for (int64_t r = 0; r < rows; ++r) embed(r);
        x = layers.run_halves(halves, worker, xs, p.trunk);
      } else {
        for_rows(worker, rows, embed);
        for (int64_t i = 0; i < p.n_layers; ++i) {
          if (i + 1 == p.n_layers) {
            worker.round(
                1, 1, [&](int64_t, int64_t) { memcpy(p.trunk, x, sizeof(float) * rows * p.dim); });
          }
          layers.run(worker, p.blocks + i, x);
        }
      }
      if (heads > 0) drafting.store_keys_values(worker, p.blocks + p.n_layers, p.trunk);
      if (p.logits != nullptr) {
        unembedding.run(worker, x, [](int64_t r) { return r; });
      } else {
        for_rows(worker, rows, [&](int64_t r) {
          normalize(x + r * p.dim, p.final_scale, p.dim, p.norm_eps, p.hidden + r * p.dim);
        });
      }
      release_matrix_registers();
    });
  });
}

template <>
void decode_heads_run<SimdLevel::MTP_SIMD>(const DecodeParams& p, int threads) {
  using namespace MTP_SIMD;
  with_drafting_types(p, [&](auto storage, auto factor, auto row) {
    using T = decltype(storage);
    using X = decltype(factor);
    const int64_t heads = p.n_blocks - p.n_layers, rows = heads * p.batch;
    p.workspace->reset();
    const Scratch<float> x(*p.workspace, 1, rows, p.dim);
    Step<int8_t, X, decltype(row)> drafting(p, p.n_layers, p.packed_drafting, threads, heads);
    Unembedding<T> unembedding(p, threads, rows);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = r % p.batch;
      memcpy(x.row(0, r), p.trunk + (b * p.trunk_rows + p.trunk_row[b]) * p.dim,
             sizeof(float) * p.dim);
    }
    // From head by head to sequence by sequence.
    const auto place = [&](int64_t r) { return r % p.batch * heads + r / p.batch; };
    run_rounds(threads, [&](Worker& worker) {
      drafting.read(worker, p.blocks + p.n_layers, x.row(0, 0));
      unembedding.run(worker, x.row(0, 0), place);
      if (p.drafts != nullptr) {
        for_rows(worker, rows, [&](int64_t r) {
          p.drafts[r % p.batch * p.drafts_ld + r / p.batch] =
              index_of_max(p.logits + place(r) * p.vocab, p.vocab);
        });
      }
      release_matrix_registers();
    });
  });
}

}  // namespace mtp
