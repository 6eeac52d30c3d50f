// The CPU kernel of a decode step's layers. A block is five rounds over the threads:
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
#include <memory>

#include "common/parallel.h"
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

// y (width) = factor * sum_t weights[t] * values[t]; row t of values is values + t * ld.
template <class T>
void weighted_sum(const float* weights, int64_t n, const float* values, int64_t ld, int64_t width,
                  float factor, T* y) {
  constexpr int kAtOnce = 4;
  int64_t i = 0;
  for (; i + kAtOnce * kLanes <= width; i += kAtOnce * kLanes) {
    Vec sums[kAtOnce] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
    for (int64_t t = 0; t < n; ++t) {
      const Vec w(weights[t]);
      const float* v = values + t * ld + i;
      for (int k = 0; k < kAtOnce; ++k) sums[k] = fma(w, Vec::load(v + k * kLanes), sums[k]);
    }
    for (int k = 0; k < kAtOnce; ++k) (sums[k] * Vec(factor)).store(y + i + k * kLanes);
  }
  for (; i < width; i += kLanes) {
    const int64_t lanes = std::min(kLanes, width - i);
    Vec sum(0.0f);
    for (int64_t t = 0; t < n; ++t) {
      sum = fma(Vec(weights[t]), Vec::load(values + t * ld + i, lanes, Vec(0.0f)), sum);
    }
    (sum * Vec(factor)).store(y + i, lanes);
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
        queries_(new float[groups * rows_ * width_]),
        attended_(new T[groups * rows_ * width_]),
        hidden_(new T[groups * rows_ * params.ffn_dim]),
        normalized_(new T[threads * rows_ * params.dim]),
        normalized_of_(new int64_t[threads]()),
        head_(new float[threads * rows_ * params.head_dim]),
        scores_(new float[threads * kOutputs * (reach_ + kRows)]) {}

  // x (groups, rows, dim), in place.
  void run(const DecodeBlock* blocks, float* x) {
    project(blocks, x, rows_ * p_.dim, 0, p_.n_queries + 2 * p_.n_keys);
    finish(blocks, x);
  }

  // x (rows, dim) of all groups.
  void store_keys_values(const DecodeBlock* blocks, const float* x) {
    project(blocks, x, 0, p_.n_queries, p_.n_queries + 2 * p_.n_keys);
  }

  // As run, where keys and values are stored.
  void read(const DecodeBlock* blocks, float* x) {
    project(blocks, x, rows_ * p_.dim, 0, p_.n_queries);
    finish(blocks, x);
  }

 private:
  // Calls f(group, begin, end, worker) for pieces of each group's `n`.
  template <class F>
  void for_pieces(int64_t n, int64_t grain, const F& f) {
    const int64_t pieces = (n + grain - 1) / grain;
    ++round_;
    parallel_for(threads_, groups_ * pieces, 1, [&](int64_t i, int64_t end, int worker) {
      for (; i < end; ++i) {
        const int64_t begin = i % pieces * grain;
        f(i / pieces, begin, std::min(begin + grain, n), worker);
      }
    });
  }

  // The rows of a group, normalised: made at the worker's first piece of the group.
  const T* normalized(const float* x, const float* scale, int64_t group, int worker) {
    T* y = normalized_.get() + worker * rows_ * p_.dim;
    const int64_t key = round_ * groups_ + group;
    if (normalized_of_[worker] != key) {
      for (int64_t r = 0; r < rows_; ++r) {
        normalize(x + r * p_.dim, scale, p_.dim, p_.norm_eps, y + r * p_.dim);
      }
      normalized_of_[worker] = key;
    }
    return y;
  }

  int64_t position(int64_t row) const { return p_.start[row / p_.rows] + row % p_.rows; }

  // Attention heads [first, last) of queries, keys and values, in this order, of each group.
  void project(const DecodeBlock* blocks, const float* x, int64_t group_stride, int64_t first,
               int64_t last) {
    const int64_t size = p_.head_dim;
    const int64_t grain =
        std::max<int64_t>(outputs_per_piece((last - first) * size, p_.dim, threads_) / size, 1);
    for_pieces(last - first, grain, [&](int64_t group, int64_t begin, int64_t end, int worker) {
      const DecodeBlock& block = blocks[group];
      const T* in = normalized(x + group * group_stride, block.attention_scale, group, worker);
      float* head = head_.get() + worker * rows_ * size;
      for (int64_t h = first + begin; h < first + end; ++h) {
        products(in, rows_, static_cast<const T*>(block.qkv) + h * size * p_.dim, p_.dim, p_.dim, 0,
                 size, [&](int64_t r, int64_t o, float value) { head[r * size + o] = value; });
        for (int64_t r = 0; r < rows_; ++r) finish_head(block, group, h, r, head + r * size);
      }
    });
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
      memcpy(block.values + slot(row) + value * size, x, sizeof(float) * size);
      return;
    }
    const float* scale = is_query ? block.query_scale : block.key_scale;
    if (scale != nullptr) normalize(x, scale, size, p_.norm_eps, x);
    float* y = is_query ? queries_.get() + (group * rows_ + row) * width_ + h * size
                        : block.keys + slot(row) + key * size;
    const float* cosine = p_.rope + position(row) * 2 * size;
    const float* sine = cosine + size;
    for (int64_t i = 0; i < half; ++i) y[i] = x[i] * cosine[i] + x[half + i] * sine[i];
    for (int64_t i = half; i < size; ++i) y[i] = x[i] * cosine[i] + x[i - half] * sine[i];
  }

  int64_t slot(int64_t row) const {
    return (row / p_.rows * p_.capacity + position(row)) * p_.slot_stride;
  }

  void finish(const DecodeBlock* blocks, float* x) {
    const int64_t dim = p_.dim, ffn = p_.ffn_dim;
    for_pieces(p_.batch * p_.n_queries, 1,
               [&](int64_t group, int64_t begin, int64_t end, int worker) {
                 for (int64_t i = begin; i < end; ++i) {
                   attend(blocks[group], group, i / p_.n_queries, i % p_.n_queries, worker);
                 }
               });
    add_products(attended_.get(), width_, blocks, &DecodeBlock::out, x);

    const int64_t grain =
        (outputs_per_piece(2 * ffn, dim, threads_) / 2 + kLanes - 1) / kLanes * kLanes;
    for_pieces(ffn, grain, [&](int64_t group, int64_t begin, int64_t end, int worker) {
      const T* in = normalized(x + group * rows_ * dim, blocks[group].ffn_scale, group, worker);
      const T* gate = static_cast<const T*>(blocks[group].gate_up);
      T* y = hidden_.get() + group * rows_ * ffn;
      for (; begin < end; begin += kLanes) {
        gated(in, gate, begin, std::min(kLanes, end - begin), y);
      }
    });
    add_products(hidden_.get(), ffn, blocks, &DecodeBlock::down, x);
  }

  // Attention head h of all of a sequence's new rows.
  void attend(const DecodeBlock& block, int64_t group, int64_t sequence, int64_t h, int worker) {
    const int64_t size = p_.head_dim, ld = p_.slot_stride, pitch = reach_ + kRows;
    const int64_t offset = sequence * p_.capacity * ld + h / (p_.n_queries / p_.n_keys) * size;
    const float *keys = block.keys + offset, *values = block.values + offset;
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    float* scores = scores_.get() + worker * kOutputs * pitch;
    for (int64_t s = 0; s < p_.rows; s += kOutputs) {
      const int64_t count = std::min<int64_t>(kOutputs, p_.rows - s);
      const int64_t row = (group * p_.batch + sequence) * p_.rows + s;
      const float* query = queries_.get() + row * width_ + h * size;
      const int64_t seen = p_.start[sequence] + s + count;  // slots that the last of them sees
      for_row_tiles(seen, [&](int64_t t, auto tile) {
        float sums[kOutputs][kRows];
        dots<tile>(keys + t * ld, ld, {query, count == 1 ? query : query + width_}, size, sums);
        for (int64_t j = 0; j < count; ++j) memcpy(scores + j * pitch + t, sums[j], sizeof sums[j]);
      });
      for (int64_t j = 0; j < count; ++j) {
        const int64_t n = seen - count + 1 + j;
        const float sum = exponentials(scores + j * pitch, n, scale);
        weighted_sum(scores + j * pitch, n, values, ld, size, 1.0f / sum,
                     attended_.get() + (row + j) * width_ + h * size);
      }
    }
  }

  // Units [o, o + count), at most kLanes, of the feed-forward's hidden layer: y[., o] and on.
  void gated(const T* x, const T* gate_up, int64_t o, int64_t count, T* y) {
    const int64_t dim = p_.dim, ffn = p_.ffn_dim;
    float gates[kMaxDecodeRows][kLanes] = {}, ups[kMaxDecodeRows][kLanes] = {};
    for_row_tiles(rows_, [&](int64_t row, auto tile) {
      for (int64_t j = 0; j < count; ++j) {
        const T* gate = gate_up + (o + j) * dim;
        float sums[kOutputs][kRows];
        dots<tile>(x + row * dim, dim, {gate, gate + ffn * dim}, dim, sums);
        for (int r = 0; r < tile; ++r) {
          gates[row + r][j] = sums[0][r];
          ups[row + r][j] = sums[1][r];
        }
      }
    });
    for (int64_t r = 0; r < rows_; ++r) {
      const Vec gate = Vec::load(gates[r]), up = Vec::load(ups[r]);
      (gate * up / (Vec(1.0f) + exp(-gate))).store(y + r * ffn + o, count);
    }
  }

  // x += in (groups, rows, n) @ weight.T
  void add_products(const T* in, int64_t n, const DecodeBlock* blocks,
                    const void* DecodeBlock::* weight, float* x) {
    const int64_t dim = p_.dim;
    for_pieces(dim, outputs_per_piece(dim, n, threads_),
               [&](int64_t group, int64_t begin, int64_t end, int) {
                 float* y = x + group * rows_ * dim;
                 products(in + group * rows_ * n, rows_,
                          static_cast<const T*>(blocks[group].*weight), n, n, begin, end,
                          [&](int64_t r, int64_t o, float value) { y[r * dim + o] += value; });
               });
  }

  const DecodeParams& p_;
  const int threads_;
  const int64_t groups_, rows_, width_;
  const int64_t reach_;  // slots that any row sees, at most
  int64_t round_ = 0;
  const std::unique_ptr<float[]> queries_;          // (groups, rows, n_queries, head_dim)
  const std::unique_ptr<T[]> attended_;             // likewise
  const std::unique_ptr<T[]> hidden_;               // (groups, rows, ffn_dim)
  const std::unique_ptr<T[]> normalized_;           // (threads, rows, dim)
  const std::unique_ptr<int64_t[]> normalized_of_;  // (threads): which round and group that is
  const std::unique_ptr<float[]> head_;             // (threads, rows, head_dim)
  const std::unique_ptr<float[]> scores_;           // (threads, kOutputs, reach + kRows)
};

