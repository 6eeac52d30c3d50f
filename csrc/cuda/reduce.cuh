// Reductions of a small struct over a warp and over a cluster of blocks, in an order that depends
// on the shape of the launch alone: the same input gives the same bits.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/arch.cuh"

namespace mtp {

constexpr int kMaxWarps = 32;
constexpr int kMaxCluster = 8;  // what every device with clusters can launch

template <class T>
__device__ inline T shuffle_xor(T value, int lane_mask) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) % 4 == 0, "32-bit words");
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_xor_sync(kFullMask, word, lane_mask);
  memcpy(&value, words, sizeof(T));
  return value;
}

// The reduction of the warp's values; only lane 0 may use it, since a merge that rounds need not be
// commutative to the last bit.
template <class T, class Merge>
__device__ inline T warp_reduce(T value, const Merge& merge) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = merge(value, shuffle_xor(value, distance));
  }
  return value;
}

// Shared memory of one cluster_reduce.
template <class T>
struct ReduceScratch {
  T of_warp[kMaxWarps];
  T of_block[kMaxCluster];
};

// The reduction over all threads of the cluster, the same bits in each of them. `identity` is
// merge's. Every thread has called cluster.arrive() since it last waited: the other blocks' shared
// memory exists only once they have started.
template <class T, class Merge>
__device__ inline T cluster_reduce(T value, T identity, const Merge& merge, const Cluster& cluster,
                                   ReduceScratch<T>& scratch) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  value = warp_reduce(value, merge);
  if (lane == 0) scratch.of_warp[warp] = value;
  __syncthreads();
  cluster.wait();
  if (warp == 0) {
    value = warp_reduce(lane < warps ? scratch.of_warp[lane] : identity, merge);
    // Each block tells all others: then nobody reads another block's memory, which may have ended.
    if (lane == 0) {
      for (int other = 0; other < cluster.size; ++other) {
        *cluster.map(&scratch.of_block[cluster.rank], other) = value;
      }
    }
  }
  cluster.sync();
  value = scratch.of_block[0];
  for (int block = 1; block < cluster.size; ++block) value = merge(value, scratch.of_block[block]);
  return value;
}

}  // namespace mtp
