// The CPU kernel of a decode step's layers. A block is five rounds of a team of threads
// (common/rounds.h):
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
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "common/rounds.h"
#include "decode_layers/params.h"
#include "few_row_linear/dots.h"

namespace mtp {
namespace MTP_SIMD {
namespace {

constexpr int64_t kLanes = Vec::kLanes;

// The sum of squares of x (n).
float square_sum(const float* x, int64_t n) {
  Vec sum(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = Vec::load(x + i);
    sum = fma(v, v, sum);
  }
  if (i < n) {
    const Vec v = Vec::load(x + i, n - i, Vec(0.0f));
    sum = fma(v, v, sum);
  }
  return sum.hsum();
}

// RMSNorm of x (n) times `scale`; y may be x.
template <class T>
void normalize(const float* x, const float* scale, int64_t n, float eps, T* y) {
  const Vec factor(1.0f / std::sqrt(square_sum(x, n) / static_cast<float>(n) + eps));
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    (Vec::load(x + i) * factor * Vec::load(scale + i)).store(y + i);
  if (const int64_t rest = n - i; rest > 0) {
    const Vec zero(0.0f);
    (Vec::load(x + i, rest, zero) * factor * Vec::load(scale + i, rest, zero)).store(y + i, rest);
  }
}

// scores (n) become exp(scale * (scores - max)); returns their sum.
float exponentials(float* scores, int64_t n, float scale) {
  const Vec lowest(-std::numeric_limits<float>::infinity());
  Vec max_lanes = lowest, sum(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) max_lanes = max(Vec::load(scores + i), max_lanes);
  if (i < n) max_lanes = max(Vec::load(scores + i, n - i, lowest), max_lanes);
  const Vec top(max_lanes.hmax()), factor(scale);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const Vec e = exp((Vec::load(scores + i) - top) * factor);
    e.store(scores + i);
    sum = sum + e;
  }
  if (i < n) {
    const Vec e = exp((Vec::load(scores + i, n - i, lowest) - top) * factor);
    e.store(scores + i, n - i);
    sum = sum + e;
  }
  return sum.hsum();
}

// y (width) = factor * sum_t weights[t] * values[t], values (n, width).
template <class T>
void weighted_sum(const float* weights, int64_t n, const float* values, int64_t width, float factor,
                  T* y) {
  constexpr int kAtOnce = 4;
  int64_t i = 0;
  for (; i + kAtOnce * kLanes <= width; i += kAtOnce * kLanes) {
    Vec sums[kAtOnce] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
    for (int64_t t = 0; t < n; ++t) {
      const Vec w(weights[t]);
      const float* v = values + t * width + i;
      for (int k = 0; k < kAtOnce; ++k) sums[k] = fma(w, Vec::load(v + k * kLanes), sums[k]);
    }
    for (int k = 0; k < kAtOnce; ++k) (sums[k] * Vec(factor)).store(y + i + k * kLanes);
  }
  for (; i < width; i += kLanes) {
    const int64_t lanes = std::min(kLanes, width - i);
    Vec sum(0.0f);
    for (int64_t t = 0; t < n; ++t) {
      sum = fma(Vec(weights[t]), Vec::load(values + t * width + i, lanes, Vec(0.0f)), sum);
    }
    (sum * Vec(factor)).store(y + i, lanes);
  }
}

// Scratch that starts on a cache line, so that a vector of it never lies in two.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n)
      : data_(static_cast<T*>(::operator new(sizeof(T) * n, std::align_val_t{64}))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  T* get() const { return data_; }

 private:
  T* const data_;
};

// y (n) = silu(gate) * up.
template <class T>
void gated(const float* gate, const float* up, int64_t n, T* y) {
  const Vec one(1.0f), zero(0.0f);
  const auto product = [&](Vec g, Vec u) { return g * u / (one + exp(-g)); };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    product(Vec::load(gate + i), Vec::load(up + i)).store(y + i);
  }
  if (const int64_t rest = n - i; rest > 0) {
    product(Vec::load(gate + i, rest, zero), Vec::load(up + i, rest, zero)).store(y + i, rest);
  }
}

template <class T>
class Step {
 public:
  // groups: blocks that are run together.
  Step(const DecodeParams& params, int threads, int64_t groups)
      : p_(params),
        threads_(threads),
        groups_(groups),
        rows_(params.batch * params.rows),
        width_(params.n_queries * params.head_dim),
        reach_(*std::max_element(params.start, params.start + params.batch) + params.rows),
        queries_(groups * rows_ * width_),
        attended_(groups * rows_ * width_),
        hidden_(groups * rows_ * params.ffn_dim),
        normalized_(threads * rows_ * params.dim),
        normalized_of_(threads),
        head_grain_(std::max<int64_t>(
            outputs_per_piece((params.n_queries + 2 * params.n_keys) * params.head_dim, params.dim,
                              threads) /
                params.head_dim,
            1)),
        ffn_grain_((outputs_per_piece(2 * params.ffn_dim, params.dim, threads) / 2 + kLanes - 1) /
                   kLanes * kLanes),
        most_outputs_(std::max(head_grain_ * params.head_dim, ffn_grain_)),
        products_(threads * 2 * rows_ * most_outputs_),
        scores_(threads * params.rows * reach_) {}

