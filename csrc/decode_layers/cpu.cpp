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

// T, X: see panels.h. A: what attention is made in.
template <class T, class X, class A>
class Step {
 public:
  // Of blocks from number `first` on, whose weights are `packed`. abreast: how many of them take
  // each round together.
  Step(const DecodeParams& params, int64_t first, const void* packed, int threads, int64_t abreast)
      : p_(params),
        first_(params.blocks + first),
        weights_(static_cast<const T*>(packed)),
        packed_(params),
        threads_(threads),
        abreast_(abreast),
        rows_(params.batch * params.rows),
        head_width_(packed_.head_panels * kPanel),
        attention_(params, threads, abreast),
        hidden_(*params.workspace, abreast * rows_, params.ffn_dim),
        normalized_(*params.workspace, threads * rows_, params.dim),
        inputs_(*params.workspace, std::is_same_v<X, A> ? 0 : threads * rows_ * kSplit<X>,
                std::max({params.dim, params.ffn_dim, params.n_queries * params.head_dim})),
        factors_(*params.workspace, kIntegers<X> ? threads * abreast : 0, rows_),
        head_(*params.workspace, threads * rows_, head_width_) {}

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
  using Made = std::conditional_t<kIntegers<X>, float, X>;  // rows, before they are whole numbers

  // Members [first, last) of every group of attention heads: its queries, key, value.
  struct Members {
    int64_t first, last;
  };
  Members all() const { return {0, packed_.group_queries + 2}; }

  // The weights of block b that is run.
  const T* weights(const DecodeBlock* blocks, int64_t b) const {
    return weights_ + (blocks - first_ + b) * packed_.size;
  }

  // Of `count` things a block, which cost `cost` products each, as many as make a piece: not too
  // few, and eight pieces a thread, for whoever has to help.
  int64_t grain(int64_t count, int64_t cost) const {
    constexpr int64_t kSmallest = 8192;
    return std::max(
        {count * abreast_ / (8 * threads_), kSmallest / std::max<int64_t>(cost, 1), int64_t{1}});
  }

  // One round of products: rows(b), `ld` apart, with every block's `count` things of `together`
  // panels. A worker asks for rows when he comes to a block, while its first weights load;
  // find(panel) sets a panel's weights, and may give the thing another number than its place.
  template <class R, class W, class F>
  void products(Worker& worker, int64_t count, int64_t together, int64_t ld, int64_t in,
                const R& rows, const W& find, const F& take) {
    const int64_t size = together * panel_size<T, X>(in);
    worker.pieces(count * abreast_, grain(count, size), [&](const auto& piece) {
      int64_t at = 0, end = 0, part = 0, block = -1;  // things of all blocks; the last one's block
      const X* x = nullptr;
      const auto next = [&](Panel<T, X>& panel) {
        if (at == end && !piece(at, end)) return false;
        const int64_t b = at / count;
        const bool first = b != block;
        panel = {x, nullptr, b, at % count, part, first, factors(worker, b)};
        find(panel);
        if (first) {
          fetch_first(panel.weights);
          panel.x = x = multiplied(worker, block = b, in, rows(b), ld);
        }
        if (++part == together) part = 0, ++at;
        return true;
      };
      constexpr bool kReady = std::is_convertible_v<decltype(rows(int64_t{0})), const X*>;
      panel_products<T, X>(rows_, kReady ? ld : inputs_.ld, in, next, take);
    });
  }

  // Rows x (in) of block b, `ld` apart, as they are multiplied: these, or this thread's copy.
  template <class R>
  const X* multiplied(const Worker& worker, int64_t b, int64_t in, const R* x, int64_t ld) {
    if constexpr (std::is_same_v<R, X>) {
      return x;
    } else {
      X* first = inputs_.row(worker.index() * rows_ * kSplit<X>);
      for (int64_t r = 0; r < rows_; ++r, x += ld) {
        X* y = first + r * kSplit<X> * inputs_.ld;
        if constexpr (kSplit<X> == 2) {
          factors(worker, b)[r] = split(x, in, y, y + inputs_.ld);
        } else if constexpr (kIntegers<X>) {
          factors(worker, b)[r] = to_whole(x, in, y);
        } else {
          convert(x, in, y);
        }
      }
      return first;
    }
  }

