// Attention of a block's new rows: from the products with qkv to the rows that go into `out`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/scratch.h"
#include "decode_layers/packed.h"
#include "decode_layers/params.h"
#include "decode_layers/rows.h"

namespace mtp {
namespace MTP_SIMD {

// Of `abreast` blocks at a time, by threads that are numbered. X: see panels.h.
template <class X>
class Attention {
 public:
  Attention(const DecodeParams& params, int threads, int64_t abreast)
      : p_(params),
        cache_(params, params.capacity),
        rows_(params.batch * params.rows),
        reach_(
            panels_of(*std::max_element(params.start, params.start + params.batch) + params.rows) *
            kPanel),
        queries_(abreast * rows_ * params.n_queries, params.head_dim),
        attended_(abreast * rows_, params.n_queries * params.head_dim),
        converted_(threads, params.head_dim),
        scores_(threads * params.rows, reach_),
        weights_(threads * params.rows, reach_),
        factors_(threads, params.rows) {}

  const Scratch<X>& attended() const { return attended_; }  // (abreast, rows)
  int64_t products_of_a_head() const { return 2 * p_.rows * reach_ * p_.head_dim; }

  // Fetches the lines of the cache that take() will write of attention head h: they are elsewhere.
  void prepare(const DecodeBlock& block, int64_t h) const {
    const int64_t key = h - p_.n_queries, value = key - p_.n_keys;
    if (key < 0) return;
    for (int64_t sequence = 0; sequence < p_.batch; ++sequence) {
      const int64_t first = p_.start[sequence], last = first + p_.rows - 1;
      const X* keys = cached(block, sequence, value < 0 ? key : value);
      if (value < 0) {
        for (int64_t position = first;; position = std::min(position + kLanes, last)) {
          for (int64_t i = 0; i < p_.head_dim; i += kDepth<X>) {
            prefetch_to_write(keys + place_in_panels<X>(position, i, cache_.key_step));
          }
          if (position == last) break;
        }
      } else {
        for (int64_t position = first; position < last + kDepth<X>; position += kDepth<X>) {
          for (int64_t i = 0; i < p_.head_dim; i += kLanes) {
            prefetch_to_write(keys + cache_.values +
                              place_in_panels<X>(i, position, cache_.value_step));
          }
        }
      }
    }
  }

  // Bias, norm and rotation of attention head h of a sequence's row r; then to its place.
  void take(int worker, const DecodeBlock& block, int64_t b, int64_t h, int64_t sequence, int64_t r,
            float* x) {
    const int64_t size = p_.head_dim, half = size / 2, position = p_.start[sequence] + r;
    const int64_t key = h - p_.n_queries, value = key - p_.n_keys;
    if (block.qkv_bias != nullptr) {
      for (int64_t i = 0; i < size; ++i) x[i] += block.qkv_bias[h * size + i];
    }
    if (value >= 0) {
      X* values = cached(block, sequence, value) + cache_.values;
      for (int64_t i = 0; i < size; i += kLanes) {
        X* y = values + place_in_panels<X>(i, position, cache_.value_step);
        store_input(load_some(x + i, size - i), y);
      }
      return;
    }
    const float* scale = key < 0 ? block.query_scale : block.key_scale;
    if (scale != nullptr) normalize(x, scale, size, p_.norm_eps, x);
    const float* cosine = p_.rope + position * 2 * size;
    const float* sine = cosine + size;
    for (int64_t i = 0, j = half; i < half; i += kLanes, j += kLanes) {
      const int64_t n = half - i;
      const Vec low = load_some(x + i, n), high = load_some(x + j, n);
      store_some(low * load_some(cosine + i, n) + high * load_some(sine + i, n), x + i, n);
      store_some(high * load_some(cosine + j, n) + low * load_some(sine + j, n), x + j, n);
    }
    if (key < 0) {
      const int64_t row = (b * p_.batch + sequence) * p_.rows + r;
      convert(x, size, queries_.row(row * p_.n_queries + h));
      return;
    }
    X* converted = converted_.row(worker);
    convert(x, size, converted);
    X* y = cached(block, sequence, key) + place_in_panels<X>(position, 0, cache_.key_step);
    constexpr int64_t kPair = kDepth<X>;  // half of head_dim is whole, so pairs are
    for (int64_t i = 0; i < size; i += kPair, y += kPanel * kPair) {
      memcpy(y, converted + i, kPair * sizeof(X));
    }
  }

