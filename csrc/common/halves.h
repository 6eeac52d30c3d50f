// Rounds that two threads take a half of each. Who has waited some time for the other, and finds
// that it has not begun a round (the system gave its processor to others), goes on with both halves
// until it is back.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>

#include "common/rounds.h"

namespace mtp {

// One thread's share of rounds that are one piece a share, as Worker gives it: nobody helps, and
// nothing is waited for.
class Alone {
 public:
  // Share `share` of `shares`, of worker number `index`.
  Alone(int index, int share, int shares) : index_(index), share_(share), shares_(shares) {}

  int index() const { return index_; }

  template <class F>
  void pieces(int64_t n, int64_t /*grain*/, const F& f) const {
    bool more = true;
    f([&](int64_t& begin, int64_t& end) {
      begin = n * share_ / shares_, end = n * (share_ + 1) / shares_;
      return std::exchange(more, false) && begin < end;
    });
  }

  template <class F>
  void round(int64_t n, int64_t /*grain*/, const F& f) const {
    f(n * share_ / shares_, n * (share_ + 1) / shares_);
  }

 private:
  const int index_, share_, shares_;
};

// What the two share. Each field has a cache line of its own.
struct Halves {
  struct Side {
    // 2 r - 1: its thread, or the other one for it, is in round r; 2 r: between r and the next.
    alignas(64) std::atomic<int64_t> state{0};
    // The last round whose half its thread did.
    alignas(64) std::atomic<int64_t> done{0};
    // Its thread was away, and waits to be let in.
    alignas(64) std::atomic<bool> back{false};
    // The round with which it is let in; past the last one if there is none left.
    alignas(64) std::atomic<int64_t> next{0};
  } sides[2];
};

// Goes through rounds 1 to `rounds`, as thread `side` of two. half(round, side) does a half;
// join(round) makes of both what this thread goes on with; give() hands that to the other thread.
// Returns whether this thread was there to the end: if not, what join(rounds) made has the other.
template <class H, class J, class G>
bool run_halves(Halves& halves, int side, int64_t rounds, const H& half, const J& join,
                const G& give) {
  Halves::Side &mine = halves.sides[side], &other = halves.sides[1 - side];
  const auto begin = [](Halves::Side& it, int64_t round) {
    int64_t between = 2 * (round - 1);
    return it.state.compare_exchange_strong(between, between + 1, std::memory_order_acq_rel);
  };
  bool alone = false;
  int64_t given = 0;  // the round before which this thread was given what it goes on with
  for (int64_t round = 1;; ++round) {
    while (!begin(mine, round)) {
      mine.back.store(true, std::memory_order_release);
      wait_for(mine.next, given + 1);
      round = given = mine.next.load(std::memory_order_acquire);
      if (round > rounds) return false;
    }
    if (round > 1 && round != given) join(round - 1);
    if (round > rounds) break;
    if (alone && other.back.load(std::memory_order_acquire)) {
      give();
      alone = false;
      other.back.store(false, std::memory_order_relaxed);
      other.state.store(2 * (round - 1), std::memory_order_relaxed);
      other.next.store(round, std::memory_order_release);
    }
    half(round, side);
    mine.state.store(2 * round, std::memory_order_release);
    mine.done.store(round, std::memory_order_release);
    if (!alone && !spin_for(other.done, round)) alone = begin(other, round);
    alone ? half(round, 1 - side) : wait_for(other.done, round);
  }
  if (alone) other.next.store(rounds + 1, std::memory_order_release);
  return true;
}

}  // namespace mtp
