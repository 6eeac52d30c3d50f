// Top-k, top-p and min-p, exact and without a sort: each becomes the smallest logit that is kept
// (and, where some of its equals are not, the last id of them that is).
//
// The threshold is where a count or a mass, summed from the largest logit down, reaches its target.
// Histograms over the integer order of the logits find it: one over a range that is known to hold
// it, then ever narrower ones over the bin where the target was reached. Masses are integers in
// units of 2^-40 of the largest weight, so their sums do not depend on the order of addition.
#pragma once

#include <cmath>
#include <cstdint>

#include "acceptance/math.h"
#include "acceptance/params.h"
#include "common/macros.h"

namespace mtp {

enum class Measure { kCount, kMass };
constexpr float kMassUnits = 0x1p40f;

// Bins of 2^shift order keys each, bin 0 at `high`.
struct KeyRange {
  uint32_t low, high;
  int shift, bins;

  MTP_HD KeyRange(uint32_t low, uint32_t high, int max_bins) : low(low), high(high), shift(0) {
    while ((high - low) >> shift >= static_cast<uint32_t>(max_bins)) ++shift;
    bins = static_cast<int>((high - low) >> shift) + 1;
  }
  MTP_HD int bin_of(uint32_t key) const { return static_cast<int>((high - key) >> shift); }
};

// The first bin that is not empty and at which the running sum reaches a target; `bins` if none.
struct Crossing {
  int bin;
  uint64_t before, here;  // measure of the bins before it, and its own
  uint64_t logits;        // in it
};

// Whether any filter would drop something.
MTP_HD inline bool needs_top_k(const SamplingParams& sampling, int64_t b, int64_t vocab) {
  return sampling.top_k[b] > 0 && sampling.top_k[b] < vocab;
}
MTP_HD inline bool needs_filters(const SamplingParams& sampling, int64_t b, int64_t vocab) {
  return needs_top_k(sampling, b, vocab) || sampling.top_p[b] < 1.0 || sampling.min_p[b] > 0.0;
}

// `Histogram` is one backend's way to look through a row `d`, of storage type T, whose maximum and,
// unless top-k is on, sums are known:
//   max_bins()                       how fine it can be
//   fill(range, measure)             counts (and masses) of the kept logits in the range
//   mass()                           all that it holds
//   cross(range, measure, target)    see Crossing
//   kth_largest_tile_max(k)          at least k logits reach it; -inf if there are fewer tiles
//   nth_equal(z, n)                  id of the nth logit that equals z
template <class Row, class Histogram>
class Filters {
 public:
  MTP_HD Filters(Row& d, Histogram& histogram) : d_(d), histogram_(histogram) {}

  MTP_HD void apply(const SamplingParams& sampling, int64_t b) {
    const bool top_k = needs_top_k(sampling, b, d_.tiles.vocab), top_p = sampling.top_p[b] < 1.0;
    for (int pass = top_k ? 0 : 1; pass < (top_p ? 2 : 1); ++pass) {
      keep_prefix(pass == 0 ? Measure::kCount : Measure::kMass, sampling.top_k[b],
                  sampling.top_p[b]);
    }
    if (sampling.min_p[b] > 0.0) min_p(sampling.min_p[b]);
    if (d_.filtered()) d_.sum_kept();
  }

 private:
  using T = typename Row::Storage;

  MTP_HD void min_p(double p) {
    const float floor = static_cast<float>(d_.max + log2(p) / d_.scale);
    if (floor <= d_.floor) return;
    d_.floor = floor;
    d_.last_tie = d_.tiles.vocab;
  }

  // -0 becomes 0.
  MTP_HD KeyRange range_from(float low) const {
    return {order_key<T>((low < -kLargest<T> ? -kLargest<T> : low) + 0.0f),
            order_key<T>(d_.max + 0.0f), histogram_.max_bins()};
  }

  // Narrows the filter to the shortest prefix that holds k logits, or the share p of the mass.
  MTP_HD void keep_prefix(Measure measure, int64_t k, double p) {
    const bool after_top_k = d_.filtered();
    float low;  // all of the prefix lies at it or above
    uint64_t target;
    if (measure == Measure::kCount) {
      low = histogram_.kth_largest_tile_max(k);
      target = static_cast<uint64_t>(k);
    } else if (after_top_k) {
      low = d_.floor;
      target = 0;  // known with the first histogram, which holds all that is left
    } else {
      // Logits below this weigh less than 1 - p together, even if there were V of its weight.
      const double weight = (1.0 - p) * d_.total / static_cast<double>(d_.tiles.vocab);
      low = static_cast<float>(d_.max + log2(weight) / d_.scale);
      target = static_cast<uint64_t>(ceil(p * d_.total * kMassUnits));
    }
    KeyRange range = range_from(low);
    for (bool first = true;; first = false) {
      histogram_.fill(range, measure);
      if (first && measure == Measure::kMass && after_top_k) {
        target = static_cast<uint64_t>(ceil(p * static_cast<double>(histogram_.mass())));
      }
      const Crossing crossing = histogram_.cross(range, measure, target);
      if (crossing.bin ==
          range.bins) {  // fewer than k are finite, or rounding keeps the mass short
        if (d_.floor < -kLargest<T>) d_.floor = -kLargest<T>;
        return;
      }
      target -= crossing.before;
      const uint32_t high = range.high - (static_cast<uint32_t>(crossing.bin) << range.shift);
      if (range.shift == 0) {
        // All logits of the bin are equal, and so are their masses.
        uint64_t kept = target;
        if (measure == Measure::kMass && crossing.here > 0) {
          const uint64_t each = crossing.here / crossing.logits;
          kept = (target + each - 1) / each;
        }
        keep_ties(from_order_key<T>(high), kept > 1 ? kept : 1, crossing.logits);
        return;
      }
      const uint32_t width = (1u << range.shift) - 1;
      range = {high - range.low < width ? range.low : high - width, high, histogram_.max_bins()};
    }
  }

  // Ends the filter at the `kept`th of the `ties` logits that equal z and are not dropped yet.
  MTP_HD void keep_ties(float z, uint64_t kept, uint64_t ties) {
    if (kept < ties) {
      d_.last_tie = histogram_.nth_equal(z, kept);
    } else if (z > d_.floor) {
      d_.last_tie = d_.tiles.vocab;
    }
    d_.floor = z;
  }

  Row& d_;
  Histogram& histogram_;
};

}  // namespace mtp
