// What the kernels need of the machine beyond plain C++. The PTX of the project is here and nowhere
// else, each instruction beside a portable body, which is also what the emulator in tests/ runs.
// Kernels reach the arrays that cost time through load() and store(), so that the bytes they move
// can be counted; single values that all threads share are read as they are.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace mtp {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// Elements of T in a 16-byte vector.
template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

// The block's dynamic shared memory, 16-byte aligned. There is no other: static shared memory would
// be one variable for all blocks that the emulator runs at once.
__device__ inline unsigned char* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
#else
  return emulator::shared_memory();
#endif
}

// Global memory, one element or one aligned 16-byte vector at a time. kOnce: nothing will read the
// data again, so it should leave the caches first.
enum class Cache { kKeep, kOnce };

template <Cache cache, class Bits>
__device__ Bits load_bits(const Bits* p) {
  if constexpr (cache == Cache::kOnce) return __ldcs(p);
  return __ldca(p);
}

template <Cache cache = Cache::kKeep>
__device__ inline uint4 load(const uint4* p) {
  return load_bits<cache>(p);
}
template <Cache cache = Cache::kKeep>
__device__ inline float load(const float* p) {
  return load_bits<cache>(p);
}
template <Cache cache = Cache::kKeep>
__device__ inline BFloat16 load(const BFloat16* p) {
  return {load_bits<cache>(reinterpret_cast<const unsigned short*>(p))};
}
template <Cache cache = Cache::kKeep>
__device__ inline Half load(const Half* p) {
  return {load_bits<cache>(reinterpret_cast<const unsigned short*>(p))};
}

// Stores leave the caches first: no kernel reads what it wrote.
__device__ inline void store(uint4* p, uint4 x) { __stcs(p, x); }
__device__ inline void store(float* p, float x) { __stcs(p, x); }
__device__ inline void store(BFloat16* p, BFloat16 x) {
  __stcs(reinterpret_cast<unsigned short*>(p), x.bits);
}
__device__ inline void store(Half* p, Half x) {
  __stcs(reinterpret_cast<unsigned short*>(p), x.bits);
}

// The two 16-bit values in a word, the lower address in the lower half.
template <class T>
__device__ void widen(uint32_t word, float& low, float& high);

template <>
__device__ inline void widen<BFloat16>(uint32_t word, float& low, float& high) {
  low = bits_to_float(word << 16);
  high = bits_to_float(word & 0xffff0000u);
}

template <>
__device__ inline void widen<Half>(uint32_t word, float& low, float& high) {
#if defined(__CUDA_ARCH__)
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(word));
#else
  low = to_float(Half{static_cast<uint16_t>(word)});
  high = to_float(Half{static_cast<uint16_t>(word >> 16)});
#endif
}

template <class T>
__device__ uint32_t narrow(float low, float high);

template <>
__device__ inline uint32_t narrow<BFloat16>(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return from_float<BFloat16>(low).bits | uint32_t{from_float<BFloat16>(high).bits} << 16;
#endif
}

template <>
__device__ inline uint32_t narrow<Half>(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return from_float<Half>(low).bits | uint32_t{from_float<Half>(high).bits} << 16;
#endif
}

// A 16-byte vector of T as floats, and back.
template <class T>
__device__ inline void unpack(uint4 vector, float (&x)[kPack<T>]) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = bits_to_float(words[i]);
    } else {
      widen<T>(words[i], x[2 * i], x[2 * i + 1]);
    }
  }
}

template <class T>
__device__ inline uint4 pack(const float (&x)[kPack<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = float_to_bits(x[i]);
    } else {
      words[i] = narrow<T>(x[2 * i], x[2 * i + 1]);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// exp(x) within about 2^-22 relative plus the rounding of x * log2(e); subnormal results are 0.
__device__ inline float fast_exp(float x) {
  const float y = x * 1.44269504088896341f;
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(y));
  return result;
#else
  return exp2f(y);
#endif
}

// The thread-block cluster that this block is in; a block alone where there are no clusters (before
// sm_90). Each thread alternates arrive() and wait(); sync() is both.
struct Cluster {
  int rank, size;

  __device__ static Cluster current() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    return {0, 1};
#else
    return {static_cast<int>(__clusterRelativeBlockRank()),
            static_cast<int>(__clusterSizeInBlocks())};
#endif
  }

  __device__ void arrive() const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (size > 1) __cluster_barrier_arrive();
#endif
  }

  __device__ void wait() const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (size > 1) __cluster_barrier_wait();
#endif
  }

  // For a block alone this is the block's barrier.
  __device__ void sync() const {
    if (size == 1) {
      __syncthreads();
    } else {
      arrive();
      wait();
    }
  }

  // Where `p`, which points into this block's shared memory, is in block `other`'s.
  template <class T>
  __device__ T* map(T* p, int other) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    return p;
#else
    return size == 1 ? p : static_cast<T*>(__cluster_map_shared_rank(p, other));
#endif
  }
};

}  // namespace mtp