  // Of rows of whole numbers; each block has its own, since the last one's are still in use.
  float* factors(const Worker& worker, int64_t b) const {
    return kIntegers<X> ? factors_.row(worker.index() * abreast_ + b) : nullptr;
  }

  // Rows x, normalised by this thread.
  const Made* normalized(const Worker& worker, const float* x, const float* scale) {
    Made* y = normalized_.row(worker.index() * rows_);
    normalize(x, p_.dim, rows_, scale, p_.dim, p_.norm_eps, y, normalized_.ld);
    return y;
  }

  // Queries, keys and values of each block's x.
  void project(Worker& worker, const DecodeBlock* blocks, const float* x, int64_t block_stride,
               Members members) {
    const int64_t taken = members.last - members.first;  // of each group of attention heads
    const int64_t panels = packed_.head_panels;
    const auto place = [&](int64_t i) {
      return i / taken * all().last + members.first + i % taken;
    };
    products(
        worker, p_.n_keys * taken, panels, normalized_.ld, p_.dim,
        [&](int64_t b) {
          return normalized(worker, x + b * block_stride, blocks[b].attention_scale);
        },
        [&](Panel<T, X>& panel) {
          const int64_t head = place(panel.index), at = head * panels + panel.part;
          panel.weights = weights(blocks, panel.block) + at * panel_size<T, X>(p_.dim);
          panel.index = packed_.head_at(p_, head);
          if (panel.part == 0) attention_.prepare(blocks[panel.block], panel.index);
        },
        [&](const Panel<T, X>& panel, int64_t r, Sums sums) {
          float* head = head_.row(worker.index() * rows_ + r);
          sums.first.store(head + panel.part * kPanel);
          sums.second.store(head + panel.part * kPanel + kLanes);
          if (panel.part + 1 < panels) return;
          attention_.take(worker.index(), blocks[panel.block], panel.block, panel.index, r, head);
        });
  }