void finish_rows(const DecodeParams& p, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    float* x = p.x + r * p.dim;
    normalize(x, p.final_scale, p.dim, p.norm_eps, x);
  }
}

}  // namespace
}  // namespace MTP_SIMD

template <>
void decode_layers_run<SimdLevel::MTP_SIMD>(const DecodeParams& p, int threads) {
  using namespace MTP_SIMD;
  dispatch_dtype(p.dtype, [&](auto storage) {
    Step<decltype(storage)> step(p, threads, 1);
    const int64_t rows = p.batch * p.rows;
    for (int64_t i = 0; i < p.n_blocks; ++i) {
      if (i + 1 == p.n_blocks) memcpy(p.last_input, p.x, sizeof(float) * rows * p.dim);
      step.run(p.blocks + i, p.x);
    }
    finish_rows(p, rows);
  });
}

template <>
void decode_keys_values_run<SimdLevel::MTP_SIMD>(const DecodeParams& p, int threads) {
  using namespace MTP_SIMD;
  dispatch_dtype(p.dtype, [&](auto storage) {
    Step<decltype(storage)>(p, threads, p.n_blocks).store_keys_values(p.blocks, p.x);
  });
}

template <>
void decode_heads_run<SimdLevel::MTP_SIMD>(const DecodeParams& p, int threads) {
  using namespace MTP_SIMD;
  dispatch_dtype(p.dtype, [&](auto storage) {
    Step<decltype(storage)>(p, threads, p.n_blocks).read(p.blocks, p.x);
    finish_rows(p, p.n_blocks * p.batch);
  });
}

}  // namespace mtp
