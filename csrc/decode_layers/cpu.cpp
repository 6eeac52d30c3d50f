// The CPU kernel of a decode step, from tokens to logits. A block is five rounds of a team of
// threads (common/rounds.h):
//
//   1. norm, products with qkv, bias, norm and rotation of each attention head; keys and values go
//      to the cache
//   2. attention, an attention head of a sequence at a time
//   3. products with `out`, added to x
//   4. norm, products with gate_up, silu(gate) * up
//   5. products with `down`, added to x
//
// Several blocks that are independent (the drafting heads) take each round together. The norms are
// made anew by every thread that needs them: that is cheaper than another round.
#include <algorithm>
#include <cstring>
#include <vector>

#include "common/rounds.h"
#include "common/scratch.h"
#include "decode_layers/attention.h"
#include "decode_layers/packed.h"
#include "decode_layers/params.h"
#include "decode_layers/rows.h"
#include "few_row_linear/products.h"

namespace mtp {
namespace MTP_SIMD {
namespace {

// T, X: see panels.h.
template <class T, class X>
class Step {
 public:
  // abreast: blocks that take each round together.
  Step(const DecodeParams& params, int threads, int64_t abreast)
      : p_(params),
        packed_(params),
        threads_(threads),
        abreast_(abreast),
        rows_(params.batch * params.rows),
        head_width_(packed_.head_panels * kPanel),
        attention_(params, threads, abreast),
        hidden_(abreast * rows_, params.ffn_dim),
        normalized_(threads * rows_, params.dim),
        normalized_of_(threads),
        head_(threads * rows_, head_width_) {}

  // x (abreast, rows, dim), in place.
  void run(Worker& worker, const DecodeBlock* blocks, float* x) {
    project(worker, blocks, x, rows_ * p_.dim, all());
    finish(worker, blocks, x);
  }

  // x (rows, dim), the same for all: one round.
  void store_keys_values(Worker& worker, const DecodeBlock* blocks, const float* x) {
    const int64_t queries = packed_.group_queries;
    project(worker, blocks, x, 0, {queries, queries + 2});
  }

  // As run, where keys and values are stored.
  void read(Worker& worker, const DecodeBlock* blocks, float* x) {
    project(worker, blocks, x, rows_ * p_.dim, {0, packed_.group_queries});
    finish(worker, blocks, x);
  }

 private:
  // Members [first, last) of every group of attention heads: its queries, key, value.
  struct Members {
    int64_t first, last;
  };
  Members all() const { return {0, packed_.group_queries + 2}; }

  // Of block b that is run: a matrix's panel i of `size` elements, from `offset` of its weights.
  const T* panel(const DecodeBlock* blocks, int64_t b, int64_t offset, int64_t i,
                 int64_t size) const {
    return static_cast<const T*>(p_.packed) + (blocks - p_.blocks + b) * packed_.size + offset +
           i * size;
  }

  // One round: calls f(b, begin, end) for pieces of every block's `count` things, which cost `cost`
  // products each. A piece is not too small, and a thread has four, for whoever has to help.
  template <class F>
  void for_pieces(Worker& worker, int64_t count, int64_t cost, const F& f) {
    constexpr int64_t kSmallest = 8192;
    const int64_t grain = std::max(
        {count * abreast_ / (4 * threads_), kSmallest / std::max<int64_t>(cost, 1), int64_t{1}});
    worker.round(count * abreast_, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t b = begin / count, stop = std::min(end, (b + 1) * count);
        f(b, begin - b * count, stop - b * count);
        begin = stop;
      }
    });
  }

  // The rows of block b, normalised: made at the worker's first piece of the block.
  const X* normalized(const Worker& worker, const float* x, const float* scale, int64_t b) {
    X* y = normalized_.row(worker.index() * rows_);
    const int64_t key = worker.rounds_begun() * abreast_ + b;
    if (normalized_of_[worker.index()] != key) {
      for (int64_t r = 0; r < rows_; ++r) {
        normalize(x + r * p_.dim, scale, p_.dim, p_.norm_eps, y + r * normalized_.ld);
      }
      normalized_of_[worker.index()] = key;
    }
    return y;
  }

