// One row of logits as a distribution, on the CPU: its maximum, its weights exp((z - max) / T), the
// sums of them and the draw of an id by inverse CDF.
//
// Every sum is made within a tile (math.h) and then over tiles in order, so results do not depend
// on how tiles fall to threads. The maxima and sums of the tiles also let later passes skip tiles:
// the search for an id reads one.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>

#include "acceptance/math.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace mtp {
namespace MTP_SIMD {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A row's tiles, and how many threads walk them.
struct Tiles : Tiling {
  int threads;

  Tiles(int64_t vocab, int threads) : Tiling(vocab), threads(threads) {}

  // f(first tile, one past the last) for pieces of the row.
  template <class F>
  void for_ranges(const F& f) const {
    const int64_t grain = threads > 1 ? (count + threads - 1) / threads : count;
    parallel_for(threads, count, grain, [&](int64_t first, int64_t last) {
      f(static_cast<int>(first), static_cast<int>(last));
    });
  }
};

// Up to kLanes logits from z on, -inf past n.
template <class T>
Vec load_raw(const T* z, int64_t n) {
  return n < Vec::kLanes ? Vec::load(z, n, Vec(-kInfinity)) : Vec::load(z);
}

// The same without NaN and +inf.
template <class T>
Vec load_clean(const T* z, int64_t n) {
  return min(max(load_raw(z, n), Vec(-kInfinity)), Vec(kLargest<T>));
}

template <class T>
float clean_max(const T* z, int64_t n) {
  constexpr int kUnroll = 4;
  Vec top[kUnroll];
  for (Vec& lanes : top) lanes = Vec(-kInfinity);
  int64_t i = 0;
  for (; i + kUnroll * Vec::kLanes <= n; i += kUnroll * Vec::kLanes) {
    // max(NaN, x) is x.
    for (int k = 0; k < kUnroll; ++k) top[k] = max(Vec::load(z + i + k * Vec::kLanes), top[k]);
  }
  for (; i < n; i += Vec::kLanes) top[0] = max(load_clean(z + i, n - i), top[0]);
  return std::min(max(max(top[0], top[1]), max(top[2], top[3])).hmax(), kLargest<T>);
}

inline float tile_max(const float* z, int64_t n) { return clean_max(z, n); }

// 16-bit floats compare as integers once the bits of negative numbers are flipped: twice as many to
// a vector, and nothing to widen. In the compilers' own vectors, which every level has.
using Keys = int16_t __attribute__((vector_size(4 * Vec::kLanes), aligned(2), may_alias));

template <class K>
K flip_negative(K bits) {
  return static_cast<K>(bits ^ ((bits >> 15) & 0x7fff));
}

template <class T>
float tile_max(const T* z, int64_t n) {
  static_assert(sizeof(T) == sizeof(int16_t), "16-bit storage");
  constexpr int kUnroll = 4, kLanes = 2 * Vec::kLanes;
  constexpr int16_t kLowest = std::numeric_limits<int16_t>::min();
  Keys top[kUnroll];
  for (Keys& lanes : top) lanes = Keys{} + kLowest;
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= n; i += kUnroll * kLanes) {
    for (int k = 0; k < kUnroll; ++k) {
      const Keys key = flip_negative(*reinterpret_cast<const Keys*>(z + i + k * kLanes));
      top[k] = key > top[k] ? key : top[k];
    }
  }
  top[0] = top[0] > top[1] ? top[0] : top[1];
  top[2] = top[2] > top[3] ? top[2] : top[3];
  top[0] = top[0] > top[2] ? top[0] : top[2];
  int16_t best = kLowest;
  for (int k = 0; k < kLanes; ++k) best = std::max<int16_t>(best, top[0][k]);
  for (; i < n; ++i) best = std::max(best, flip_negative(static_cast<int16_t>(z[i].bits)));
  const float value = to_float(T{static_cast<uint16_t>(flip_negative(best))});
  // Infinite or NaN: NaN sorts beyond the infinities and may hide what is finite.
  return std::abs(value) <= kLargest<T> ? value : clean_max(z, n);
}

// Sum of weight(i, n) over [begin, end), n the number of lanes that count.
template <class F>
float sum_of_weights(int64_t begin, int64_t end, const F& weight) {
  constexpr int kUnroll = 4;
  Vec sum[kUnroll];
  for (Vec& lanes : sum) lanes = Vec(0.0f);
  int64_t i = begin;
  for (; i + kUnroll * Vec::kLanes <= end; i += kUnroll * Vec::kLanes) {
    for (int k = 0; k < kUnroll; ++k) {
      sum[k] = sum[k] + weight(i + k * Vec::kLanes, int64_t{Vec::kLanes});
    }
  }
  for (; i < end; i += Vec::kLanes) {
    sum[0] = sum[0] + weight(i, std::min<int64_t>(end - i, Vec::kLanes));
  }
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])).hsum();
}

inline double sum_in_order(const float* values, int count) {
  double total = 0.0;
  for (int i = 0; i < count; ++i) total += values[i];
  return total;
}

