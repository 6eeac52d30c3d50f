// Products of a few rows with a weight that is packed into panels: the weight's rows lie side by
// side, one input after the other, so that a vector holds the weights of as many outputs. Nothing
// is summed across a vector, and a panel is read from memory front to back.
//
// T is what the weight is stored in, X what the rows are: bfloat16 where the processor has products
// of bfloat16, by pairs of inputs (AVX512_BF16) or by matrices (AMX, to which 16 rows are as much
// work as one); float32 everywhere else. A row's sums are made in one order whatever stands beside
// it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/matrix_registers.h"
#include "common/prefetch.h"
#include "common/simd.h"
#include "common/simd_level.h"

namespace mtp {
namespace MTP_SIMD {

constexpr int64_t kLanes = Vec::kLanes;
constexpr int64_t kPanel = 2 * kLanes;           // outputs of a panel: two vectors
constexpr int kTileRows = kLanes == 16 ? 8 : 4;  // of x at once: the sums stay in registers

template <class X>
constexpr int64_t kDepth = std::is_same_v<X, BFloat16> ? 2 : 1;  // inputs that lie together

inline int64_t panels_of(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

// Elements of a panel.
template <class X>
inline int64_t panel_size(int64_t in) {
  return kPanel * padded<X>(in);
}

// Half of a panel from the first rows of a weight (count, in); outputs beyond them are 0.
template <class X, class T>
inline void pack_half(const T* weight, int64_t count, int64_t in, T* half) {
  constexpr int64_t kBytes = kDepth<X> * sizeof(T), kStep = kPanel * kDepth<X>;
  const auto pack = [&](int64_t i, T* to, auto bytes) {
    for (int64_t o = 0; o < std::min(count, kLanes); ++o) {
      memcpy(to + o * kDepth<X>, weight + o * in + i, bytes);
    }
  };
  const int64_t whole = in / kDepth<X>;
  for (int64_t i = 0; i < panel_size<X>(in) / kStep; ++i) {
    T* to = half + i * kStep;
    if (count < kLanes || i >= whole) memset(to, 0, kBytes * kLanes);
    if (i < whole) {
      pack(i * kDepth<X>, to, std::integral_constant<size_t, kBytes>{});
    } else if (i * kDepth<X> < in) {
      pack(i * kDepth<X>, to, std::integral_constant<size_t, sizeof(T)>{});
    }
  }
}

// Into the nearest cache, so many bytes ahead that it loads while several rows are computed.
inline void prefetch_ahead(const void* p) {
  constexpr int64_t kAhead = 4096;
  prefetch(static_cast<const char*>(p) + kAhead);
}

// A panel, the rows to multiply with it, and the caller's numbers for it.
template <class T, class X>
struct Panel {
  const X* x;
  const T* weights;
  int64_t block, index, part;
  bool fresh = false;  // the rows may be in another core's cache
};

// A row's products with a panel.
struct Sums {
  Vec first, second;
};

// Rows of x are `ld` apart. The rows are a pack, since sums with an index that varies would live in
// memory.
template <class T, int... r>
inline void panel_sums(const float* x, int64_t ld, const T* panel, int64_t in, Sums* out,
                       std::integer_sequence<int, r...>) {
  Vec a[sizeof...(r)], b[sizeof...(r)];
  ((a[r] = b[r] = Vec(0.0f)), ...);
  for (int64_t i = 0; i < in; ++i, panel += kPanel) {
    prefetch_ahead(panel);
    if (sizeof(T) * kPanel > 64) prefetch_ahead(panel + kLanes);
    const Vec w0 = Vec::load(panel), w1 = Vec::load(panel + kLanes);
    Vec v;
    ((v = Vec(x[r * ld + i]), a[r] = fma(v, w0, a[r]), b[r] = fma(v, w1, b[r])), ...);
  }
  ((out[r] = {a[r], b[r]}), ...);
}

#if defined(__AVX512BF16__)

template <int... r>
inline void panel_sums(const BFloat16* x, int64_t ld, const BFloat16* panel, int64_t in, Sums* out,
                       std::integer_sequence<int, r...>) {
  Vec a[sizeof...(r)], b[sizeof...(r)];
  ((a[r] = b[r] = Vec(0.0f)), ...);
  for (int64_t i = 0; i < in; i += 2, panel += 2 * kPanel) {
    prefetch_ahead(panel);
    prefetch_ahead(panel + kPanel);
    const __m512bh w0 = (__m512bh)_mm512_loadu_si512(panel);
    const __m512bh w1 = (__m512bh)_mm512_loadu_si512(panel + kPanel);
    const auto pair = [](const BFloat16* p) {
      int32_t two;
      memcpy(&two, p, sizeof two);
      return (__m512bh)_mm512_set1_epi32(two);
    };
    __m512bh v;
    ((v = pair(x + r * ld + i), a[r] = _mm512_dpbf16_ps(a[r].v, w0, v),
      b[r] = _mm512_dpbf16_ps(b[r].v, w1, v)),
     ...);
  }
  ((out[r] = {a[r], b[r]}), ...);
}

#endif

template <class F, int... r>
inline void with_row_count(int64_t rows, const F& f, std::integer_sequence<int, r...>) {
  (void)((rows == r + 1 && (f(std::make_integer_sequence<int, r + 1>{}), true)) || ...);
}

#if defined(__AVX512BF16__)

// panel_products with the matrix registers of AMX. Numbers 0, 1: sums of 16 rows and 16 outputs; 2:
// 16 rows and 32 inputs of x; 3, 4: 32 inputs and 16 outputs of a panel. They stay set up. Sums are
// handed over a row at a time between the products that follow: what is made of them takes place
// while these wait for memory.
template <class N, class F>
inline void matrix_products(int64_t rows, int64_t ld, int64_t in, N next, const F& take) {
  using P = Panel<BFloat16, BFloat16>;
  constexpr int64_t kRows = 16, kInputs = 32, kLine = 64 / sizeof(BFloat16);
  constexpr int64_t kPairBytes = 2 * sizeof(BFloat16) * kPanel, kAhead = 4;
  const int64_t tile_rows = std::min(rows, kRows), x_bytes = ld * sizeof(BFloat16);
  set_up_matrix_registers(tile_rows);
  alignas(64) float sums[2][kRows][kLanes];
  P panel{}, summed{};  // the present one, and the one that the sums are of
  int64_t row = rows, summed_first = 0, from = 0, to = 0;  // which of its rows are to be taken
  for (bool more = true;; row += kRows) {
    if (row >= rows) {
      more = next(panel);
      row = 0;
      // What it made of x has to be stored: the intrinsics do not say that they read.
      __asm__ volatile("" : : : "memory");
    }
    const int64_t first = std::min(row, rows - tile_rows);  // the last tile may begin early
    const int64_t steps = more ? in / kInputs : 0;
    const BFloat16 *x = panel.x + first * ld, *w = panel.weights;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t i = 0; i < steps || from < to; ++i) {
      if (i < steps) {
        const auto prefetch_quarter = [&](int64_t quarter) __attribute__((always_inline)) {
          for (int64_t line = 0; line < 8; ++line) prefetch_ahead(w + (8 * quarter + line) * kLine);
        };
        if (panel.fresh && i + kAhead < steps) {
          for (int64_t r = 0; r < tile_rows; ++r) {
            prefetch(x + r * ld + (i + kAhead) * kInputs);
          }
        }
        prefetch_quarter(0);
        _tile_loadd(2, x + i * kInputs, x_bytes);
        prefetch_quarter(1);
        _tile_loadd(3, w, kPairBytes);
        prefetch_quarter(2);
        _tile_dpbf16ps(0, 2, 3);
        prefetch_quarter(3);
        _tile_loadd(4, w + kPanel, kPairBytes);
        _tile_dpbf16ps(1, 2, 4);
        w += kInputs * kPanel;
      }
      if (from < to) {
        const Sums both{Vec::load(sums[0][from]), Vec::load(sums[1][from])};
        take(summed, summed_first + from++, both);
      }
    }
    if (!more) return;
    _tile_stored(0, sums[0], sizeof sums[0][0]);
    _tile_stored(1, sums[1], sizeof sums[1][0]);
    summed = panel, summed_first = first, from = row - first, to = tile_rows;
  }
}

#endif

// The products of rows (`rows`, in), `ld` apart, with panels: next(panel) is true as long as there
// is another, and says which. Calls take(panel, r, sums) for each panel, in their order, and each
// of its rows. Rows and panels have zeros from `in` on to padded(in).
template <class T, class X, class N, class F>
inline void panel_products(int64_t rows, int64_t ld, int64_t in, N next, const F& take) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<X, BFloat16>) {
    if (has_amx()) return matrix_products(rows, ld, padded<X>(in), next, take);
  }
#endif
  for (Panel<T, X> panel; next(panel);) {
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int64_t n = std::min<int64_t>(kTileRows, rows - row);
      Sums sums[kTileRows];
      with_row_count(
          n,
          [&](auto tile) {
            panel_sums(panel.x + row * ld, ld, panel.weights, padded<X>(in), sums, tile);
          },
          std::make_integer_sequence<int, kTileRows>{});
      for (int64_t r = 0; r < n; ++r) take(panel, row + r, sums[r]);
    }
  }
}

}  // namespace MTP_SIMD
}  // namespace mtp
