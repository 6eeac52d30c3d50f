// What a transformer block does with its rows between the products.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "decode_layers/panels.h"

namespace mtp {
namespace MTP_SIMD {

// The sum of squares of x (n).
inline float square_sum(const float* x, int64_t n) {
  Vec sum(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = Vec::load(x + i);
    sum = fma(v, v, sum);
  }
  if (i < n) {
    const Vec v = Vec::load(x + i, n - i, Vec(0.0f));
    sum = fma(v, v, sum);
  }
  return sum.hsum();
}

// Stores the first lanes of v, at most n.
template <class X>
inline void store_some(Vec v, X* y, int64_t n) {
  n >= kLanes ? v.store(y) : v.store(y, n);
}

// RMSNorm of each row of x (rows, n) times `scale`; y may be x. What the rows need of memory, which
// another core may have written, is waited for at once.
template <class X>
inline void normalize(const float* x, int64_t ld, int64_t rows, const float* scale, int64_t n,
                      float eps, X* y, int64_t y_ld) {
  constexpr int64_t kTogether = 16;
  const Vec zero(0.0f);
  for (int64_t row = 0; row < rows; row += kTogether) {
    const int64_t end = std::min(row + kTogether, rows);
    float squares[kTogether];
    for (int64_t r = row; r < end; ++r) squares[r - row] = square_sum(x + r * ld, n);
    for (int64_t r = row; r < end; ++r) {
      const Vec factor(1.0f / std::sqrt(squares[r - row] / static_cast<float>(n) + eps));
      const float* from = x + r * ld;
      X* to = y + r * y_ld;
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) {
        (Vec::load(from + i) * factor * Vec::load(scale + i)).store(to + i);
      }
      if (const int64_t rest = n - i; rest > 0) {
        const Vec weight = Vec::load(scale + i, rest, zero);
        (Vec::load(from + i, rest, zero) * factor * weight).store(to + i, rest);
      }
    }
  }
}

// The same of one row.
template <class X>
inline void normalize(const float* x, const float* scale, int64_t n, float eps, X* y) {
  normalize(x, n, 1, scale, n, eps, y, n);
}

// Of rows as whole numbers, the largest: so that two int8 hold it.
constexpr float kLargestWhole = 127 * 257;

// x (n) as factor * whole; returns the factor, which is not finite if x is not. Zeros follow up to
// a whole vector.
template <class X>
inline float to_whole(const X* x, int64_t n, int16_t* whole) {
  const float top = largest(x, n);
  if (!(top > 1e-34f)) {  // so small rows are 0
    std::fill_n(whole, (n + kLanes - 1) / kLanes * kLanes, int16_t{0});
    return top / kLargestWhole;
  }
  const Vec inverse(kLargestWhole / top);
  for (int64_t i = 0; i < n; i += kLanes) (load_some(x + i, n - i) * inverse).store(whole + i);
  return top / kLargestWhole;
}

#if defined(__AVX512BF16__)

// The same in two int8: factor * (256 * high + low).
template <class X>
inline float split(const X* x, int64_t n, int8_t* high, int8_t* low) {
  const float top = largest(x, n);
  const Vec inverse(top > 0.0f ? kLargestWhole / top : 0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const __m512i whole = _mm512_cvtps_epi32((load_some(x + i, n - i) * inverse).v);
    const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
    _mm_storeu_si128((__m128i*)(high + i), _mm512_cvtepi32_epi8(upper));
    _mm_storeu_si128((__m128i*)(low + i), _mm512_cvtepi32_epi8(whole));
  }
  return top / kLargestWhole;
}

#endif

constexpr float kLog2E = 1.44269504088896341f;

// 2^t within 2e-7, relative, for t from -100 to 0; below it is 2^-100. NaN stays NaN.
inline Vec exp2(Vec t) {
  t = max(Vec(-100.0f), t);  // in this order NaN passes
  const Vec n = round(t), f = t - n;
  // Minimax polynomial of 2^f on [-1/2, 1/2].
  Vec p = fma(Vec(1.326472731e-3f), f, Vec(9.671512991e-3f));
  p = fma(p, f, Vec(5.550733581e-2f));
  p = fma(p, f, Vec(2.402224243e-1f));
  p = fma(p, f, Vec(6.931470037e-1f));
  return scale_by_power(fma(p, f, Vec(1.0f)), n);
}

// y (n) = exp(scale * (scores - max)); returns their sum, before they are rounded.
template <class X>
inline float exponentials(const float* scores, int64_t n, float scale, X* y) {
  const Vec lowest(-std::numeric_limits<float>::infinity());
  Vec max_lanes = lowest, sum(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) max_lanes = max(Vec::load(scores + i), max_lanes);
  if (i < n) max_lanes = max(Vec::load(scores + i, n - i, lowest), max_lanes);
  // Not one fma: of large scores the product's rounding would be large, and the largest not 1.
  const Vec top(max_lanes.hmax()), factor(scale * kLog2E);
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const Vec e = exp2((Vec::load(scores + i) - top) * factor);
    e.store(y + i);
    sum = sum + e;
  }
  if (i < n) {
    const Vec e = exp2((Vec::load(scores + i, n - i, lowest) - top) * factor);
    e.store(y + i, n - i);
    sum = sum + e;
  }
  return sum.hsum();
}

// Where the first of the largest of x (n) is. NaN is no number; where there is none, any place.
inline int64_t index_of_max(const float* x, int64_t n) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  constexpr int64_t kBlock = 16 * kLanes;
  float top = kLowest;
  int64_t at = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    Vec lanes(kLowest);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) lanes = max(Vec::load(x + i), lanes);  // max(NaN, y): y
    if (i < end) lanes = max(Vec::load(x + i, end - i, Vec(kLowest)), lanes);
    const float largest = lanes.hmax();
    if (largest > top) {
      top = largest;
      at = begin;
    }
  }
  while (at < n - 1 && x[at] != top) ++at;
  return at;
}

// silu(gate) * up.
inline Vec gated(Sums gate_up) {
  return gate_up.first * gate_up.second / (Vec(1.0f) + exp(-gate_up.first));
}

}  // namespace MTP_SIMD
}  // namespace mtp
