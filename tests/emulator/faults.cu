// Kernels with one fault each: what the emulator must report. fault(name) runs one and returns the
// report, or "" if there was none. The two overflows are the sanitizers' to report.
#include <climits>
#include <cstring>

#include "cuda/arch.cuh"
#include "cuda/launch.h"
#include "cuda/team.cuh"

namespace mtp {
namespace {

alignas(16) float global_memory[64];

}  // namespace

__global__ void fault_kernel(const char* fault) {
  const auto is = [fault](const char* name) { return std::strcmp(fault, name) == 0; };
  const Cluster cluster = Cluster::current();
  const int thread = static_cast<int>(threadIdx.x);
  auto* shared = reinterpret_cast<float*>(shared_memory());
  if (is("exited thread") && threadIdx.x == 5) return;
  if (is("exited thread")) __syncthreads();
  if (is("two barriers")) {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (is("partial shuffle") && threadIdx.x % 32 < 16) __shfl_xor_sync(kFullMask, 1, 1);
  if (is("partial mask")) __shfl_xor_sync(0x0000ffffu, 1, 1);
  if (is("misaligned read")) load(reinterpret_cast<const uint4*>(global_memory + 1));
  if (is("misaligned write")) store(reinterpret_cast<uint4*>(global_memory + 1), uint4{});
  if (is("shared overrun") && threadIdx.x == 0) shared[256] = 0.0f;
  if (is("early remote store")) *cluster.map(shared, 1 - cluster.rank) = 0.0f;
  if (is("late remote store")) {
    cluster.sync();
    if (cluster.rank == 1) *cluster.map(shared, 0) = 0.0f;
  }
  if (is("foreign block")) cluster.map(shared, 7);
  if (is("no wait")) {
    cluster.arrive();
    cluster.arrive();
  }
  if (is("grid barrier")) cooperative_groups::this_grid().sync();
  if (is("global overflow")) store(global_memory + blockDim.x, 0.0f);
  if (is("signed overflow")) global_memory[0] = static_cast<float>(INT_MAX - 9 + thread);
  if (is("uninitialised") && threadIdx.x == 0) global_memory[0] = shared[3];
}

namespace {

const char* run(const char* fault, const LaunchShape& shape) {
  const Status status = launch(&fault_kernel, shape, nullptr, fault);
  return status.ok() ? "" : status.error;
}

}  // namespace
}  // namespace mtp

extern "C" {

// Threads are two warps, shared memory is 1 KiB, clusters have two blocks.
__attribute__((visibility("default"))) const char* emulator_fault(const char* fault) {
  return mtp::run(fault, {2, 64, 1024, 2});
}

__attribute__((visibility("default"))) const char* emulator_launch(int64_t blocks, int threads,
                                                                   int64_t shared_bytes,
                                                                   int cluster, bool cooperative) {
  return mtp::run("", {blocks, threads, static_cast<size_t>(shared_bytes), cluster, cooperative});
}

__attribute__((visibility("default"))) float emulator_first_global() {
  return mtp::global_memory[0];
}
}
