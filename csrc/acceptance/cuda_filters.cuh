// The histograms of the filters (filters.h) on a GPU: each block counts its tiles in shared memory,
// then adds up the bins of all blocks of its team.
//
// Bytes that the filters of a row read, as tiles (math.h) whose maximum reaches a limit. Top-k and
// top-p: one histogram for each 9 bits of the number of order keys from a lower bound of the
// threshold to the maximum, so 1 or 2 in 16 bits and 1 to 4 in float32. The limit of the first is
// the bound, of the others the lowest key of the bin that the one before chose. The bound is, of
// top-k, the k-th largest maximum of a tile (none if there are fewer tiles); of top-p, the logit
// that weighs (1 - p) / V of the total or, after top-k, its threshold. Where some of the logits
// that equal the threshold are dropped, their count: the tiles that reach it, and one tile by each
// warp. After all filters the sums: the tiles that reach the last threshold. Min-p reads nothing
// besides.
#pragma once

#include "acceptance/cuda_row.cuh"
#include "acceptance/filters.h"

namespace mtp {

struct Bins {
  static constexpr int kMax = 512;
  unsigned long long mass[kMax];
  unsigned count[kMax];
};
struct SharedBins {
  Bins own, all;  // of this block, of the team
};

template <class T>
class Histogram {
 public:
  __device__ Histogram(const Distribution<T>& d, SharedBins& bins, float* tile_counts)
      : d_(d), bins_(bins), tile_counts_(tile_counts) {}

  __device__ int max_bins() const { return Bins::kMax; }

  __device__ void fill(const KeyRange& range, Measure measure) {
    const Tiles& tiles = d_.tiles;
    filled_ = range.bins;
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
#pragma unroll 1
    for (int i = thread; i < filled_; i += threads) bins_.own.mass[i] = bins_.own.count[i] = 0;
    __syncthreads();
    const float low = from_order_key<T>(range.low);
    tiles.for_mine([&](int tile) {
      if (d_.scratch.max[tile] < low) return;
      for_each_logit(d_.row, static_cast<int>(tiles.begin(tile)), static_cast<int>(tiles.end(tile)),
                     [&](int id, float logit) {
                       const float z = logit + 0.0f;  // -0 becomes 0
                       if (z < low || !d_.keeps(id, z)) return;
                       const uint32_t key = order_key<T>(z);
                       if (key > range.high) return;
                       const int bin = range.bin_of(key);
                       atomicAdd(&bins_.own.count[bin], 1u);
                       if (measure == Measure::kCount) return;
                       const float units = d_.weight(z, d_.max) * kMassUnits;
                       atomicAdd(&bins_.own.mass[bin], static_cast<unsigned long long>(units));
                     });
    });
    tiles.team.expose(bins_.own);
    tiles.team.sync();
#pragma unroll 1
    for (int i = thread; i < filled_; i += threads) {
      unsigned long long mass = 0;
      unsigned count = 0;
#pragma unroll 1
      for (int block = 0; block < tiles.team.size(); ++block) {
        mass += tiles.team.exposed(&bins_.own.mass[i], block);
        count += tiles.team.exposed(&bins_.own.count[i], block);
      }
      bins_.all.mass[i] = mass;
      bins_.all.count[i] = count;
    }
    tiles.team.sync();  // before anybody fills again, or ends
  }

  __device__ uint64_t mass() const {
    unsigned long long sum = 0;
#pragma unroll 1
    for (int i = lane_in_warp(); i < filled_; i += kWarp) sum += bins_.all.mass[i];
    return warp_reduce(sum, Sum{});
  }

  // By a whole warp: each lane has a run of neighbouring bins.
  __device__ Crossing cross(const KeyRange& range, Measure measure, uint64_t target) const {
    const auto of_bin = [&](int i) -> unsigned long long {
      return measure == Measure::kMass ? bins_.all.mass[i] : bins_.all.count[i];
    };
    const int lane = lane_in_warp(), run = (range.bins + kWarp - 1) / kWarp;
    const int begin = lane * run;
    const int end = begin + run < range.bins ? begin + run : range.bins;
    unsigned long long through = 0;
#pragma unroll 1
    for (int i = begin; i < end; ++i) through += of_bin(i);
    const unsigned long long sum = through;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const unsigned long long other = __shfl_up_sync(kFullMask, through, distance);
      if (lane >= distance) through += other;
    }
    unsigned long long before = through - sum;
    int bin = begin;
#pragma unroll 1
    for (; bin < end; ++bin) {
      if (before + of_bin(bin) >= target && bins_.all.count[bin] > 0) break;
      before += of_bin(bin);
    }
    const unsigned crossed = __ballot_sync(kFullMask, bin < end);
    if (crossed == 0) return {range.bins, 0, 0, 0};
    const int first = __ffs(static_cast<int>(crossed)) - 1;
    bin = __shfl_sync(kFullMask, bin, first);
    return {bin, __shfl_sync(kFullMask, before, first), of_bin(bin), bins_.all.count[bin]};
  }

  __device__ float kth_largest_tile_max(int64_t k) const {
    const int count = d_.tiles.count;
    const float* max = d_.scratch.max;
    float kth = -INFINITY;
#pragma unroll 1
    for (int tile = lane_in_warp(); tile < count && k <= count; tile += kWarp) {
      int rank = 1;
#pragma unroll 1
      for (int other = 0; other < count; ++other) {
        rank += max[other] > max[tile] || (max[other] == max[tile] && other < tile);
      }
      if (rank == k) kth = max[tile];
    }
    return warp_reduce(kth, Max{});
  }

  __device__ int64_t nth_equal(float z, uint64_t n) {
    const Tiles& tiles = d_.tiles;
    const auto equals = [&](int id) { return clean<T>(to_float(load(d_.row + id))) == z; };
    const auto count_tile = [&](int tile) {
      int equal = 0;
      if (d_.scratch.max[tile] >= z) {
        for_each_logit(d_.row, static_cast<int>(tiles.begin(tile)),
                       static_cast<int>(tiles.end(tile)),
                       [&](int, float logit) { equal += logit == z; });
      }
      tiles.team.publish(tile_counts_ + tile, static_cast<float>(warp_reduce(equal, Sum{})));
    };
    tiles.gather(count_tile, tile_counts_);
    const double short_of_n = static_cast<double>(n) - 0.5;
    const Place tile =
        find_place(tiles.count, short_of_n, [&](int i) -> double { return tile_counts_[i]; });
    const int begin = static_cast<int>(tiles.begin(tile.index));
    const int end = static_cast<int>(tiles.end(tile.index));
    return begin + find_place(end - begin, short_of_n - tile.before, [&](int i) {
                     return equals(begin + i) ? 1.0 : 0.0;
                   }).index;
  }

 private:
  const Distribution<T>& d_;
  SharedBins& bins_;
  float* tile_counts_;  // (kMaxTiles)
  int filled_ = 0;
};

}  // namespace mtp