// The first id at which the running sum of weights exceeds u times the whole, by tile sums first
// and then within the tile; where rounding leaves the tile's end short, its last id of positive
// weight. -1: all weights are 0.
template <class F>
int64_t pick(const Tiles& tiles, const float* tile_sum, double u, const F& weight) {
  const double target = u * sum_in_order(tile_sum, tiles.count);
  double before = 0.0, sought = 0.0;
  int chosen = -1;
  for (int b = 0; b < tiles.count; ++b) {
    if (tile_sum[b] <= 0.0f) continue;
    chosen = b;
    sought = target - before;
    before += tile_sum[b];
    if (before > target) break;
  }
  if (chosen < 0) return -1;
  int64_t last = -1;
  double running = 0.0;
  for (int64_t i = tiles.begin(chosen); i < tiles.end(chosen); i += Vec::kLanes) {
    const int64_t n = std::min<int64_t>(tiles.end(chosen) - i, Vec::kLanes);
    float lanes[Vec::kLanes];
    weight(i, n).store(lanes);
    for (int k = 0; k < n; ++k) {
      if (lanes[k] <= 0.0f) continue;
      last = i + k;
      running += lanes[k];
      if (running > sought) return last;
    }
  }
  return last;
}

// One row as a distribution. What a filter keeps is a prefix of the ids in order of falling logit
// and, among equals, rising id: all above `floor`, and of those at it the ids up to `last_tie`.
template <class T>
struct Distribution {
  using Storage = T;
  const T* row = nullptr;  // (vocab)
  Tiles tiles;
  TileScratch& scratch;
  float max = -kInfinity;
  float scale = 1.0f;  // log2(e) / temperature
  double total = 0.0;  // sum of all weights
  float floor = -kInfinity;
  int64_t last_tie;

  Distribution(const Tiles& tiles, TileScratch& scratch)
      : tiles(tiles), scratch(scratch), last_tie(tiles.vocab) {}

  // Reads the row: its maximum and, where asked for, the sums of its weights. False: no logit is
  // finite.
  bool read(const T* logits, double temperature, bool with_sums) {
    row = logits;
    floor = -kInfinity;
    last_tie = tiles.vocab;
    scale = exponent_scale(temperature);
    tiles.for_ranges([&](int first, int last) {
      for (int b = first; b < last; ++b) {
        const int64_t begin = tiles.begin(b), end = tiles.end(b);
        const float top = scratch.max[b] = tile_max(row + begin, end - begin);
        if (!with_sums) continue;
        // Relative to the tile's own maximum, while the tile is in the nearest cache.
        scratch.sum[b] = top == -kInfinity ? 0.0f : sum_of_weights(begin, end, Weight{*this, top});
      }
    });
    max = clean_max(scratch.max, tiles.count);
    if (max == -kInfinity) return false;
    if (with_sums) {
      for (int b = 0; b < tiles.count; b += Vec::kLanes) {
        const int64_t n = std::min<int64_t>(tiles.count - b, Vec::kLanes);
        const Vec top = Vec::load(scratch.max + b, n, Vec(-kInfinity));
        const Vec sum = Vec::load(scratch.sum + b, n, Vec(0.0f));
        (sum * exp2_of_nonpositive((top - Vec(max)) * Vec(scale))).store(scratch.sum + b, n);
      }
      total = sum_in_order(scratch.sum, tiles.count);
    }
    return true;
  }

  int64_t argmax() const {
    const Vec top(max);
    int tile = 0;
    while (scratch.max[tile] != max) ++tile;
    int64_t i = tiles.begin(tile);
    for (;; i += Vec::kLanes) {
      const uint32_t equal = equal_lanes(load_clean(row + i, tiles.vocab - i), top);
      if (equal != 0) return i + __builtin_ctz(equal);
    }
  }

  bool filtered() const { return floor > -kInfinity; }

  // What logits of ids from i on must reach to be kept: one step more past the last tie.
  Vec floor_at(int64_t i) const {
    if (i + Vec::kLanes - 1 <= last_tie) return Vec(floor);
    const float above = std::nextafter(floor, kInfinity);
    if (i > last_tie) return Vec(above);
    float lanes[Vec::kLanes];
    for (int k = 0; k < Vec::kLanes; ++k) lanes[k] = i + k <= last_tie ? floor : above;
    return Vec::load(lanes);
  }

  // Weights of the unfiltered row, relative to `top`.
  struct Weight {
    const Distribution& d;
    Vec top, scale;
    Weight(const Distribution& d, float top) : d(d), top(top), scale(d.scale) {}
    explicit Weight(const Distribution& d) : Weight(d, d.max) {}
    Vec operator()(int64_t i, int64_t n) const {
      return exp2_of_nonpositive((load_raw(d.row + i, n) - top) * scale);
    }
  };

  struct FilteredWeight {
    const Distribution& d;
    Vec top, scale;
    explicit FilteredWeight(const Distribution& d) : d(d), top(d.max), scale(d.scale) {}
    Vec operator()(int64_t i, int64_t n) const {
      const Vec z = load_clean(d.row + i, n);
      return select_less(z, d.floor_at(i), Vec(0.0f), exp2_of_nonpositive((z - top) * scale));
    }
  };

  // f(weight) with the weights as they are after the filters.
  template <class F>
  auto with_weight(const F& f) const {
    return filtered() ? f(FilteredWeight(*this)) : f(Weight(*this));
  }

  // Sums of what the filter left.
  void sum_kept() {
    const FilteredWeight weight(*this);
    tiles.for_ranges([&](int first, int last) {
      for (int b = first; b < last; ++b) {
        scratch.sum[b] =
            scratch.max[b] < floor ? 0.0f : sum_of_weights(tiles.begin(b), tiles.end(b), weight);
      }
    });
    total = sum_in_order(scratch.sum, tiles.count);
  }

  double probability(int64_t id) const {
    float lanes[Vec::kLanes];
    with_weight([&](const auto& weight) {
      weight(id, 1).store(lanes);
      return 0;
    });
    return lanes[0] / total;
  }
};

}  // namespace MTP_SIMD
}  // namespace mtp