  // x (groups, rows, dim), in place: kRounds rounds.
  static constexpr int64_t kRounds = 5;
  void run(Worker& worker, const DecodeBlock* blocks, float* x) {
    project(worker, blocks, x, rows_ * p_.dim, 0, p_.n_queries + 2 * p_.n_keys);
    finish(worker, blocks, x);
  }

  // x (rows, dim) of all groups: one round.
  void store_keys_values(Worker& worker, const DecodeBlock* blocks, const float* x) {
    project(worker, blocks, x, 0, p_.n_queries, p_.n_queries + 2 * p_.n_keys);
  }

  // As run, where keys and values are stored.
  void read(Worker& worker, const DecodeBlock* blocks, float* x) {
    project(worker, blocks, x, rows_ * p_.dim, 0, p_.n_queries);
    finish(worker, blocks, x);
  }

 private:
  // One round: calls f(group, begin, end) for pieces of each group's `n`.
  template <class F>
  void for_pieces(Worker& worker, int64_t n, int64_t grain, const F& f) {
    const int64_t pieces = (n + grain - 1) / grain;
    worker.round(groups_ * pieces, [&](int64_t i) {
      const int64_t begin = i % pieces * grain;
      f(i / pieces, begin, std::min(begin + grain, n));
    });
  }

  // The rows of a group, normalised: made at the worker's first piece of the group.
  const T* normalized(const Worker& worker, const float* x, const float* scale, int64_t group) {
    T* y = normalized_.get() + worker.index() * rows_ * p_.dim;
    const int64_t key = worker.rounds_begun() * groups_ + group;
    if (normalized_of_[worker.index()] != key) {
      for (int64_t r = 0; r < rows_; ++r) {
        normalize(x + r * p_.dim, scale, p_.dim, p_.norm_eps, y + r * p_.dim);
      }
      normalized_of_[worker.index()] = key;
    }
    return y;
  }

  int64_t position(int64_t row) const { return p_.start[row / p_.rows] + row % p_.rows; }

  // Attention heads [first, last) of queries, keys and values, in this order, of each group.
  void project(Worker& worker, const DecodeBlock* blocks, const float* x, int64_t group_stride,
               int64_t first, int64_t last) {
    const int64_t size = p_.head_dim;
    for_pieces(worker, last - first, head_grain_, [&](int64_t group, int64_t begin, int64_t end) {
      const DecodeBlock& block = blocks[group];
      const T* in = normalized(worker, x + group * group_stride, block.attention_scale, group);
      const T* weight = static_cast<const T*>(block.qkv) + (first + begin) * size * p_.dim;
      const int64_t width = (end - begin) * size;
      float* y = multiply(worker, in, weight, width, 0);
      for (int64_t r = 0; r < rows_; ++r) {
        for (int64_t h = begin; h < end; ++h) {
          finish_head(block, group, first + h, r, y + r * width + (h - begin) * size);
        }
      }
    });
  }

