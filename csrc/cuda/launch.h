// The one way in which kernels are launched, and what a launcher asks of the device.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "common/status.h"
#include "cuda/device.h"

namespace mtp {

struct Device {
  int shared_per_block, shared_per_sm;  // bytes of shared memory, the most that can be asked for
  int sms;                              // streaming multiprocessors
  bool has_clusters;
};

// The current device.
inline Status get_device(Device& device) {
  int id = 0, clusters = 0;
  cudaError_t error = cudaGetDevice(&id);
  const auto attribute = [&](int& value, cudaDeviceAttr which) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, which, id);
  };
  attribute(device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  attribute(device.shared_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  attribute(device.sms, cudaDevAttrMultiProcessorCount);
  attribute(clusters, cudaDevAttrClusterLaunch);
  device.has_clusters = clusters != 0;
  return cuda_status(error);
}

// Whether the code that the device would run for `kernel` knows clusters: PTX for an older
// architecture, compiled on the spot for a newer device, does not.
template <class... Params>
Status compiled_with_clusters(void (*kernel)(Params...), bool& yes) {
  cudaFuncAttributes attributes{};
  const Status status =
      cuda_status(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  yes = attributes.ptxVersion >= 90;
  return status;
}

struct LaunchShape {
  int64_t blocks;
  int threads;
  size_t shared_bytes;
  int cluster;               // blocks in a cluster; divides `blocks`; 1: none
  bool cooperative = false;  // all blocks are resident at once, so the grid has a barrier
};

template <class... Params>
Status launch(void (*kernel)(Params...), const LaunchShape& shape, void* stream, Params... params) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shape.blocks > INT32_MAX) return {"too many rows for one launch"};
  if (shape.shared_bytes > kWithoutAsking) {
    const Status status = cuda_status(cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
        static_cast<int>(shape.shared_bytes)));
    if (!status.ok()) return status;
  }
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[count++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
  }
  if (shape.cooperative) {
    cudaLaunchAttribute& cooperative = attributes[count++];
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  return cuda_status(cudaLaunchKernelEx(&config, kernel, params...));
}

}  // namespace mtp
