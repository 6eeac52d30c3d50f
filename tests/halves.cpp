// Runs csrc/common/halves.h with threads that are often away, against one that does all.
#include "common/halves.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

namespace {

constexpr int64_t kModulus = 1000003;

int64_t half_of(int64_t x, int64_t round, int side) {
  return (3 * x + 7 * round + 11 * side) % kModulus;
}

void be_away(std::minstd_rand& random) {
  switch (random() % 12) {
    case 0:
      return std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
    case 1:
      return std::this_thread::yield();
    case 2:
      for (volatile unsigned i = random() % 20000; i > 0; i = i - 1) {
      }
  }
}

}  // namespace

int main(int, char** arguments) {
  std::atomic<int64_t> helped{0}, given{0}, left{0};
  for (unsigned seed = 0; seed < std::strtoul(arguments[1], nullptr, 10); ++seed) {
    const int64_t rounds = 2 * (1 + seed % 20);
    mtp::Halves halves;
    int64_t x[2] = {1, 1}, kept[2], sent[2], last[2];
    const auto go = [&](int me) {
      std::minstd_rand random(2 * seed + me + 1);
      const auto half = [&](int64_t round, int side) {
        be_away(random);
        const int64_t sum = half_of(x[me], round, side);
        (side == me ? kept[me] : sent[(round + side) % 2]) = sum;
        sent[(round + side) % 2] = sum;
        helped += side != me;
        be_away(random);
      };
      const auto join = [&](int64_t round) {
        be_away(random);
        x[me] = (x[me] + kept[me] + sent[(round + 1 - me) % 2]) % kModulus;
      };
      const auto give = [&] { x[1 - me] = x[me], ++given; };
      const bool there = mtp::run_halves(halves, me, rounds, half, join, give);
      last[me] = x[there ? me : 1 - me];
      left += !there;
    };
    std::thread other(go, 1);
    go(0);
    other.join();
    int64_t want = 1;
    for (int64_t round = 1; round <= rounds; ++round) {
      want = (want + half_of(want, round, 0) + half_of(want, round, 1)) % kModulus;
    }
    if (last[0] != want || last[1] != want) {
      return std::printf("seed %u: %ld and %ld, not %ld\n", seed, last[0], last[1], want), 1;
    }
  }
  std::printf("%ld halves done for the other, who came back %ld times and was late %ld\n",
              helped.load(), given.load(), left.load());
  return helped == 0 || given == 0 || left == 0;
}
