// Stands in for the CUDA toolkit's header when a .cu file is compiled as C++: the language
// extensions, the intrinsics and the part of the runtime that csrc/ uses, on top of emulator.h.
// Grids, blocks and clusters have one dimension.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Set by the emulator whenever it switches to another thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// Barriers and warp operations. The defaults name the line of the call.
#define MTP_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(MTP_PLACE) { emulator::block_barrier({file, line}); }
inline void __syncwarp(unsigned = 0xffffffffu, MTP_PLACE) { emulator::warp_barrier({file, line}); }
inline void __cluster_barrier_arrive(MTP_PLACE) { emulator::cluster_arrive({file, line}); }
inline void __cluster_barrier_wait(MTP_PLACE) { emulator::cluster_wait({file, line}); }
inline unsigned __clusterRelativeBlockRank() { return emulator::cluster_rank(); }
inline unsigned __clusterSizeInBlocks() { return emulator::cluster_size(); }
inline void* __cluster_map_shared_rank(const void* p, unsigned rank) {
  return emulator::map_shared(p, rank);
}

template <class T>
T emulated_shuffle(T value, int source, unsigned mask, emulator::Place place) {
  static_assert(std::is_arithmetic<T>::value && sizeof(T) <= 8, "what CUDA can shuffle");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = emulator::shuffle(word, source, mask, place);
  std::memcpy(&value, &word, sizeof value);
  return value;
}
inline int emulated_lane() { return static_cast<int>(threadIdx.x % 32); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int = 32, MTP_PLACE) {
  return emulated_shuffle(value, lane & 31, mask, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int = 32, MTP_PLACE) {
  return emulated_shuffle(value, emulated_lane() ^ lane_mask, mask, {file, line});
}
// Lanes whose source would be outside the warp keep their own value.
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int = 32, MTP_PLACE) {
  const int source = emulated_lane() - static_cast<int>(delta);
  return emulated_shuffle(value, source < 0 ? emulated_lane() : source, mask, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int = 32, MTP_PLACE) {
  const int source = emulated_lane() + static_cast<int>(delta);
  return emulated_shuffle(value, source > 31 ? emulated_lane() : source, mask, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, MTP_PLACE) {
  return emulator::ballot(predicate != 0, mask, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, MTP_PLACE) {
  return emulator::ballot(predicate != 0, mask, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, MTP_PLACE) {
  return emulator::ballot(predicate != 0, mask, {file, line}) == 0xffffffffu;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

// Rounded as written: the compiler contracts nothing here.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }

// Global memory.
template <class T>
T emulated_load(const T* p) {
  emulator::count_read(p, sizeof(T));
  return *p;
}
template <class T>
void emulated_store(T* p, T value) {
  emulator::count_write(p, sizeof(T));
  *p = value;
}
template <class T>
T __ldca(const T* p) {
  return emulated_load(p);
}
template <class T>
T __ldcg(const T* p) {
  return emulated_load(p);
}
template <class T>
T __ldcs(const T* p) {
  return emulated_load(p);
}
template <class T>
void __stcg(T* p, T value) {
  emulated_store(p, value);
}
template <class T>
void __stcs(T* p, T value) {
  emulated_store(p, value);
}
inline void __threadfence() {}

// Atomics: nothing else runs between the two halves.
template <class T>
T atomicAdd(T* p, T value) {
  const T old = *p;
  *p = old + value;
  return old;
}
template <class T>
T atomicMax(T* p, T value) {
  const T old = *p;
  if (value > old) *p = value;
  return old;
}

// The runtime.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorInvalidClusterSize = 912,
};
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrClusterLaunch = 120,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4
};

using cudaStream_t = struct CUstream_st*;

struct cudaFuncAttributes {
  int ptxVersion;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaRuntimeGetVersion(int* version);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t emulated_launch(const emulator::Launch& launch);

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args... args) {
  const auto thread = [&] { kernel(args...); };
  using Thread = decltype(thread);
  emulator::Launch launch{};
  launch.grid = config->gridDim.x;
  launch.threads = config->blockDim.x;
  launch.cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) {
      launch.cooperative = attribute.val.cooperative != 0;
    } else {
      launch.cluster = attribute.val.clusterDim.x;
    }
  }
  launch.shared_bytes = config->dynamicSmemBytes;
  launch.kernel = reinterpret_cast<const void*>(kernel);
  launch.body = [](void* context) { (*static_cast<Thread*>(context))(); };
  launch.context = const_cast<void*>(static_cast<const void*>(&thread));
  return emulated_launch(launch);
}
