// Many short rounds of work on one team of threads: a fork and join each would take as long as the
// work. A round ends when its pieces are done, not when all threads have arrived, so that a thread
// that is late, or that the runtime did not give, is not waited for.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "common/parallel.h"

namespace mtp {

struct Round {
  alignas(64) std::atomic<int64_t> next{0};  // pieces handed out
  alignas(64) std::atomic<int64_t> done{0};  // pieces finished
};

// One thread of a team that goes through rounds.
class Worker {
 public:
  Worker(Round* rounds, int index) : rounds_(rounds), index_(index) {}

  int index() const { return index_; }  // in [0, threads), to find its part of a workspace
  int64_t rounds_begun() const { return begun_; }

  // Calls f(i) for all i in [0, pieces), shared with the other workers; what they did in this round
  // is done, and seen, when it returns. Results must not depend on who does a piece.
  template <class F>
  void round(int64_t pieces, const F& f) {
    Round& round = rounds_[begun_++];
    int64_t done = 0;
    for (int64_t i; (i = round.next.fetch_add(1, std::memory_order_relaxed)) < pieces; ++done) f(i);
    if (done > 0) round.done.fetch_add(done, std::memory_order_release);
    for (int spins = 0; round.done.load(std::memory_order_acquire) < pieces; ++spins) {
      if (spins >= kSpins) std::this_thread::yield();  // more threads than processors
    }
  }

 private:
  static constexpr int kSpins = 10000;
  Round* const rounds_;
  const int index_;
  int64_t begun_ = 0;
};

// Calls program(worker) on each of up to `threads` threads; each goes through the same rounds, at
// most `rounds`.
template <class F>
void run_rounds(int threads, int64_t rounds, const F& program) {
  std::vector<Round> of_all(rounds);
  if (threads <= 1) {
    Worker worker(of_all.data(), 0);
    return program(worker);
  }
  struct Context {
    std::atomic<int> workers;
    Round* rounds;
    const F* program;
  } context{{0}, of_all.data(), &program};
  run_on_threads(
      threads,
      [](void* pointer) {
        auto& c = *static_cast<Context*>(pointer);
        Worker worker(c.rounds, c.workers.fetch_add(1, std::memory_order_relaxed));
        (*c.program)(worker);
      },
      &context);
}

}  // namespace mtp
