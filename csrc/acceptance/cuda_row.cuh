// One row of logits as a distribution, on a GPU: cpu_row.h with a warp in the place of a vector.
//
// A team of blocks shares the row; a warp takes a tile at a time. The maxima and sums of all tiles
// are in the shared memory of every block, so that what follows from them (the row's maximum,
// its total, the tile that holds an id) each warp finds for itself, with the same result.
#pragma once

#include <cfloat>
#include <climits>
#include <cmath>

#include "acceptance/math.h"
#include "cuda/lane.cuh"
#include "cuda/reduce.cuh"
#include "cuda/team.cuh"

namespace mtp {

// The logit without NaN and +inf.
template <class T>
__device__ inline float clean(float z) {
  return z > -INFINITY ? fminf(z, kLargest<T>) : -INFINITY;
}

__device__ inline int lane_in_warp() { return static_cast<int>(threadIdx.x) % kWarp; }

// Reductions that do not depend on the order of their operands leave the same bits in all lanes.
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Min {
  __device__ int operator()(int a, int b) const { return a < b ? a : b; }
};
struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

// Calls f(id, z) for this lane's share of the logits [begin, end).
template <class T, class F>
__device__ inline void for_each_logit(const T* row, int begin, int end, const F& f) {
  const int lane = lane_in_warp();
#pragma unroll 1
  for (int id = begin + lane; id < end; id += kWarp) f(id, clean<T>(to_float(load(row + id))));
}

// The largest logit of [begin, end), in all lanes. The pass that reads the row from memory: in
// 16-byte vectors from the first aligned one on, a batch of them in flight.
template <class T>
__device__ inline float max_logit(const T* row, int begin, int end) {
  constexpr int kBatch = 2;
  const int lane = lane_in_warp();
  const int misaligned =
      static_cast<int>(reinterpret_cast<uintptr_t>(row + begin) % 16 / sizeof(T));
  int body = begin + (misaligned == 0 ? 0 : kPack<T> - misaligned);
  if (body > end) body = end;
  const int vectors = (end - body) / kPack<T>;
  const int tail = body + vectors * kPack<T>;
  const uint4* packs = reinterpret_cast<const uint4*>(row + body);
  float top = -INFINITY;
  const auto take = [&](float z) { top = fmaxf(top, z); };  // NaN never wins
  if (lane < body - begin) take(to_float(load(row + begin + lane)));
  if (lane < end - tail) take(to_float(load(row + tail + lane)));
#pragma unroll 1
  for (int first = lane; first < vectors; first += kBatch * kWarp) {
    uint4 batch[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k * kWarp < vectors) batch[k] = load(packs + first + k * kWarp);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (first + k * kWarp >= vectors) break;
      float z[kPack<T>];
      unpack<T>(batch[k], z);
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) take(z[j]);
    }
  }
  return fminf(warp_reduce(top, Max{}), kLargest<T>);
}

// A row's tiles, and the warps that share them.
struct Tiles : Tiling {
  Team team;

  __device__ Tiles(int64_t vocab, const Team& team) : Tiling(vocab), team(team) {}

  // f(tile) for this warp's share.
  template <class F>
  __device__ void for_mine(const F& f) const {
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    const int warp = team.rank() * warps + static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll 1
    for (int tile = warp; tile < count; tile += team.size() * warps) f(tile);
  }

  // The same where f publishes the tile's element of each of `arrays`.
  template <class F, class... T>
  __device__ void gather(const F& f, T*... arrays) const {
    team.gather(count, [&] { for_mine(f); }, arrays...);
  }
};

// The first of `count` numbers at which the running sum of value(i) >= 0 exceeds `target`; where
// rounding leaves the end short, the last positive one. By a whole warp: each lane adds up a run of
// neighbours, then the lane whose run holds the place walks it again.
struct Place {
  int index;      // -1: all numbers are 0
  double before;  // sum of those before it
};

template <class F>
__device__ inline Place find_place(int count, double target, const F& value) {
  const int lane = lane_in_warp();
  const int run = (count + kWarp - 1) / kWarp;
  const int begin = lane * run < count ? lane * run : count;
  const int end = begin + run < count ? begin + run : count;
  double sum = 0.0;
#pragma unroll 1
  for (int i = begin; i < end; ++i) sum += value(i);
  double through = sum;  // sums of this run and those before it
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const double other = __shfl_up_sync(kFullMask, through, distance);
    if (lane >= distance) through += other;
  }
  double before = __shfl_up_sync(kFullMask, through, 1);
  if (lane == 0) before = 0.0;
  const unsigned exceeding = __ballot_sync(kFullMask, sum > 0.0 && through > target);
  const unsigned positive = __ballot_sync(kFullMask, sum > 0.0);
  if (positive == 0) return {-1, 0.0};
  const int chosen = exceeding != 0 ? __ffs(static_cast<int>(exceeding)) - 1
                                    : kWarp - 1 - __clz(static_cast<int>(positive));
  Place place{-1, before};
  if (lane == chosen) {
    double running = before;
#pragma unroll 1
    for (int i = begin; i < end && running <= target; ++i) {
      const double here = value(i);
      if (here <= 0.0) continue;
      place = {i, running};
      running += here;
    }
  }
  place.index = __shfl_sync(kFullMask, place.index, chosen);
  place.before = __shfl_sync(kFullMask, place.before, chosen);
  return place;
}

