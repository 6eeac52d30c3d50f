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
  Attention(const DecodeParams& params, int threads, int64_t abreast, int64_t halves)
      : p_(params),
        cache_(params, params.capacity),
        rows_(params.batch * params.rows),
        reach_(
            panels_of(*std::max_element(params.start, params.start + params.batch) + params.rows) *
            kPanel),
        together_(by_matrices<X>() && params.rows * reach_ <= kFew &&
                          abreast * params.batch * params.n_queries >= 2 * threads
                      ? 2
                      : 1),
        halves_(halves),
        queries_(*params.workspace, halves, abreast * rows_ * (params.n_queries / halves),
                 params.head_dim),
        attended_(*params.workspace, halves, abreast * rows_,
                  params.n_queries / halves * params.head_dim),
        rotated_(*params.workspace, threads, 1, params.head_dim),
        scores_(*params.workspace, threads, together_ * params.rows, reach_),
        weights_(*params.workspace, threads, together_ * params.rows, reach_),
        factors_(*params.workspace, threads, 1, together_ * params.rows),
        places_(*params.workspace, 1, 1, rows_) {
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t b = r / params.rows;
      places_.row(0, 0)[r] = {b, params.start[b] + r % params.rows};
    }
  }

  const Scratch<X>& attended() const { return attended_; }  // (halves; abreast, rows)
  int64_t products_of_a_group() const { return 2 * together_ * p_.rows * reach_ * p_.head_dim; }

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

  // Bias, norm and rotation of attention head h of a row; then to its place.
  void take(int worker, const DecodeBlock& block, int64_t b, int64_t h, int64_t row, float* x) {
    const int64_t size = p_.head_dim, half = size / 2;
    const auto [sequence, position] = places_.row(0, 0)[row];
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
    X* rotated = key < 0 ? query(b * rows_ + row, h) : rotated_.row(worker, 0);
    const float* cosine = p_.rope + position * 2 * size;  // of one half: the other has the same,
    const float* sine = cosine + size + half;             // and here the same negated
    for (int64_t i = 0, j = half; i < half; i += kLanes, j += kLanes) {
      const int64_t n = half - i;
      const Vec low = load_some(x + i, n), high = load_some(x + j, n);
      const Vec c = load_some(cosine + i, n), s = load_some(sine + i, n);
      store_some(low * c - high * s, rotated + i, n);
      store_some(high * c + low * s, rotated + j, n);
    }
    if (key < 0) return;
    X* y = cached(block, sequence, key) + place_in_panels<X>(position, 0, cache_.key_step);
    constexpr int64_t kPair = kDepth<X>;  // half of head_dim is whole, so pairs are
    for (int64_t i = 0; i < size; i += kPair, y += kPanel * kPair) {
      memcpy(y, rotated + i, kPair * sizeof(X));
    }
  }

  // Groups of attention heads that attend() takes, of each sequence, as many of each half.
  int64_t groups() const { return halves_ * groups_of_a_half(); }

  // A group of attention heads, all of a sequence's new rows. Row r sees `shared` + r positions.
  void attend(int worker, const DecodeBlock& block, int64_t b, int64_t sequence, int64_t group) {
    const int64_t size = p_.head_dim, row = (b * p_.batch + sequence) * p_.rows;
    const int64_t half = p_.n_queries / halves_, of_half = group % groups_of_a_half() * together_;
    const int64_t first = group / groups_of_a_half() * half + of_half;
    const int64_t count = std::min(together_, half - of_half);
    const float scale = 1.0f / std::sqrt(static_cast<float>(size));
    const int64_t shared = p_.start[sequence] + 1, seen = p_.start[sequence] + p_.rows;
    float* scores = scores_.row(worker, 0);
    X* weights = weights_.row(worker, 0);
    float* factors = factors_.row(worker, 0);
    const auto keys = [&](int64_t i) {
      return cached(block, sequence, (first + i) / (p_.n_queries / p_.n_keys));
    };
    const auto values = [&](int64_t i) { return keys(i) + cache_.values; };
    // Panels of head 0, of head 1, ...: n each, `step` apart.
    const auto in_turn = [=](int64_t n, int64_t step, const auto& x, const auto& from) {
      return [=, i = int64_t{0}, j = int64_t{0}](Panel<X, X>& panel) mutable {
        if (j == n) j = 0, ++i;
        if (i == count) return false;
        panel = {x(i), from(i) + j * step, i, j, 0};
        ++j;
        return true;
      };
    };
    panel_products<X, X>(p_.rows, half * queries_.ld, size,
                         in_turn(
                             panels_of(seen), cache_.key_step,
                             [&](int64_t i) { return query(row, first + i); }, keys),
                         [&](const Panel<X, X>& panel, int64_t r, Sums sums) {
                           float* to =
                               scores + (panel.block * p_.rows + r) * reach_ + panel.index * kPanel;
                           sums.first.store(to);
                           sums.second.store(to + kLanes);
                         });
    bool finite = true;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t r = 0; r < p_.rows; ++r) {
        const int64_t at = i * p_.rows + r;
        X* own = weights + at * reach_;
        factors[at] = 1.0f / exponentials(scores + at * reach_, shared + r, scale, own);
        std::fill(own + shared + r, own + padded<X>(seen), X{});
      }
      finite = finite && are_finite(values(i), shared, padded<X>(seen));
    }
    const auto sum_up = [&](const auto& from, int64_t begin, int64_t end) {  // of rows [begin, end)
      panel_products<X, X>(p_.rows, reach_, seen,
                           in_turn(
                               panels_of(size), cache_.value_step,
                               [&](int64_t i) { return weights + i * p_.rows * reach_; }, from),
                           [&](const Panel<X, X>& panel, int64_t r, Sums sums) {
                             if (r < begin || r >= end) return;
                             X* y = attended_.row(first / half, row + r) +
                                    (first % half + panel.block) * size + panel.index * kPanel;
                             const Vec factor(factors[panel.block * p_.rows + r]);
                             const int64_t n = size - panel.index * kPanel;
                             store_some(sums.first * factor, y, n);
                             if (n > kLanes)
                               store_some(sums.second * factor, y + kLanes, n - kLanes);
                           });
    };
    if (finite) return sum_up(values, 0, p_.rows);
    // The weight of what a row does not see is 0, but 0 * NaN is NaN.
    const int64_t all = panels_of(size) * cache_.value_step;  // of an attention head
    std::vector<X> visible(count * all);
    for (int64_t r = 0; r < p_.rows; ++r) {
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t o = 0; o < size; ++o) {
          for (int64_t t = 0; t < shared + r; ++t) {
            const int64_t place = place_in_panels<X>(o, t, cache_.value_step);
            visible[i * all + place] = values(i)[place];
          }
        }
      }
      sum_up([&](int64_t i) { return visible.data() + i * all; }, r, r + 1);
    }
  }

 private:
  // So many scores of an attention head leave room for another's in the nearest cache. Then two go
  // through each stage together, if no thread is left without: the processor's matrix unit falls
  // asleep between its stages.
  static constexpr int64_t kFew = 2048;

  int64_t groups_of_a_half() const { return (p_.n_queries / halves_ + together_ - 1) / together_; }

  // Query h of a row.
  X* query(int64_t row, int64_t h) const {
    const int64_t half = p_.n_queries / halves_;
    return queries_.row(h / half, row * half + h % half);
  }

  struct Place {
    int64_t sequence, position;
  };

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
  const int64_t together_;        // attention heads of a group, the last maybe fewer
  const int64_t halves_;          // 2 where threads take a half each of the heads
  const Scratch<X> queries_;      // (halves; abreast, rows, n_queries / halves) of head_dim
  const Scratch<X> attended_;     // (halves; abreast, rows) of n_queries / halves * head_dim
  const Scratch<X> rotated_;      // (threads) of head_dim: a key
  const Scratch<float> scores_;   // (threads; together, rows of a sequence) of reach
  const Scratch<X> weights_;      // likewise
  const Scratch<float> factors_;  // (threads) of together * rows of a sequence
  const Scratch<Place> places_;   // (1) of rows
};

}  // namespace MTP_SIMD
}  // namespace mtp
