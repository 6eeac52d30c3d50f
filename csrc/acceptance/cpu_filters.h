// Top-k, top-p and min-p on the CPU, exact and without a sort: each becomes the smallest logit that
// is kept (and, where some of its equals are not, the last id of them that is).
//
// The threshold is where a count or a mass, summed from the largest logit down, reaches its target.
// Histograms over the integer order of the logits find it: one over a range that is known to hold
// it, then ever narrower ones over the bin where the target was reached. Blocks whose maximum lies
// below the range are never read. Masses are integers in units of 2^-40 of the largest weight, so
// their sums do not depend on the order of addition.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>

#include "acceptance/cpu_row.h"
#include "acceptance/math.h"
#include "acceptance/params.h"

namespace mtp {
namespace MTP_SIMD {

struct Histogram {
  static constexpr int kBins = 2048;
  uint32_t count[kBins];
  uint64_t mass[kBins];

  // Only the first `bins` are ever touched: small vocabularies should not pay for all of them.
  void clear(int bins) {
    memset(count, 0, bins * sizeof count[0]);
    memset(mass, 0, bins * sizeof mass[0]);
  }
  void add(const Histogram& other, int bins) {
    for (int i = 0; i < bins; ++i) count[i] += other.count[i];
    for (int i = 0; i < bins; ++i) mass[i] += other.mass[i];
  }
};

template <class T>
class Filters {
 public:
  explicit Filters(Distribution<T>& d) : d_(d) {}

  // Whether any filter would drop something.
  static bool any(const SamplingParams& sampling, int64_t b, int64_t vocab) {
    return needs_top_k(sampling.top_k[b], vocab) || sampling.top_p[b] < 1.0 ||
           sampling.min_p[b] > 0.0;
  }
  static bool needs_top_k(int64_t top_k, int64_t vocab) { return top_k > 0 && top_k < vocab; }

  // The row has been read; with its sums, unless top-k is on.
  void apply(const SamplingParams& sampling, int64_t b) {
    if (needs_top_k(sampling.top_k[b], d_.blocks.vocab)) top_k(sampling.top_k[b]);
    if (sampling.top_p[b] < 1.0) top_p(sampling.top_p[b]);
    if (sampling.min_p[b] > 0.0) min_p(sampling.min_p[b]);
    if (d_.filtered()) d_.sum_kept();
  }

 private:
  static constexpr float kMassUnits = 0x1p40f;

  void top_k(int64_t k) {
    const uint64_t target = static_cast<uint64_t>(k);
    keep_until(kth_largest_block_max(k), kCount, [&](const Histogram&, int) { return target; });
  }

  void top_p(double p) {
    if (d_.filtered()) {  // by top-k: the whole mass is what the first histogram holds
      keep_until(d_.floor, kMass, [&](const Histogram& h, int bins) {
        uint64_t all = 0;
        for (int i = 0; i < bins; ++i) all += h.mass[i];
        return static_cast<uint64_t>(std::ceil(p * static_cast<double>(all)));
      });
      return;
    }
    // Logits below this weigh less than 1 - p together, even if there were V of its weight.
    const double weight = (1.0 - p) * d_.total / static_cast<double>(d_.blocks.vocab);
    const float low = static_cast<float>(d_.max + std::log2(weight) / d_.scale);
    const uint64_t target = static_cast<uint64_t>(std::ceil(p * d_.total * kMassUnits));
    keep_until(low, kMass, [&](const Histogram&, int) { return target; });
  }

  void min_p(double p) {
    const float floor = static_cast<float>(d_.max + std::log2(p) / d_.scale);
    if (floor <= d_.floor) return;
    d_.floor = floor;
    d_.last_tie = d_.blocks.vocab;
  }

  enum Measure { kCount, kMass };

  // At least k logits reach it, if there are so many blocks.
  float kth_largest_block_max(int64_t k) const {
    const int count = d_.blocks.count;
    if (k > count) return -kInfinity;
    float tops[kMaxBlocks];
    std::copy(d_.scratch.max, d_.scratch.max + count, tops);
    std::nth_element(tops, tops + (k - 1), tops + count, std::greater<float>());
    return tops[k - 1];
  }