// The sum of `count` numbers, by a whole warp and in the order of find_place.
template <class F>
__device__ inline double sum_of(int count, const F& value) {
  const int lane = lane_in_warp();
  const int run = (count + kWarp - 1) / kWarp;
  double sum = 0.0;
#pragma unroll 1
  for (int i = lane * run; i < (lane + 1) * run && i < count; ++i) sum += value(i);
  return warp_reduce(sum, Sum{});
}

// An id drawn by inverse CDF: tile_sum(tile) leads to its tile, and weight(id) to the id.
template <class Sums, class Weight>
__device__ inline int64_t pick(const Tiles& tiles, double u, const Sums& tile_sum,
                               const Weight& weight) {
  const double target = u * sum_of(tiles.count, tile_sum);
  const Place tile = find_place(tiles.count, target, tile_sum);
  if (tile.index < 0) return -1;
  const int begin = static_cast<int>(tiles.begin(tile.index));
  const int end = static_cast<int>(tiles.end(tile.index));
  const int in_tile = find_place(end - begin, target - tile.before, [&](int i) {
                        return static_cast<double>(weight(begin + i));
                      }).index;
  return in_tile < 0 ? -1 : begin + in_tile;
}

// One row as a distribution. What a filter keeps is a prefix of the ids in order of falling logit
// and, among equals, rising id: all above `floor`, and of those at it the ids up to `last_tie`.
template <class T>
struct Distribution {
  using Storage = T;
  const T* row = nullptr;  // (vocab)
  const Tiles& tiles;
  TileScratch& scratch;
  float max = -INFINITY;
  float scale = 1.0f;  // log2(e) / temperature
  double total = 0.0;  // sum of all weights
  float floor = -INFINITY;
  int last_tie = 0;

  __device__ Distribution(const Tiles& tiles, TileScratch& scratch)
      : tiles(tiles), scratch(scratch) {}

  // Reads the row: its maximum and, where asked for, the sums of its weights. False: no logit is
  // finite.
  __device__ bool read(const T* logits, double temperature, bool with_sums) {
    row = logits;
    floor = -INFINITY;
    last_tie = static_cast<int>(tiles.vocab);
    scale = exponent_scale(temperature);
    const auto read_tile = [&](int tile) {
      const float top =
          max_logit(row, static_cast<int>(tiles.begin(tile)), static_cast<int>(tiles.end(tile)));
      tiles.team.publish(scratch.max + tile, top);
      if (!with_sums) return;
      // Relative to the tile's own maximum, while the tile is in the nearest cache.
      float sum = 0.0f;
      if (top > -INFINITY) for_each(tile, [&](int, float z) { sum += weight(z, top); });
      tiles.team.publish(scratch.sum + tile, warp_reduce(sum, Sum{}));
    };
    tiles.gather(read_tile, scratch.max, with_sums ? scratch.sum : nullptr);
    max = -INFINITY;
#pragma unroll 1
    for (int tile = lane_in_warp(); tile < tiles.count; tile += kWarp) {
      max = fmaxf(max, scratch.max[tile]);
    }
    max = warp_reduce(max, Max{});
    if (with_sums && max > -INFINITY) total = sum_of(tiles.count, sums());
    return max > -INFINITY;
  }

  // Lowest id of the largest logit.
  __device__ int64_t argmax() const {
    int first = INT_MAX;
#pragma unroll 1
    for (int tile = lane_in_warp(); tile < tiles.count; tile += kWarp) {
      if (scratch.max[tile] == max && tile < first) first = tile;
    }
    first = warp_reduce(first, Min{});
    int best = INT_MAX;
    for_each(first, [&](int id, float z) {
      if (z == max && id < best) best = id;
    });
    return warp_reduce(best, Min{});
  }

  __device__ bool filtered() const { return floor > -INFINITY; }

  __device__ bool keeps(int id, float z) const {
    return z > floor || (z == floor && id <= last_tie);
  }

  // Of a logit, relative to `top`.
  __device__ float weight(float z, float top) const {
    return exp2_of_nonpositive((Lane(z) - Lane(top)) * Lane(scale)).v;
  }

  // Of an id, after the filters.
  __device__ float weight_of(int id) const {
    const float z = clean<T>(to_float(load(row + id)));
    return !filtered() || keeps(id, z) ? weight(z, max) : 0.0f;
  }

  __device__ double probability(int64_t id) const {
    return weight_of(static_cast<int>(id)) / total;
  }

  // Sums of what the filter left.
  __device__ void sum_kept() {
    const auto sum_tile = [&](int tile) {
      float sum = 0.0f;
      if (scratch.max[tile] >= floor) {
        for_each(tile, [&](int id, float z) {
          if (keeps(id, z)) sum += weight(z, max);
        });
      }
      tiles.team.publish(scratch.sum + tile, warp_reduce(sum, Sum{}));
    };
    tiles.gather(sum_tile, scratch.sum);
    total = sum_of(tiles.count, sums());
  }

  __device__ int64_t sample(double u) const {
    return pick(tiles, u, sums(), [&](int id) { return weight_of(id); });
  }

 private:
  // The tiles' sums. Before the filters they are relative to each tile's own maximum.
  __device__ auto sums() const {
    return [this](int tile) -> double {
      const float sum = scratch.sum[tile];
      return filtered() ? sum : __fmul_rn(sum, weight(scratch.max[tile], max));
    };
  }

  template <class F>
  __device__ void for_each(int tile, const F& f) const {
    for_each_logit(row, static_cast<int>(tiles.begin(tile)), static_cast<int>(tiles.end(tile)), f);
  }
};

}  // namespace mtp
