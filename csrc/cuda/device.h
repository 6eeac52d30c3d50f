// Which device is current, for code that launches no kernel itself.
#pragma once

#include <cuda_runtime.h>

#include "common/status.h"

namespace mtp {

// Success, or CUDA's text for `error`, which is taken off the runtime's record: it must not surface
// in a later, innocent call.
inline Status cuda_status(cudaError_t error) {
  if (error == cudaSuccess) return {};
  (void)cudaGetLastError();
  return {cudaGetErrorString(error)};
}

// Makes `device` current for its own lifetime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cuda_status(cudaGetDevice(&before_));
    if (!status_.ok() || before_ == device) return;
    status_ = cuda_status(cudaSetDevice(device));
    changed_ = status_.ok();
  }
  ~DeviceGuard() {
    if (changed_) (void)cuda_status(cudaSetDevice(before_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  const Status& status() const { return status_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  Status status_;
};

// The newest CUDA version that the driver supports, as 1000 * major + 10 * minor; 0 without one.
inline int driver_version() {
  int version = 0;
  return cuda_status(cudaDriverGetVersion(&version)).ok() ? version : 0;
}

}  // namespace mtp
