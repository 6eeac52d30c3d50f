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
#include <type_traits>

namespace mtp {

// Runs body(context, number, count) on `count` threads at once, at most `threads`, the caller's,
// number 0, among them; returns when all are done. A thread of the pool has the same number each
// time, so that what it finds in its caches can be its own.
void run_on_threads(int threads, void (*body)(void*, int, int), void* context);

// Where the threads come from: the path of the OpenMP runtime, or "std::thread".
const char* thread_source();

// Calls f(begin, end) for pieces of [0, n), `grain` items each, handed out in order to whichever
// thread is free. f may take a third argument, the thread's number in [0, threads), to find its
// part of a workspace; results must not depend on it.
template <class F>
void parallel_for(int threads, int64_t n, int64_t grain, const F& f) {
  const auto call = [&f](int64_t begin, int64_t end, int number) {
    if constexpr (std::is_invocable_v<F, int64_t, int64_t, int>) {
      f(begin, end, number);
    } else {
      f(begin, end);
    }
  };
  if (n <= 0) return;
  const int64_t pieces = (n + grain - 1) / grain;
  if (threads > pieces) threads = static_cast<int>(pieces);
  if (threads <= 1) return call(0, n, 0);
  struct Context {
    std::atomic<int64_t> next;
    int64_t n, grain;
    const decltype(call)* body;
  } context{{0}, n, grain, &call};
  run_on_threads(
      threads,
      [](void* pointer, int number, int) {
        auto& c = *static_cast<Context*>(pointer);
        for (;;) {
          const int64_t begin = c.next.fetch_add(c.grain, std::memory_order_relaxed);
          if (begin >= c.n) return;
          (*c.body)(begin, begin + c.grain < c.n ? begin + c.grain : c.n, number);
        }
      },
      &context);
}

}  // namespace mtp