  void finish(Worker& worker, const DecodeBlock* blocks, float* x) {
    const int64_t groups = attention_.groups(), of_block = p_.batch * groups;
    worker.round(of_block * abreast_, grain(of_block, attention_.products_of_a_group()),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t b = i / of_block, sequence = i % of_block / groups;
                     attention_.attend(worker.index(), blocks[b], b, sequence, i % groups);
                   }
                 });
    add_products(worker, attention_.attended(), p_.n_queries * p_.head_dim, blocks, packed_.out, x);
    products(
        worker, packed_.ffn_panels, 1, normalized_.ld, p_.dim,
        [&](int64_t b) { return normalized(worker, x + b * rows_ * p_.dim, blocks[b].ffn_scale); },
        [&](Panel<T, X>& panel) {
          const int64_t b = panel.block, i = panel.index;
          for (int64_t r = 0; r < rows_; ++r) {
            prefetch_to_write(hidden_.row(b * rows_ + r) + i * kLanes);
          }
          panel.weights = weights(blocks, b) + packed_.gate_up + i * panel_size<T, X>(p_.dim);
        },
        [&](const Panel<T, X>& panel, int64_t r, Sums sums) {
          const int64_t unit = panel.index * kLanes;
          store_some(gated(sums), hidden_.row(panel.block * rows_ + r) + unit, p_.ffn_dim - unit);
        });
    add_products(worker, hidden_, p_.ffn_dim, blocks, packed_.down, x);
  }

  // x += in (abreast, rows, n) @ weight.T, the weight at `offset` of each block's.
  template <class R>
  void add_products(Worker& worker, const Scratch<R>& in, int64_t n, const DecodeBlock* blocks,
                    int64_t offset, float* x) {
    const auto add = [](Vec sum, float* y, int64_t count) {
      if (count >= kLanes) {
        (Vec::load(y) + sum).store(y);
      } else if (count > 0) {
        (Vec::load(y, count, sum) + sum).store(y, count);
      }
    };
    products(
        worker, panels_of(p_.dim), 1, in.ld, n, [&](int64_t b) { return in.row(b * rows_); },
        [&](Panel<T, X>& panel) {
          const int64_t b = panel.block, i = panel.index;
          for (int64_t r = 0; r < rows_; ++r) {
            const float* y = x + (b * rows_ + r) * p_.dim + i * kPanel;
            prefetch_to_write(y);
            prefetch_to_write(y + kLanes);
          }
          panel.weights = weights(blocks, b) + offset + i * panel_size<T, X>(n);
        },
        [&](const Panel<T, X>& panel, int64_t r, Sums sums) {
          const int64_t o = panel.index * kPanel;
          float* y = x + (panel.block * rows_ + r) * p_.dim + o;
          add(sums.first, y, p_.dim - o);
          add(sums.second, y + kLanes, p_.dim - o - kLanes);
        });
  }

  const DecodeParams& p_;
  const DecodeBlock* const first_;
  const T* const weights_;
  const PackedBlock<T, X> packed_;
  const int threads_;
  const int64_t abreast_, rows_, head_width_;
  Attention<A> attention_;
  const Scratch<Made> hidden_;      // (abreast, rows) of ffn_dim
  const Scratch<Made> normalized_;  // (threads, rows) of dim
  const Scratch<X> inputs_;         // (threads, rows): copies of rows
  const Scratch<float> factors_;    // (threads, abreast) of rows
  const Scratch<float> head_;       // (threads, rows) of head_width
};

// Calls f(r) for rows r < n: one round.
template <class F>
void for_rows(Worker& worker, int64_t n, const F& f) {
  worker.round(n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) f(r);
  });
}

// The final norm of x (rows, dim) and the products with the unembedding: one round. Each thread
// makes the norm for itself: rows packed side by side share lines.
template <class T>
class Unembedding {
 public:
  Unembedding(const DecodeParams& params, int threads, int64_t rows)
      : p_(params),
        rows_(rows),
        grain_(few_rows::outputs_per_piece<T>(params.vocab, params.dim, threads)),
        normalized_(*params.workspace, threads * rows, params.dim),
        packed_(*params.workspace, threads, Rows::packed_size(rows, params.dim)) {}

  // Row r gives row to(r) of the logits.
  template <class F>
  void run(Worker& worker, const float* x, const F& to) {
    const T* weight = static_cast<const T*>(p_.unembedding);
    worker.pieces(p_.vocab, grain_, [&](const auto& next) {
      int64_t begin, end;
      if (!next(begin, end)) return;
      T* y = normalized_.row(worker.index() * rows_);
      const Rows packed(y, normalized_.ld, rows_, p_.dim, packed_.row(worker.index()));
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
  const Scratch<T> normalized_;             // (threads, rows) of dim
  const Scratch<typename Rows::X> packed_;  // (threads)
};

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
    const Scratch<float> x(*p.workspace, rows, p.dim);
    Step<T, A, A> layers(p, 0, p.packed, threads, 1);
    Step<int8_t, X, A> drafting(p, p.n_layers, p.packed_drafting, threads, heads);
    Unembedding<T> unembedding(p, threads, p.logits == nullptr ? 0 : rows);
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
  with_drafting_types(p, [&](auto storage, auto factor, auto row) {
    using T = decltype(storage);
    using X = decltype(factor);
    const int64_t heads = p.n_blocks - p.n_layers, rows = heads * p.batch;
    p.workspace->reset();
    const Scratch<float> x(*p.workspace, rows, p.dim);
    Step<int8_t, X, decltype(row)> drafting(p, p.n_layers, p.packed_drafting, threads, heads);
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
