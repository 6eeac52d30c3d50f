// Fork-join over the threads that torch already has.
//
// torch keeps a pool of OpenMP threads that spin for a while after every region. A second pool
// would spin beside it and slow both (two runtimes are loaded as soon as an extension links its
// own), so this module links no OpenMP: it looks up GOMP_parallel, which GNU's and LLVM's runtimes
// both export, in the runtime that is already in the process, and enters the same team as torch's
// own kernels. Without such a runtime it starts plain threads.
#pragma once

#include <atomic>
#include <cstdint>

namespace mtp {

// Runs body(context) on `threads` threads at once, the caller's among them; returns when all are
// done.
void run_on_threads(int threads, void (*body)(void*), void* context);

// Where the threads come from: the path of the OpenMP runtime, or "std::thread".
const char* thread_source();

// Calls f(begin, end) for pieces of [0, n), `grain` items each, handed out in order to whichever
// thread is free. f must not depend on which thread runs it.
template <class F>
void parallel_for(int threads, int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  const int64_t pieces = (n + grain - 1) / grain;
  if (threads > pieces) threads = static_cast<int>(pieces);
  if (threads <= 1) {
    f(int64_t{0}, n);
    return;
  }
  struct Context {
    std::atomic<int64_t> next;
    int64_t n, grain;
    const F* f;
  } context{{0}, n, grain, &f};
  run_on_threads(
      threads,
      [](void* pointer) {
        auto& c = *static_cast<Context*>(pointer);
        for (;;) {
          const int64_t begin = c.next.fetch_add(c.grain, std::memory_order_relaxed);
          if (begin >= c.n) return;
          (*c.f)(begin, begin + c.grain < c.n ? begin + c.grain : c.n);
        }
      },
      &context);
}

}  // namespace mtp