  // Queries, keys and values of each block's x.
  void project(Worker& worker, const DecodeBlock* blocks, const float* x, int64_t block_stride,
               Members members) {
    const int64_t taken = members.last - members.first;  // of each group of attention heads
    for_pieces(worker, p_.n_keys * taken, packed_.head, [&](int64_t b, int64_t begin, int64_t end) {
      const X* in = normalized(worker, x + b * block_stride, blocks[b].attention_scale, b);
      float* y = head_.row(worker.index() * rows_);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t place = i / taken * all().last + members.first + i % taken;
        panel_products(in, normalized_.ld, rows_, panel(blocks, b, 0, place, packed_.head), p_.dim,
                       packed_.head_panels, [&](int64_t r, int64_t p, Sums sums) {
                         sums.first.store(y + r * head_width_ + p * kPanel);
                         sums.second.store(y + r * head_width_ + p * kPanel + kLanes);
                       });
        const int64_t h = packed_.head_at(p_, place);
        for (int64_t sequence = 0; sequence < p_.batch; ++sequence) {
          for (int64_t r = 0; r < p_.rows; ++r) {
            attention_.take(worker.index(), blocks[b], b, h, sequence, r,
                            y + (sequence * p_.rows + r) * head_width_);
          }
        }
      }
    });
  }

  void finish(Worker& worker, const DecodeBlock* blocks, float* x) {
    const int64_t dim = p_.dim, ffn = p_.ffn_dim, size = panel_size<X>(dim);
    for_pieces(worker, p_.batch * p_.n_queries, attention_.products_of_a_head(),
               [&](int64_t b, int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   attention_.attend(worker.index(), blocks[b], b, i / p_.n_queries,
                                     i % p_.n_queries);
                 }
               });
    add_products(worker, attention_.attended(), p_.n_queries * p_.head_dim, blocks, packed_.out, x);
    for_pieces(worker, packed_.ffn_panels, size, [&](int64_t b, int64_t begin, int64_t end) {
      const X* in = normalized(worker, x + b * rows_ * dim, blocks[b].ffn_scale, b);
      panel_products(in, normalized_.ld, rows_, panel(blocks, b, packed_.gate_up, begin, size), dim,
                     end - begin, [&](int64_t r, int64_t p, Sums sums) {
                       const int64_t unit = (begin + p) * kLanes;
                       store_some(gated(sums), hidden_.row(b * rows_ + r) + unit, ffn - unit);
                     });
    });
    add_products(worker, hidden_, ffn, blocks, packed_.down, x);
  }

  // x += in (abreast, rows, n) @ weight.T, the weight at `offset` of each block's.
  void add_products(Worker& worker, const Scratch<X>& in, int64_t n, const DecodeBlock* blocks,
                    int64_t offset, float* x) {
    const int64_t dim = p_.dim, size = panel_size<X>(n);
    const auto add = [](Vec sum, float* y, int64_t count) {
      if (count >= kLanes) {
        (Vec::load(y) + sum).store(y);
      } else if (count > 0) {
        (Vec::load(y, count, sum) + sum).store(y, count);
      }
    };
    for_pieces(worker, panels_of(dim), size, [&](int64_t b, int64_t begin, int64_t end) {
      panel_products(in.row(b * rows_), in.ld, rows_, panel(blocks, b, offset, begin, size), n,
                     end - begin, [&](int64_t r, int64_t p, Sums sums) {
                       const int64_t o = (begin + p) * kPanel;
                       float* y = x + (b * rows_ + r) * dim + o;
                       add(sums.first, y, dim - o);
                       add(sums.second, y + kLanes, dim - o - kLanes);
                     });
    });
  }

  const DecodeParams& p_;
  const PackedBlock<X> packed_;
  const int threads_;
  const int64_t abreast_, rows_, head_width_;
  Attention<X> attention_;
  const Scratch<X> hidden_;             // (abreast, rows) of ffn_dim
  const Scratch<X> normalized_;         // (threads, rows) of dim
  std::vector<int64_t> normalized_of_;  // (threads): which round and block that is
  const Scratch<float> head_;           // (threads, rows) of head_width
};

// Calls f(r) for rows r < n: one round.
template <class F>
void for_rows(Worker& worker, int64_t n, const F& f) {
  worker.round(n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) f(r);
  });
}

// The final norm of x (rows, dim) and the products with the unembedding. Row r gives row to(r) of
// the logits. Two rounds.
template <class T>
class Unembedding {
 public:
  Unembedding(const DecodeParams& params, int threads, int64_t rows)
      : p_(params),
        threads_(threads),
        rows_(rows),
        normalized_(rows, params.dim),
        packed_(normalized_.row(0), normalized_.ld, rows, params.dim) {}

