// Scalar products of a few rows with many, the work of a decode step: the many (a weight's rows, or
// cached keys) are read once, the few stay in the nearest cache. With AVX512_BF16 the bfloat16
// products are the processor's own pair products; everywhere else they are float32. A row's sums
// are made in one order whatever stands beside it.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/simd.h"

namespace mtp {
namespace MTP_SIMD {

constexpr int kRows = 8;     // of x at once
constexpr int kOutputs = 2;  // rows of the weight at once

// sums[r] = the lanes of a[r] added up, in an order that does not depend on R.
#if defined(__AVX512F__)

template <int R>
inline void sums_of_lanes(const Vec (&a)[R], float* sums) {
  const auto at = [&](int r) { return r < R ? a[r % R].v : _mm512_setzero_ps(); };
  const auto pairs = [](__m512 p, __m512 q) {
    return _mm512_add_ps(_mm512_unpacklo_ps(p, q), _mm512_unpackhi_ps(p, q));
  };
  const auto fours = [](__m512 p, __m512 q) {
    const __m512d x = _mm512_castps_pd(p), y = _mm512_castps_pd(q);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  };
  const __m512 low = fours(pairs(at(0), at(1)), pairs(at(2), at(3)));
  const __m512 high = fours(pairs(at(4), at(5)), pairs(at(6), at(7)));
  __m512 all =
      _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x44), _mm512_shuffle_f32x4(low, high, 0xee));
  all = _mm512_add_ps(all, _mm512_shuffle_f32x4(all, all, 0xb1));
  _mm_storeu_ps(sums, _mm512_castps512_ps128(all));
  _mm_storeu_ps(sums + 4, _mm512_extractf32x4_ps(all, 2));
}

#else

template <int R>
inline void sums_of_lanes(const Vec (&a)[R], float* sums) {
  for (int r = 0; r < R; ++r) sums[r] = a[r].hsum();
}

#endif

// The weight's rows lie one behind the other, so this is what comes next of them. The processor's
// own prefetching does not run far enough ahead to load while several rows are computed.
template <class T>
inline void prefetch(const T* const (&w)[kOutputs], int64_t i) {
  constexpr int64_t kAhead = 8192 / sizeof(T);
  for (int j = 0; j < kOutputs; ++j) __builtin_prefetch(w[j] + i + kAhead);
}

// sums[j][r] = x[r] . w[j]; row r of x is x + r * ld. The rows are a pack: accumulators whose index
// is a loop's variable would be kept in memory.
template <class T, int... r>
inline void float_dots(const T* x, int64_t ld, const T* const (&w)[kOutputs], int64_t n,
                       float (&sums)[kOutputs][kRows], std::integer_sequence<int, r...>) {
  Vec a[sizeof...(r)] = {}, b[sizeof...(r)] = {}, v;
  int64_t i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) {
    prefetch(w, i);
    const Vec w0 = Vec::load(w[0] + i), w1 = Vec::load(w[1] + i);
    ((v = Vec::load(x + r * ld + i), a[r] = fma(w0, v, a[r]), b[r] = fma(w1, v, b[r])), ...);
  }
  if (const int64_t rest = n - i; rest > 0) {
    const Vec zero(0.0f);
    const Vec w0 = Vec::load(w[0] + i, rest, zero), w1 = Vec::load(w[1] + i, rest, zero);
    ((v = Vec::load(x + r * ld + i, rest, zero), a[r] = fma(w0, v, a[r]), b[r] = fma(w1, v, b[r])),
     ...);
  }
  sums_of_lanes(a, sums[0]);
  sums_of_lanes(b, sums[1]);
}

#if defined(__AVX512F__)

template <int... r>
__attribute__((target("avx512bf16"))) inline void bfloat16_dots(
    const BFloat16* x, int64_t ld, const BFloat16* const (&w)[kOutputs], int64_t n,
    float (&sums)[kOutputs][kRows], std::integer_sequence<int, r...>) {
  Vec a[sizeof...(r)] = {}, b[sizeof...(r)] = {};
  __m512bh v;
  for (int64_t i = 0; i < n; i += 32) {
    prefetch(w, i);
    const __mmask32 here = n - i >= 32 ? ~0u : (1u << (n - i)) - 1u;
    const auto w0 = (__m512bh)_mm512_maskz_loadu_epi16(here, w[0] + i);
    const auto w1 = (__m512bh)_mm512_maskz_loadu_epi16(here, w[1] + i);
    ((v = (__m512bh)_mm512_maskz_loadu_epi16(here, x + r * ld + i),
      a[r] = _mm512_dpbf16_ps(a[r].v, w0, v), b[r] = _mm512_dpbf16_ps(b[r].v, w1, v)),
     ...);
  }
  sums_of_lanes(a, sums[0]);
  sums_of_lanes(b, sums[1]);
}

inline bool has_bfloat16_dots() {
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
}

#endif

template <int R, class T>
inline void dots(const T* x, int64_t ld, const T* const (&w)[kOutputs], int64_t n,
                 float (&sums)[kOutputs][kRows]) {
  constexpr auto rows = std::make_integer_sequence<int, R>{};
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (has_bfloat16_dots()) return bfloat16_dots(x, ld, w, n, sums, rows);
  }
#endif
  float_dots(x, ld, w, n, sums, rows);
}

// Calls f(first, count) for tiles of up to kRows rows, `count` as a constant.
template <class F>
inline void for_row_tiles(int64_t rows, const F& f) {
  for (int64_t first = 0; first < rows; first += kRows) {
    switch (rows - first) {
      case 1:
        f(first, std::integral_constant<int, 1>{});
        break;
      case 2:
        f(first, std::integral_constant<int, 2>{});
        break;
      case 3:
        f(first, std::integral_constant<int, 3>{});
        break;
      case 4:
        f(first, std::integral_constant<int, 4>{});
        break;
      case 5:
        f(first, std::integral_constant<int, 5>{});
        break;
      case 6:
        f(first, std::integral_constant<int, 6>{});
        break;
      case 7:
        f(first, std::integral_constant<int, 7>{});
        break;
      default:
        f(first, std::integral_constant<int, kRows>{});
    }
  }
}

// Calls take(r, o, x[r] . weight[o]) for all rows of x and outputs [begin, end).
template <class T, class F>
inline void products(const T* x, int64_t rows, const T* weight, int64_t weight_ld, int64_t in,
                     int64_t begin, int64_t end, const F& take) {
  for_row_tiles(rows, [&](int64_t row, auto count) {
    for (int64_t o = begin; o < end; o += kOutputs) {
      const T* first = weight + o * weight_ld;
      const bool both = o + 1 < end;
      float sums[kOutputs][kRows];
      dots<count>(x + row * in, in, {first, both ? first + weight_ld : first}, in, sums);
      for (int r = 0; r < count; ++r) {
        take(row + r, o, sums[0][r]);
        if (both) take(row + r, o + 1, sums[1][r]);
      }
    }
  });
}

// Outputs of `in` products each that are worth handing to a thread: not too few, and four pieces a
// thread, so that one that is disturbed leaves its share to the others.
inline int64_t outputs_per_piece(int64_t out, int64_t in, int threads) {
  constexpr int64_t kSmallest = 16384;
  const int64_t pieces = out / (4 * int64_t{threads});
  const int64_t smallest = kSmallest / (in > 0 ? in : 1);
  const int64_t grain = pieces > smallest ? pieces : smallest;
  return grain + kOutputs - grain % kOutputs;
}

}  // namespace MTP_SIMD
}  // namespace mtp