  // Narrows the filter to the shortest prefix whose measure reaches target_of(first histogram,
  // bins). All of the prefix lies at `low` or above.
  template <class F>
  void keep_until(float low, Measure measure, const F& target_of) {
    uint32_t low_key = order_key<T>(std::max(low, -kLargest<T>) + 0.0f);
    uint32_t high_key = order_key<T>(d_.max + 0.0f);
    // Few logits, few bins: emptying and walking them would cost more than the logits do.
    const auto max_bins =
        static_cast<uint32_t>(std::clamp<int64_t>(d_.blocks.vocab, 64, Histogram::kBins));
    uint64_t above = 0, target = 0;
    for (bool first = true;; first = false) {
      int shift = 0;
      while ((high_key - low_key) >> shift >= max_bins) ++shift;
      const int bins = static_cast<int>((high_key - low_key) >> shift) + 1;
      Histogram h;
      fill(h, bins, low_key, high_key, shift, measure);
      if (first) target = target_of(h, bins);
      int bin = 0;
      uint64_t here = 0;
      for (; bin < bins; ++bin) {
        here = measure == kMass ? h.mass[bin] : h.count[bin];
        if (above + here >= target && h.count[bin] > 0) break;
        above += here;
      }
      if (bin == bins) {  // fewer than k are finite, or rounding keeps the mass below 1
        d_.floor = std::max(d_.floor, -kLargest<T>);
        return;
      }
      if (shift == 0) {
        // All logits of the bin are equal, and so are their masses.
        const uint64_t ties = h.count[bin];
        uint64_t kept = target - above;
        if (measure == kMass && here > 0) {
          const uint64_t each = here / ties;
          kept = (target - above + each - 1) / each;
        }
        keep_ties(from_order_key<T>(high_key - static_cast<uint32_t>(bin)),
                  std::max<uint64_t>(kept, 1), ties);
        return;
      }
      high_key -= static_cast<uint32_t>(bin) << shift;
      low_key = high_key - std::min(high_key - low_key, (1u << shift) - 1);
    }
  }

  // Ends the filter at the `kept`th of the `ties` logits that equal z and are not dropped yet.
  void keep_ties(float z, uint64_t kept, uint64_t ties) {
    if (kept >= ties) {
      if (z > d_.floor) d_.last_tie = d_.blocks.vocab;
      d_.floor = z;
      return;
    }
    d_.floor = z;
    for (int b = 0; b < d_.blocks.count; ++b) {
      if (d_.scratch.max[b] < z) continue;
      for (int64_t i = d_.blocks.begin(b); i < d_.blocks.end(b); i += Vec::kLanes) {
        uint32_t equal = equal_lanes(load_clean(d_.row + i, d_.blocks.end(b) - i), Vec(z));
        for (; equal != 0; equal &= equal - 1) {
          d_.last_tie = i + __builtin_ctz(equal);
          if (--kept == 0) return;
        }
      }
    }
  }

  // Counts (and masses) of the kept logits with keys in [low_key, high_key], the largest in bin 0.
  void fill(Histogram& h, int bins, uint32_t low_key, uint32_t high_key, int shift,
            Measure measure) const {
    const float low = from_order_key<T>(low_key);
    h.clear(bins);
    if (d_.blocks.threads == 1) {
      fill_from_blocks(h, low, high_key, shift, measure, 0, d_.blocks.count);
      return;
    }
    std::mutex adding;
    d_.blocks.for_ranges([&](int first, int last) {
      Histogram mine;
      mine.clear(bins);
      fill_from_blocks(mine, low, high_key, shift, measure, first, last);
      const std::lock_guard<std::mutex> lock(adding);
      h.add(mine, bins);
    });
  }

  void fill_from_blocks(Histogram& h, float low, uint32_t high_key, int shift, Measure measure,
                        int first, int last) const {
    const typename Distribution<T>::Weight weight(d_);
    for (int b = first; b < last; ++b) {
      if (d_.scratch.max[b] < low) continue;
      for (int64_t i = d_.blocks.begin(b); i < d_.blocks.end(b); i += Vec::kLanes) {
        const int64_t n = std::min<int64_t>(d_.blocks.end(b) - i, Vec::kLanes);
        const Vec z = load_clean(d_.row + i, n) + Vec(0.0f);  // -0 becomes 0
        const Vec below = select_less(z, max(Vec(low), d_.floor_at(i)), Vec(0.0f), Vec(1.0f));
        uint32_t kept = equal_lanes(below, Vec(1.0f));
        if (kept == 0) continue;
        float logits[Vec::kLanes], weights[Vec::kLanes];
        z.store(logits);
        if (measure == kMass) weight(i, n).store(weights);
        for (; kept != 0; kept &= kept - 1) {
          const int k = __builtin_ctz(kept);
          const uint32_t key = order_key<T>(logits[k]);
          if (key > high_key) continue;
          const uint32_t bin = (high_key - key) >> shift;
          ++h.count[bin];
          if (measure == kMass) h.mass[bin] += static_cast<uint64_t>(weights[k] * kMassUnits);
        }
      }
    }
  }

  Distribution<T>& d_;
};

}  // namespace MTP_SIMD
}  // namespace mtp