  template <class F>
  void run(Worker& worker, const float* x, const F& to) {
    for_rows(worker, rows_, [&](int64_t r) {
      normalize(x + r * p_.dim, p_.final_scale, p_.dim, p_.norm_eps, normalized_.row(r));
      packed_.pack(r);
    });
    const auto piece = [&](int64_t begin, int64_t end) {
      few_rows::products(packed_, static_cast<const T*>(p_.unembedding) + begin * p_.dim, p_.dim,
                         end - begin, [&](int64_t r, int64_t o, const float* values, int64_t n) {
                           std::copy_n(values, n, p_.logits + to(r) * p_.vocab + begin + o);
                         });
    };
    worker.round(p_.vocab, few_rows::outputs_per_piece(p_.vocab, p_.dim, threads_), piece);
  }

 private:
  const DecodeParams& p_;
  const int threads_;
  const int64_t rows_;
  const Scratch<T> normalized_;
  const few_rows::Rows<T> packed_;
};

}  // namespace
}  // namespace MTP_SIMD

template <>
int64_t decode_packed_size<SimdLevel::MTP_SIMD>(const DecodeShape& shape) {
  using namespace MTP_SIMD;
  int64_t size = 0;
  with_types(shape.dtype, [&](auto, auto row) { size = PackedBlock<decltype(row)>(shape).size; });
  return size;
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
                                      int64_t n, void* packed, int threads) {
  using namespace MTP_SIMD;
  with_types(shape.dtype, [&](auto storage, auto row) {
    const PackedBlock<decltype(row)> layout(shape);
    parallel_for(threads, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        layout.pack(shape, weights[i], static_cast<decltype(storage)*>(packed) + i * layout.size);
      }
    });
  });
}

template <>
void decode_layers_run<SimdLevel::MTP_SIMD>(const DecodeParams& p, int threads) {
  using namespace MTP_SIMD;
  with_types(p.dtype, [&](auto storage, auto row) {
    using T = decltype(storage);
    const int64_t rows = p.batch * p.rows, heads = p.n_blocks - p.n_layers;
    const Scratch<float> x(rows, p.dim);
    Step<T, decltype(row)> layers(p, threads, 1), drafting(p, threads, heads);
    Unembedding<T> unembedding(p, threads, p.logits != nullptr ? rows : 0);
    run_rounds(threads, [&](Worker& worker) {
      for_rows(worker, rows, [&](int64_t r) {
        convert(static_cast<const T*>(p.embedding) + p.tokens[r] * p.dim, p.dim, x.row(r));
      });
      for (int64_t i = 0; i < p.n_layers; ++i) {
        if (i + 1 == p.n_layers) {
          worker.round(1, 1, [&](int64_t, int64_t) {
            memcpy(p.trunk, x.row(0), sizeof(float) * rows * p.dim);
          });
        }
        layers.run(worker, p.blocks + i, x.row(0));
      }
      if (heads > 0) drafting.store_keys_values(worker, p.blocks + p.n_layers, p.trunk);
      if (p.logits != nullptr) {
        unembedding.run(worker, x.row(0), [](int64_t r) { return r; });
      } else {
        for_rows(worker, rows, [&](int64_t r) {
          normalize(x.row(r), p.final_scale, p.dim, p.norm_eps, p.hidden + r * p.dim);
        });
      }
      release_matrix_registers();
    });
  });
}

template <>
void decode_heads_run<SimdLevel::MTP_SIMD>(const DecodeParams& p, int threads) {
  using namespace MTP_SIMD;
  with_types(p.dtype, [&](auto storage, auto row) {
    using T = decltype(storage);
    const int64_t heads = p.n_blocks - p.n_layers, rows = heads * p.batch;
    const Scratch<float> x(rows, p.dim);
    Step<T, decltype(row)> drafting(p, threads, heads);
    Unembedding<T> unembedding(p, threads, rows);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t b = r % p.batch;
      memcpy(x.row(r), p.trunk + (b * p.trunk_rows + p.trunk_row[b]) * p.dim,
             sizeof(float) * p.dim);
    }
    // From head by head to sequence by sequence.
    const auto place = [&](int64_t r) { return r % p.batch * heads + r / p.batch; };
    run_rounds(threads, [&](Worker& worker) {
      drafting.read(worker, p.blocks + p.n_layers, x.row(0));
      unembedding.run(worker, x.row(0), place);
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
