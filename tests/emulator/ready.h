// Whose turn it is.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "settings.h"

namespace emulator {

// The threads that can run. The next one is always the one of lowest rank, so that some threads get
// as far ahead of others as the barriers let them. Under the shuffled schedule a thread has another
// rank, any one, each time that it can run again.
class Ready {
 public:
  Ready(unsigned threads, Schedule schedule, std::mt19937& random)
      : shuffled_(schedule == Schedule::shuffled),
        random_(random),
        thread_at_(threads),
        rank_of_(threads),
        words_(threads / kWord + 1),
        first_(words_.size()) {
    std::iota(thread_at_.begin(), thread_at_.end(), 0);
    if (schedule == Schedule::reverse) std::reverse(thread_at_.begin(), thread_at_.end());
    for (unsigned rank = 0; rank < threads; ++rank) rank_of_[thread_at_[rank]] = rank;
  }

  bool none() const { return count_ == 0; }

  void add(unsigned thread) {
    if (shuffled_) swap_ranks(thread, thread_at_[random_() % thread_at_.size()]);
    set(rank_of_[thread]);
    ++count_;
  }

  unsigned take() {
    while (words_[first_] == 0) ++first_;
    const unsigned bit = static_cast<unsigned>(__builtin_ctzll(words_[first_]));
    words_[first_] &= words_[first_] - 1;
    --count_;
    return thread_at_[first_ * kWord + bit];
  }

 private:
  static constexpr unsigned kWord = 64;

  void set(unsigned rank) {
    words_[rank / kWord] |= uint64_t{1} << rank % kWord;
    first_ = std::min<size_t>(first_, rank / kWord);
  }

  // Of a thread that is not ready and any other.
  void swap_ranks(unsigned thread, unsigned other) {
    unsigned &mine = rank_of_[thread], &its = rank_of_[other];
    uint64_t& word = words_[its / kWord];
    const uint64_t bit = uint64_t{1} << its % kWord;
    if (word & bit) {
      word &= ~bit;
      set(mine);
    }
    std::swap(thread_at_[mine], thread_at_[its]);
    std::swap(mine, its);
  }

  bool shuffled_;
  unsigned count_ = 0;
  std::mt19937& random_;
  std::vector<unsigned> thread_at_, rank_of_;
  std::vector<uint64_t> words_;  // bit i: the thread of rank i is ready
  size_t first_;                 // no word before this one has a bit
};

}  // namespace emulator