  // The products of the rows `in` (rows, dim) with `count` rows of a weight: part `part` of the
  // worker's scratch, (rows, count).
  float* multiply(const Worker& worker, const T* in, const T* weight, int64_t count, int64_t part) {
    float* y = products_.get() + (worker.index() * 2 + part) * rows_ * most_outputs_;
    products(in, p_.dim, rows_, weight, p_.dim, p_.dim, count,
             [&](int64_t r, int64_t o, float value) { y[r * count + o] = value; });
    return y;
  }

  // Bias, norm and rotation of attention head h of a row; then to its place.
  void finish_head(const DecodeBlock& block, int64_t group, int64_t h, int64_t row, float* x) {
    const int64_t size = p_.head_dim, half = size / 2;
    const int64_t key = h - p_.n_queries, value = key - p_.n_keys;
    const bool is_query = key < 0, is_value = value >= 0;
    if (block.qkv_bias != nullptr) {
      for (int64_t i = 0; i < size; ++i) x[i] += block.qkv_bias[h * size + i];
    }
    if (is_value) {
      memcpy(block.values + place(row, value), x, sizeof(float) * size);
      return;
    }
    const float* scale = is_query ? block.query_scale : block.key_scale;
    if (scale != nullptr) normalize(x, scale, size, p_.norm_eps, x);
    float* y = is_query ? queries_.get() + (group * rows_ + row) * width_ + h * size
                        : block.keys + place(row, key);
    const float* cosine = p_.rope + position(row) * 2 * size;
    const float* sine = cosine + size;
    for (int64_t i = 0; i < half; ++i) y[i] = x[i] * cosine[i] + x[half + i] * sine[i];
    for (int64_t i = half; i < size; ++i) y[i] = x[i] * cosine[i] + x[i - half] * sine[i];
  }

  // Where the cache has a row's key or value of attention head h.
  int64_t place(int64_t row, int64_t h) const {
    return row / p_.rows * p_.sequence_stride + (h * p_.capacity + position(row)) * p_.head_dim;
  }

  void finish(Worker& worker, const DecodeBlock* blocks, float* x) {
    const int64_t dim = p_.dim, ffn = p_.ffn_dim;
    for_pieces(worker, p_.batch * p_.n_queries, 1, [&](int64_t group, int64_t i, int64_t) {
      attend(worker, blocks[group], group, i / p_.n_queries, i % p_.n_queries);
    });
    add_products(worker, attended_.get(), width_, blocks, &DecodeBlock::out, x);

    for_pieces(worker, ffn, ffn_grain_, [&](int64_t group, int64_t begin, int64_t end) {
      const T* in = normalized(worker, x + group * rows_ * dim, blocks[group].ffn_scale, group);
      const T* gate = static_cast<const T*>(blocks[group].gate_up) + begin * dim;
      const float* gates = multiply(worker, in, gate, end - begin, 0);
      const float* ups = multiply(worker, in, gate + ffn * dim, end - begin, 1);
      for (int64_t r = 0; r < rows_; ++r) {
        gated(gates + r * (end - begin), ups + r * (end - begin), end - begin,
              hidden_.get() + (group * rows_ + r) * ffn + begin);
      }
    });
    add_products(worker, hidden_.get(), ffn, blocks, &DecodeBlock::down, x);
  }

  // Attention head h of all of a sequence's new rows.
  void attend(const Worker& worker, const DecodeBlock& block, int64_t group, int64_t sequence,
              int64_t h) {
    const int64_t size = p_.head_dim;
    const int64_t offset =
        sequence * p_.sequence_stride + h / (p_.n_queries / p_.n_keys) * p_.capacity * size;
    const float *keys = block.keys + offset, *values = block.values + offset;
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    const int64_t row = (group * p_.batch + sequence) * p_.rows;
    const int64_t seen = p_.start[sequence] + p_.rows;  // positions that the last row sees
    float* scores = scores_.get() + worker.index() * p_.rows * reach_;
    products(queries_.get() + row * width_ + h * size, width_, p_.rows, keys, size, size, seen,
             [&](int64_t r, int64_t t, float value) { scores[r * seen + t] = value; });
    for (int64_t r = 0; r < p_.rows; ++r) {
      const int64_t n = seen - p_.rows + 1 + r;
      const float sum = exponentials(scores + r * seen, n, scale);
      weighted_sum(scores + r * seen, n, values, size, 1.0f / sum,
                   attended_.get() + (row + r) * width_ + h * size);
    }
  }

