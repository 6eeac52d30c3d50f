// The CUDA kernel of the decode loop's bookkeeping: one thread a sequence, no shared memory. All
// its time is the launch.
//
// Bytes a sequence with E end tokens that keeps n tokens, a of them accepted: 57 + 8 (1 + E) n read
// and 58 + 9 n written, each by itself, and a additions to 8 bytes that the sequences share.
#include "commit/params.h"
#include "cuda/launch.h"

namespace mtp {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) commit_kernel(CommitParams p) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= p.batch) return;
  for (int64_t i = commit_sequence(p, b); i > 0; --i) {
    atomicAdd(reinterpret_cast<unsigned long long*>(p.accepted + i - 1), 1ull);
  }
}

}  // namespace

Status commit_cuda(const CommitParams& p, void* stream) {
  if (p.batch == 0) return {};
  return launch(&commit_kernel, {(p.batch + kThreads - 1) / kThreads, kThreads, 0, 1}, stream, p);
}

}  // namespace mtp
