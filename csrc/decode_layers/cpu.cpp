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
#include <new>
#include <vector>

#include "common/rounds.h"
#include "decode_layers/packed.h"
#include "decode_layers/params.h"
#include "decode_layers/rows.h"
#include "few_row_linear/products.h"

namespace mtp {
namespace MTP_SIMD {
namespace {

// Scratch rows that start on a cache line, so that a vector of them never lies in two; zeros behind
// `width` elements up to the next row (panels.h: padded).
template <class T>
class Scratch {
 public:
  Scratch(int64_t rows, int64_t width)
      : ld(padded<T>(width)),
        data_(static_cast<T*>(::operator new(sizeof(T) * rows * ld, std::align_val_t{64}))) {
    for (int64_t r = 0; r < rows; ++r) std::fill(data_ + r * ld + width, data_ + (r + 1) * ld, T{});
  }
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;

  T* row(int64_t r) const { return data_ + r * ld; }

  const int64_t ld;  // elements from row to row

 private:
  T* const data_;
};

// T, X: see panels.h.
template <class T, class X>
class Step {
 public:
  // abreast: blocks that take each round together.
  Step(const DecodeParams& params, int threads, int64_t abreast)
      : p_(params),
        packed_(params),
        cache_(params, params.capacity),
        threads_(threads),
        abreast_(abreast),
        rows_(params.batch * params.rows),
        width_(params.n_queries * params.head_dim),
        head_width_(packed_.head_panels * kPanel),
        reach_(
            panels_of(*std::max_element(params.start, params.start + params.batch) + params.rows) *
            kPanel),
        queries_(abreast * rows_ * params.n_queries, params.head_dim),
        attended_(abreast * rows_, width_),
        hidden_(abreast * rows_, params.ffn_dim),
        normalized_(threads * rows_, params.dim),
        normalized_of_(threads),
        head_(threads * rows_, head_width_),
        converted_(threads, params.head_dim),
        scores_(threads * params.rows, reach_),
        weights_(threads * params.rows, reach_),
        factors_(threads, params.rows) {}

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
        for (int64_t r = 0; r < rows_; ++r) {
          finish_head(worker, blocks[b], b, h, r, y + r * head_width_);
        }
      }
    });
  }

  // Bias, norm and rotation of attention head h of a row; then to its place.
  void finish_head(const Worker& worker, const DecodeBlock& block, int64_t b, int64_t h,
                   int64_t row, float* x) {
    const int64_t size = p_.head_dim, half = size / 2;
    const int64_t key = h - p_.n_queries, value = key - p_.n_keys;
    if (block.qkv_bias != nullptr) {
      for (int64_t i = 0; i < size; ++i) x[i] += block.qkv_bias[h * size + i];
    }
    const int64_t sequence = row / p_.rows, position = p_.start[sequence] + row % p_.rows;
    X* converted = converted_.row(worker.index());
    if (value >= 0) {
      convert(x, size, converted);
      X* values = cached(block, sequence, value) + cache_.values;
      for (int64_t i = 0; i < size; i += kPanel) {
        X* y = values + place_in_panels<X>(i, position, cache_.value_step);
        const int64_t n = std::min(kPanel, size - i);
        for (int64_t o = 0; o < n; ++o) y[o * kDepth<X>] = converted[i + o];
      }
      return;
    }
    const float* scale = key < 0 ? block.query_scale : block.key_scale;
    if (scale != nullptr) normalize(x, scale, size, p_.norm_eps, x);
    const float* cosine = p_.rope + position * 2 * size;
    const float* sine = cosine + size;
    for (int64_t i = 0; i < half; ++i) {
      const float low = x[i], high = x[half + i];
      x[i] = low * cosine[i] + high * sine[i];
      x[half + i] = high * cosine[half + i] + low * sine[half + i];
    }
    if (key < 0) {
      convert(x, size, queries_.row((b * rows_ + row) * p_.n_queries + h));
      return;
    }
    convert(x, size, converted);
    X* y = cached(block, sequence, key) + place_in_panels<X>(position, 0, cache_.key_step);
    constexpr int64_t kPair = kDepth<X>;
    for (int64_t i = 0; i < size; i += kPair, y += kPanel * kPair) {
      for (int64_t j = 0; j < kPair && i + j < size; ++j) y[j] = converted[i + j];
    }
  }

  // A sequence's keys and values of one attention head.
  X* cached(const DecodeBlock& block, int64_t sequence, int64_t h) const {
    return static_cast<X*>(p_.cache) +
           (sequence * p_.n_blocks + (&block - p_.blocks)) * cache_.size + h * cache_.head;
  }

  void finish(Worker& worker, const DecodeBlock* blocks, float* x) {
    const int64_t dim = p_.dim, ffn = p_.ffn_dim, size = panel_size<X>(dim);
    for_pieces(worker, p_.batch * p_.n_queries, 2 * p_.rows * reach_ * p_.head_dim,
               [&](int64_t b, int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   attend(worker, blocks[b], b, i / p_.n_queries, i % p_.n_queries);
                 }
               });
    add_products(worker, attended_, width_, blocks, packed_.out, x);
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

  // Attention head h of all of a sequence's new rows. Row r sees `shared` + r positions.
  void attend(const Worker& worker, const DecodeBlock& block, int64_t b, int64_t sequence,
              int64_t h) {
    const int64_t size = p_.head_dim, row = (b * p_.batch + sequence) * p_.rows;
    const X* keys = cached(block, sequence, h / packed_.group_queries);
    const X* values = keys + cache_.values;
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    const int64_t shared = p_.start[sequence] + 1, seen = p_.start[sequence] + p_.rows;
    float* scores = scores_.row(worker.index() * p_.rows);
    X* weights = weights_.row(worker.index() * p_.rows);
    float* factors = factors_.row(worker.index());
    panel_products(queries_.row(row * p_.n_queries + h), p_.n_queries * queries_.ld, p_.rows, keys,
                   cache_.key_step, size, panels_of(seen), [&](int64_t r, int64_t p, Sums sums) {
                     sums.first.store(scores + r * reach_ + p * kPanel);
                     sums.second.store(scores + r * reach_ + p * kPanel + kLanes);
                   });
    for (int64_t r = 0; r < p_.rows; ++r) {
      X* own = weights + r * reach_;
      factors[r] = 1.0f / exponentials(scores + r * reach_, shared + r, scale, own);
      std::fill(own + shared + r, own + padded<X>(seen), X{});
    }
    const auto sum_up = [&](const X* from, int64_t first, int64_t last) {  // of rows [first, last)
      panel_products(weights, reach_, p_.rows, from, cache_.value_step, seen, panels_of(size),
                     [&](int64_t r, int64_t p, Sums sums) {
                       if (r < first || r >= last) return;
                       X* y = attended_.row(row + r) + h * size + p * kPanel;
                       const Vec factor(factors[r]);
                       const int64_t n = size - p * kPanel;
                       store_some(sums.first * factor, y, n);
                       if (n > kLanes) store_some(sums.second * factor, y + kLanes, n - kLanes);
                     });
    };
    if (are_finite(values, shared, padded<X>(seen))) return sum_up(values, 0, p_.rows);
    // The weight of what a row does not see is 0, but 0 * NaN is NaN.
    std::vector<X> visible(panels_of(size) * cache_.value_step);
    for (int64_t r = 0; r < p_.rows; ++r) {
      for (int64_t i = 0; i < size; ++i) {
        for (int64_t t = 0; t < shared + r; ++t) {
          const int64_t place = place_in_panels<X>(i, t, cache_.value_step);
          visible[place] = values[place];
        }
      }
      sum_up(visible.data(), r, r + 1);
    }
  }

  // Of a head's values at positions [begin, end), and maybe at the one before.
  bool are_finite(const X* values, int64_t begin, int64_t end) const {
    constexpr int64_t kStep = kPanel * kDepth<X>;
    Vec zeros(0.0f);  // and NaN where a value is not finite
    for (int64_t p = 0; p < panels_of(p_.head_dim); ++p, values += cache_.value_step) {
      const X* last = values + (end + kDepth<X> - 1) / kDepth<X> * kStep;
      for (const X* x = values + begin / kDepth<X> * kStep; x < last; x += kLanes) {
        zeros = fma(Vec::load(x), Vec(0.0f), zeros);
      }
    }
    return zeros.hsum() == 0.0f;
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
  const CacheLayout<X> cache_;
  const int threads_;
  const int64_t abreast_, rows_, width_, head_width_;
  const int64_t reach_;                 // positions that any row sees, at most, in whole panels
  const Scratch<X> queries_;            // (abreast, rows, n_queries) rows of head_dim
  const Scratch<X> attended_;           // (abreast, rows) of n_queries * head_dim
  const Scratch<X> hidden_;             // (abreast, rows) of ffn_dim
  const Scratch<X> normalized_;         // (threads, rows) of dim
  std::vector<int64_t> normalized_of_;  // (threads): which round and block that is
  const Scratch<float> head_;           // (threads, rows) of head_width
  const Scratch<X> converted_;          // (threads) of head_dim
  const Scratch<float> scores_;         // (threads, rows of a sequence) of reach
  const Scratch<X> weights_;            // likewise
  const Scratch<float> factors_;        // (threads) of rows of a sequence
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
      : p_(params), threads_(threads), rows_(rows), normalized_(rows, params.dim) {}

  template <class F>
  void run(Worker& worker, const float* x, const F& to) {
    for_rows(worker, rows_, [&](int64_t r) {
      normalize(x + r * p_.dim, p_.final_scale, p_.dim, p_.norm_eps, normalized_.row(r));
    });
    const auto piece = [&](int64_t begin, int64_t end) {
      few_rows::products(normalized_.row(0), normalized_.ld, rows_,
                         static_cast<const T*>(p_.unembedding) + begin * p_.dim, p_.dim, p_.dim,
                         end - begin, [&](int64_t r, int64_t o, float value) {
                           p_.logits[to(r) * p_.vocab + begin + o] = value;
                         });
    };
    worker.round(p_.vocab, few_rows::outputs_per_piece(p_.vocab, p_.dim, threads_), piece);
  }

 private:
  const DecodeParams& p_;
  const int threads_;
  const int64_t rows_;
  const Scratch<T> normalized_;
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
    for (int64_t h = 0; h < heads; ++h) {
      memcpy(x.row(h * p.batch), p.trunk, sizeof(float) * p.batch * p.dim);
    }
    run_rounds(threads, [&](Worker& worker) {
      drafting.read(worker, p.blocks + p.n_layers, x.row(0));
      unembedding.run(worker, x.row(0), [&](int64_t r) {
        return r % p.batch * heads + r / p.batch;  // from head by head to sequence by sequence
      });
      release_matrix_registers();
    });
  });
}

}  // namespace mtp