  // x += in (groups, rows, n) @ weight.T
  void add_products(Worker& worker, const T* in, int64_t n, const DecodeBlock* blocks,
                    const void* DecodeBlock::* weight, float* x) {
    const int64_t dim = p_.dim;
    for_pieces(worker, dim, outputs_per_piece(dim, n, threads_),
               [&](int64_t group, int64_t begin, int64_t end) {
                 float* y = x + group * rows_ * dim + begin;
                 const T* w = static_cast<const T*>(blocks[group].*weight) + begin * n;
                 products(in + group * rows_ * n, n, rows_, w, n, n, end - begin,
                          [&](int64_t r, int64_t o, float value) { y[r * dim + o] += value; });
               });
  }

  const DecodeParams& p_;
  const int threads_;
  const int64_t groups_, rows_, width_;
  const int64_t reach_;                   // slots that any row sees, at most
  const Scratch<float> queries_;          // (groups, rows, n_queries, head_dim)
  const Scratch<T> attended_;             // likewise
  const Scratch<T> hidden_;               // (groups, rows, ffn_dim)
  const Scratch<T> normalized_;           // (threads, rows, dim)
  std::vector<int64_t> normalized_of_;    // (threads): which round and group that is
  const int64_t head_grain_, ffn_grain_;  // attention heads, hidden units that are a piece
  const int64_t most_outputs_;
  const Scratch<float> products_;  // (threads, 2, rows, most_outputs)
  const Scratch<float> scores_;    // (threads, rows of a sequence, reach)
};

// The final norm of x (rows, dim): one round.
void finish_rows(Worker& worker, const DecodeParams& p, int64_t rows) {
  worker.round(rows, [&](int64_t r) {
    float* x = p.x + r * p.dim;
    normalize(x, p.final_scale, p.dim, p.norm_eps, x);
  });
}

}  // namespace
}  // namespace MTP_SIMD

template <>
void decode_layers_run<SimdLevel::MTP_SIMD>(const DecodeParams& p, int threads) {
  using namespace MTP_SIMD;
  dispatch_dtype(p.dtype, [&](auto storage) {
    using Blocks = Step<decltype(storage)>;
    const int64_t rows = p.batch * p.rows;
    Blocks step(p, threads, 1);
    run_rounds(threads, p.n_blocks * Blocks::kRounds + 2, [&](Worker& worker) {
      for (int64_t i = 0; i < p.n_blocks; ++i) {
        if (i + 1 == p.n_blocks) {
          worker.round(1,
                       [&](int64_t) { memcpy(p.last_input, p.x, sizeof(float) * rows * p.dim); });
        }
        step.run(worker, p.blocks + i, p.x);
      }
      finish_rows(worker, p, rows);
    });
  });
}

template <>
void decode_keys_values_run<SimdLevel::MTP_SIMD>(const DecodeParams& p, int threads) {
  using namespace MTP_SIMD;
  dispatch_dtype(p.dtype, [&](auto storage) {
    Step<decltype(storage)> step(p, threads, p.n_blocks);
    run_rounds(threads, 1, [&](Worker& worker) { step.store_keys_values(worker, p.blocks, p.x); });
  });
}

template <>
void decode_heads_run<SimdLevel::MTP_SIMD>(const DecodeParams& p, int threads) {
  using namespace MTP_SIMD;
  dispatch_dtype(p.dtype, [&](auto storage) {
    using Blocks = Step<decltype(storage)>;
    Blocks step(p, threads, p.n_blocks);
    run_rounds(threads, Blocks::kRounds + 1, [&](Worker& worker) {
      step.read(worker, p.blocks, p.x);
      finish_rows(worker, p, p.n_blocks * p.batch);
    });
  });
}

}  // namespace mtp
