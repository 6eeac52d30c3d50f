// The blocks that share one piece of work, and how they exchange what each has found: a
// thread-block cluster does it through shared memory, a cooperative grid (before sm_90) through
// global memory.
#pragma once

#include <cooperative_groups.h>

#include "cuda/arch.cuh"

namespace mtp {

// A block alone is a cluster of one. What the hardware knows is asked of it again and again:
// registers are few.
class Team {
 public:
  // exchange: (blocks, shared_bytes) of global memory, an image of each block's shared memory, and
  // then the team is the whole grid; null: it is a cluster.
  __device__ Team(unsigned char* exchange, int shared_bytes)
      : exchange_(exchange), shared_bytes_(shared_bytes) {}

  __device__ int rank() const {
    return is_grid() ? static_cast<int>(blockIdx.x) : Cluster::current().rank;
  }
  __device__ int size() const {
    return is_grid() ? static_cast<int>(gridDim.x) : Cluster::current().size;
  }
  // Which of the grid's teams this is.
  __device__ int64_t index() const {
    return is_grid() ? 0 : static_cast<int64_t>(blockIdx.x) / Cluster::current().size;
  }

  __device__ void sync() const {
    if (is_grid()) {
      cooperative_groups::this_grid().sync();
    } else {
      Cluster::current().sync();
    }
  }

  // Calls f(), in which warps publish elements of `arrays` (or null) of `count` elements in shared
  // memory. Before it, all threads are done with what these held; after it, all see what they hold.
  template <class F, class... T>
  __device__ void gather(int count, const F& f, T*... arrays) const {
    if (!is_grid()) sync();
    f();
    sync();
    if (!is_grid()) return;
    (collect(arrays, count), ...);
    __syncthreads();
    // The images of two blocks by turns: the next gather begins while others still collect.
    turn_ ^= 1;
  }

  // By a whole warp, within gather: *p = value in every block's shared memory.
  template <class T>
  __device__ void publish(T* p, T value) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if (is_grid()) {
      if (lane == 0) __stcg(image(p, turn_), value);
    } else if (lane < size()) {
      *Cluster::current().map(p, lane) = value;
    }
  }

  // Lets other blocks see, after the next sync(), what this block has in an object in shared
  // memory.
  template <class T>
  __device__ void expose(const T& object) const {
    static_assert(sizeof(T) % sizeof(unsigned) == 0, "32-bit words");
    if (!is_grid()) return;
    __syncthreads();
    const auto* words = reinterpret_cast<const unsigned*>(&object);
#pragma unroll 1
    for (unsigned i = threadIdx.x; i < sizeof(T) / sizeof(unsigned); i += blockDim.x) {
      __stcg(image(words + i, rank()), words[i]);
    }
  }
  // What block `block` has at p, of an object that it has exposed.
  template <class T>
  __device__ T exposed(const T* p, int block) const {
    return is_grid() ? __ldcg(image(p, block)) : *Cluster::current().map(p, block);
  }

 private:
  __device__ bool is_grid() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    return false;
#else
    return exchange_ != nullptr;
#endif
  }

  // Of p, which points into this block's shared memory.
  template <class T>
  __device__ T* image(const T* p, int block) const {
    const auto offset = reinterpret_cast<const unsigned char*>(p) - shared_memory();
    return reinterpret_cast<T*>(exchange_ + block * shared_bytes_ + offset);
  }

  template <class T>
  __device__ void collect(T* array, int count) const {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); array && i < count;
         i += static_cast<int>(blockDim.x)) {
      array[i] = __ldcg(image(array + i, turn_));
    }
  }

  unsigned char* exchange_;
  int shared_bytes_;
  mutable int turn_ = 0;
};

}  // namespace mtp
