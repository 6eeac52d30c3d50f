// The emulated CUDA runtime, and the switches that tests turn (tests/emulator/__init__.py).
#include <cuda_runtime.h>

#include <mutex>

#include "settings.h"

namespace emulator {
namespace {

constexpr int kDeviceCount = 2;

cudaError_t last_error = cudaSuccess;

cudaError_t refuse(cudaError_t error) { return last_error = error; }

}  // namespace
}  // namespace emulator

using emulator::settings;

cudaError_t emulated_launch(const emulator::Launch& launch) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const auto error = static_cast<cudaError_t>(emulator::launch(launch));
  return error == cudaSuccess ? error : emulator::refuse(error);
}

cudaError_t cudaGetDevice(int* device) {
  *device = emulator::current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulator::kDeviceCount) {
    return emulator::refuse(cudaErrorInvalidDevice);
  }
  emulator::current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = settings.device.shared_per_block;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = settings.device.shared_per_sm;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = emulator::kSms;
      break;
    case cudaDevAttrClusterLaunch:
      *value = settings.device.clusters;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = settings.device.capability;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || value > settings.device.shared_per_block) {
    return emulator::refuse(cudaErrorInvalidValue);
  }
  emulator::dynamic_limit[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidClusterSize:
      return "Invalid cluster size";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorLaunchFailure:
      return emulator::report.c_str();
  }
  return "unrecognized error code";
}

extern "C" {

__attribute__((visibility("default"))) bool emulator_set_device(int capability) {
  for (const emulator::DeviceModel& device : emulator::kDevices) {
    if (device.capability == capability) {
      settings.device = device;
      emulator::dynamic_limit.clear();
      return true;
    }
  }
  return false;
}

__attribute__((visibility("default"))) void emulator_set_schedule(int schedule, unsigned seed) {
  settings.schedule = static_cast<emulator::Schedule>(schedule);
  settings.seed = seed;
}

__attribute__((visibility("default"))) void emulator_disable_barrier(int site, int visit) {
  settings.disabled_site = site;
  settings.disabled_visit = visit;
}

// The name of a barrier that was reached since the last reset, or null behind the last one.
__attribute__((visibility("default"))) const char* emulator_barrier(int site, int* visits) {
  if (site < 0 || site >= static_cast<int>(emulator::sites.size())) return nullptr;
  *visits = emulator::sites[static_cast<size_t>(site)].visits;
  return emulator::sites[static_cast<size_t>(site)].name.c_str();
}

__attribute__((visibility("default"))) void emulator_reset_barriers() {
  emulator::sites.clear();
  settings.list_barriers = true;
}

__attribute__((visibility("default"))) void emulator_reset_counters() { emulator::counters = {}; }

__attribute__((visibility("default"))) emulator::Counters* emulator_counters() {
  return &emulator::counters;
}

__attribute__((visibility("default"))) int emulator_last_error() { return cudaGetLastError(); }
}
