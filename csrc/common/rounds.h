// Many short rounds of work on one team of threads: a fork and join each would take as long as the
// work. Every thread has its share of a round, which it takes in pieces; who is done with his own
// helps the others, so that a thread that is late, or that the runtime did not give, is not waited
// for.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "common/parallel.h"

namespace mtp {

// Waits some microseconds for `number` to be at least `least`; returns whether it is.
inline bool spin_for(const std::atomic<int64_t>& number, int64_t least) {
  constexpr int kSpins = 10000;
  for (int spins = 0; spins < kSpins; ++spins) {
    if (number.load(std::memory_order_acquire) >= least) return true;
  }
  return false;
}

// Waits for it, and lets others run: there may be more threads than processors.
inline void wait_for(const std::atomic<int64_t>& number, int64_t least) {
  if (spin_for(number, least)) return;
  while (number.load(std::memory_order_acquire) < least) std::this_thread::yield();
}

// What the threads of a team share. Each of its fields has a cache line of its own.
struct Team {
  struct alignas(64) Share {
    std::atomic<uint64_t> taken{0};  // the round's number * 2^32 + its pieces handed out
  };
  explicit Team(int threads) : shares(threads) {}

  std::vector<Share> shares;
  alignas(64) std::atomic<int64_t> done{0};  // pieces finished, of all rounds
};

// One thread of a team that goes through rounds.
class Worker {
 public:
  // One of `count`; the team may be meant for more than the runtime gave.
  Worker(Team& team, int number, int count) : team_(team), index_(number), count_(count) {}

  int index() const { return index_; }  // in [0, threads), to find its part of a workspace
  int count() const { return count_; }

  // Calls f(next), where next(begin, end) is true as long as there is a piece of [0, n) that this
  // worker is to do, and says which; what all workers did in this round is done, and seen, when it
  // returns. Results must not depend on who does a piece.
  template <class F>
  void pieces(int64_t n, int64_t grain, const F& f) {
    const int64_t pieces = (n + grain - 1) / grain;
    ++begun_;
    due_ += pieces;
    int64_t done = 0;
    int others = 0;  // whose shares are finished
    f([&](int64_t& begin, int64_t& end) {
      for (; others < threads(); ++others) {
        const int share = (index_ + others) % threads();
        const int64_t first = first_piece(pieces, share);
        const int64_t i = take(share, first_piece(pieces, share + 1) - first);
        if (i < 0) continue;
        begin = (first + i) * grain;
        end = std::min(begin + grain, n);
        ++done;
        return true;
      }
      return false;
    });
    if (done > 0) team_.done.fetch_add(done, std::memory_order_release);
    wait_for(team_.done, due_);
  }

  // The same, calling f(begin, end) for each piece.
  template <class F>
  void round(int64_t n, int64_t grain, const F& f) {
    pieces(n, grain, [&](const auto& next) {
      int64_t begin, end;
      while (next(begin, end)) f(begin, end);
    });
  }

 private:
  int threads() const { return static_cast<int>(team_.shares.size()); }
  int64_t first_piece(int64_t pieces, int share) const { return pieces * share / threads(); }

  // Takes one of the `count` pieces of a share in this round; -1 if there is none left.
  int64_t take(int share, int64_t count) {
    std::atomic<uint64_t>& taken = team_.shares[share].taken;
    const uint64_t round = static_cast<uint64_t>(begun_) << 32;
    uint64_t seen = taken.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t now = std::max(seen, round);  // nobody was there in this round yet
      const int64_t i = static_cast<int64_t>(now - round);
      if (i >= count) return -1;  // or a later round has begun
      if (taken.compare_exchange_weak(seen, now + 1, std::memory_order_relaxed)) return i;
    }
  }

  Team& team_;
  const int index_, count_;
  int64_t begun_ = 0;
  int64_t due_ = 0;  // pieces of the rounds begun
};

// Calls program(worker) on each of up to `threads` threads; each goes through the same rounds.
template <class F>
void run_rounds(int threads, const F& program) {
  struct Context {
    Team team;
    const F* program;
  } context{Team(std::max(threads, 1)), &program};
  const auto body = [](void* pointer, int number, int count) {
    auto& c = *static_cast<Context*>(pointer);
    Worker worker(c.team, number, count);
    (*c.program)(worker);
  };
  threads <= 1 ? body(&context, 0, 1) : run_on_threads(threads, body, &context);
}

}  // namespace mtp
