// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11): a
// counter-based generator. A draw is a pure function of (key, counter), so it is the same on every
// backend, at any thread count and in any place of a batch.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace mtp {

struct PhiloxWords {
  uint32_t word[4];
};

MTP_HD inline PhiloxWords philox4x32_10(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  uint32_t (&c)[4] = counter.word;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t low0 = static_cast<uint32_t>(product0), low1 = static_cast<uint32_t>(product1);
    const uint32_t high0 = static_cast<uint32_t>(product0 >> 32);
    const uint32_t high1 = static_cast<uint32_t>(product1 >> 32);
    c[0] = high1 ^ c[1] ^ key0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ key1;
    c[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// A uniform from 32 random bits: the middle of one of 2^24 equal intervals, so never 0 or 1. In
// double, since the last of them would round to 1 in float.
MTP_HD inline double uniform_of(uint32_t bits) {
  return (static_cast<double>(bits >> 8) + 0.5) * 0x1p-24;
}

}  // namespace mtp