  // Attention head h of all of a sequence's new rows. Row r sees `shared` + r positions.
  void attend(int worker, const DecodeBlock& block, int64_t b, int64_t sequence, int64_t h) {
    const int64_t size = p_.head_dim, row = (b * p_.batch + sequence) * p_.rows;
    const X* keys = cached(block, sequence, h / (p_.n_queries / p_.n_keys));
    const X* values = keys + cache_.values;
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    const int64_t shared = p_.start[sequence] + 1, seen = p_.start[sequence] + p_.rows;
    float* scores = scores_.row(worker * p_.rows);
    X* weights = weights_.row(worker * p_.rows);
    float* factors = factors_.row(worker);
    const auto one_by_one = [](const X* x, const X* from, int64_t step, int64_t n) {
      return [=, i = int64_t{0}](Panel<X, X>& panel) mutable {
        panel = {x, from + i * step, 0, i};
        return i++ < n;
      };
    };
    panel_products<X, X>(
        p_.rows, p_.n_queries * queries_.ld, size,
        one_by_one(queries_.row(row * p_.n_queries + h), keys, cache_.key_step, panels_of(seen)),
        [&](const Panel<X, X>& panel, int64_t r, Sums sums) {
          float* to = scores + r * reach_ + panel.index * kPanel;
          sums.first.store(to);
          sums.second.store(to + kLanes);
        });
    for (int64_t r = 0; r < p_.rows; ++r) {
      X* own = weights + r * reach_;
      factors[r] = 1.0f / exponentials(scores + r * reach_, shared + r, scale, own);
      std::fill(own + shared + r, own + padded<X>(seen), X{});
    }
    const auto sum_up = [&](const X* from, int64_t first, int64_t last) {  // of rows [first, last)
      panel_products<X, X>(p_.rows, reach_, seen,
                           one_by_one(weights, from, cache_.value_step, panels_of(size)),
                           [&](const Panel<X, X>& panel, int64_t r, Sums sums) {
                             if (r < first || r >= last) return;
                             X* y = attended_.row(row + r) + h * size + panel.index * kPanel;
                             const Vec factor(factors[r]);
                             const int64_t n = size - panel.index * kPanel;
                             store_some(sums.first * factor, y, n);
                             if (n > kLanes)
                               store_some(sums.second * factor, y + kLanes, n - kLanes);
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

 private:
  // A sequence's keys and values of one attention head.
  X* cached(const DecodeBlock& block, int64_t sequence, int64_t h) const {
    return static_cast<X*>(p_.cache) +
           (sequence * p_.n_blocks + (&block - p_.blocks)) * cache_.size + h * cache_.head;
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

  const DecodeParams& p_;
  const CacheLayout<X> cache_;
  const int64_t rows_;
  const int64_t reach_;           // positions that any row sees, at most, in whole panels
  const Scratch<X> queries_;      // (abreast, rows, n_queries) rows of head_dim
  const Scratch<X> attended_;     // (abreast, rows) of n_queries * head_dim
  const Scratch<X> converted_;    // (threads) of head_dim
  const Scratch<float> scores_;   // (threads, rows of a sequence) of reach
  const Scratch<X> weights_;      // likewise
  const Scratch<float> factors_;  // (threads) of rows of a sequence
};

}  // namespace MTP_SIMD
}  // namespace mtp
