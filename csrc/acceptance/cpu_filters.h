// The histograms of the filters (filters.h) on the CPU. Tiles whose maximum lies below the range
// are never read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>

#include "acceptance/cpu_row.h"
#include "acceptance/filters.h"

namespace mtp {
namespace MTP_SIMD {

struct Bins {
  static constexpr int kMax = 2048;
  uint32_t count[kMax];
  uint64_t mass[kMax];

  // Only the first `bins` are ever touched: small vocabularies should not pay for all of them.
  void clear(int bins) {
    memset(count, 0, bins * sizeof count[0]);
    memset(mass, 0, bins * sizeof mass[0]);
  }
  void add(const Bins& other, int bins) {
    for (int i = 0; i < bins; ++i) count[i] += other.count[i];
    for (int i = 0; i < bins; ++i) mass[i] += other.mass[i];
  }
};

template <class T>
class Histogram {
 public:
  explicit Histogram(const Distribution<T>& d) : d_(d) {}

  // Few logits, few bins: emptying and walking them would cost more than the logits do.
  int max_bins() const {
    return static_cast<int>(std::clamp<int64_t>(d_.tiles.vocab, 64, Bins::kMax));
  }

  void fill(const KeyRange& range, Measure measure) {
    filled_ = range.bins;
    bins_.clear(filled_);
    if (d_.tiles.threads == 1) {
      add_tiles(bins_, range, measure, 0, d_.tiles.count);
      return;
    }
    std::mutex adding;
    d_.tiles.for_ranges([&](int first, int last) {
      Bins mine;
      mine.clear(filled_);
      add_tiles(mine, range, measure, first, last);
      const std::lock_guard<std::mutex> lock(adding);
      bins_.add(mine, filled_);
    });
  }

  uint64_t mass() const {
    uint64_t all = 0;
    for (int i = 0; i < filled_; ++i) all += bins_.mass[i];
    return all;
  }

  Crossing cross(const KeyRange& range, Measure measure, uint64_t target) const {
    uint64_t before = 0;
    for (int i = 0; i < range.bins; ++i) {
      const uint64_t here = measure == Measure::kMass ? bins_.mass[i] : bins_.count[i];
      if (before + here >= target && bins_.count[i] > 0) return {i, before, here, bins_.count[i]};
      before += here;
    }
    return {range.bins, before, 0, 0};
  }

  float kth_largest_tile_max(int64_t k) const {
    const int count = d_.tiles.count;
    if (k > count) return -kInfinity;
    float tops[kMaxTiles];
    std::copy(d_.scratch.max, d_.scratch.max + count, tops);
    std::nth_element(tops, tops + (k - 1), tops + count, std::greater<float>());
    return tops[k - 1];
  }

  int64_t nth_equal(float z, uint64_t n) const {
    for (int tile = 0; tile < d_.tiles.count; ++tile) {
      if (d_.scratch.max[tile] < z) continue;
      const int64_t end = d_.tiles.end(tile);
      for (int64_t i = d_.tiles.begin(tile); i < end; i += Vec::kLanes) {
        uint32_t equal = equal_lanes(load_clean(d_.row + i, end - i), Vec(z));
        for (; equal != 0; equal &= equal - 1) {
          if (--n == 0) return i + __builtin_ctz(equal);
        }
      }
    }
    return d_.tiles.vocab;
  }

 private:
  void add_tiles(Bins& bins, const KeyRange& range, Measure measure, int first, int last) const {
    const typename Distribution<T>::Weight weight(d_);
    const float low = from_order_key<T>(range.low);
    for (int tile = first; tile < last; ++tile) {
      if (d_.scratch.max[tile] < low) continue;
      const int64_t end = d_.tiles.end(tile);
      for (int64_t i = d_.tiles.begin(tile); i < end; i += Vec::kLanes) {
        const int64_t n = std::min<int64_t>(end - i, Vec::kLanes);
        const Vec z = load_clean(d_.row + i, n) + Vec(0.0f);  // -0 becomes 0
        const Vec below = select_less(z, max(Vec(low), d_.floor_at(i)), Vec(0.0f), Vec(1.0f));
        uint32_t kept = equal_lanes(below, Vec(1.0f));
        if (kept == 0) continue;
        float logits[Vec::kLanes], weights[Vec::kLanes];
        z.store(logits);
        if (measure == Measure::kMass) weight(i, n).store(weights);
        for (; kept != 0; kept &= kept - 1) {
          const int k = __builtin_ctz(kept);
          const uint32_t key = order_key<T>(logits[k]);
          if (key > range.high) continue;
          const int bin = range.bin_of(key);
          ++bins.count[bin];
          if (measure == Measure::kMass) {
            bins.mass[bin] += static_cast<uint64_t>(weights[k] * kMassUnits);
          }
        }
      }
    }
  }

  const Distribution<T>& d_;
  Bins bins_;
  int filled_ = 0;
};

}  // namespace MTP_SIMD
}  // namespace mtp
