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
constexpr int64_t kPanel = 2 * kLanes;  // outputs of a panel: two vectors
// Rows of x at once: as many as let their sums stay in registers.
constexpr int kTileRows = kLanes == 16 ? 8 : kLanes == 8 ? 6 : 4;

template <class X>
constexpr int64_t kDepth = std::is_same_v<X, BFloat16> ? 2 : 1;  // inputs that lie together

inline int64_t panels_of(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

// Elements of a panel.
template <class X>
inline int64_t panel_size(int64_t in) {
  return kPanel * padded<X>(in);
}

// Where the outputs of a panel's two vectors lie: one vector's beside the other's or, if bfloat16
// is to be widened, each beside its fellow, so that a shift and a mask make the vectors.
template <class T, class X>
struct PanelOrder {
  static constexpr bool kAlternating = std::is_same_v<T, BFloat16> && std::is_same_v<X, float>;
  static constexpr int64_t kNext = kAlternating ? 2 : kDepth<X>;  // elements from output to output
  static constexpr int64_t kSecond = kAlternating ? 1 : kLanes * kDepth<X>;  // to the second vector
};

// One vector's outputs of a panel, the first rows of a weight (count, in); beyond them they are 0.
template <class X, class T>
inline void pack_half(const T* weight, int64_t count, int64_t in, T* half) {
  constexpr int64_t kNext = PanelOrder<T, X>::kNext;
  for (int64_t i = 0; i < padded<X>(in); i += kDepth<X>, half += kPanel * kDepth<X>) {
    int64_t o = 0;
    for (; i + kDepth<X> <= in && o < std::min(count, kLanes); ++o) {
      memcpy(half + o * kNext, weight + o * in + i, kDepth<X> * sizeof(T));
    }
    for (; o < kLanes; ++o) {  // the edges
      for (int64_t j = 0; j < kDepth<X>; ++j) {
        half[o * kNext + j] = o < count && i + j < in ? weight[o * in + i + j] : T{};
      }
    }
  }
}

// What is fetched lies so many bytes ahead that it loads while several rows are computed.
constexpr int64_t kAhead = 4096;
inline void prefetch_ahead(const void* p) { prefetch(static_cast<const char*>(p) + kAhead); }

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

// Where a pass over a panel fetches what comes next: `step` bytes further with each input.
struct Ahead {
  const char* at;
  int64_t step;
};

// sums += products. Rows of x are `ld` apart. The rows are a pack, since sums with an index that
// varies would live in memory. Not inline: the compiler keeps the caller's constants in registers,
// and has none left for the sums.
template <class T, int... r>
__attribute__((noinline)) void panel_sums(const float* x, int64_t ld, const T* panel, int64_t in,
                                          Ahead ahead, Sums* sums,
                                          std::integer_sequence<int, r...>) {
  Vec a[sizeof...(r)], b[sizeof...(r)];
  ((a[r] = sums[r].first, b[r] = sums[r].second), ...);
  for (int64_t i = 0; i < in; ++i, panel += kPanel, ahead.at += ahead.step) {
    prefetch(ahead.at);
    if (sizeof(T) * kPanel > kLineBytes) prefetch(ahead.at + kLineBytes);
    Vec w0, w1, v;
    if constexpr (PanelOrder<T, float>::kAlternating) {
      w0 = Vec::load_even(panel), w1 = Vec::load_odd(panel);
    } else {
      w0 = Vec::load(panel), w1 = Vec::load(panel + kLanes);
    }
    ((v = Vec(x[r * ld + i]), a[r] = fma(v, w0, a[r]), b[r] = fma(v, w1, b[r])), ...);
  }
  ((sums[r] = {a[r], b[r]}), ...);
}

#if defined(__AVX512BF16__)

template <int... r>
inline void panel_sums(const BFloat16* x, int64_t ld, const BFloat16* panel, int64_t in,
                       Ahead ahead, Sums* sums, std::integer_sequence<int, r...>) {
  Vec a[sizeof...(r)], b[sizeof...(r)];
  ((a[r] = sums[r].first, b[r] = sums[r].second), ...);
  for (int64_t i = 0; i < in; i += 2, panel += 2 * kPanel, ahead.at += 2 * ahead.step) {
    prefetch(ahead.at);
    prefetch(ahead.at + kLineBytes);
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
  ((sums[r] = {a[r], b[r]}), ...);
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
  constexpr int64_t kPairBytes = 2 * sizeof(BFloat16) * kPanel, kSteps = 4;
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
        if (panel.fresh && i + kSteps < steps) {
          for (int64_t r = 0; r < tile_rows; ++r) {
            prefetch(x + r * ld + (i + kSteps) * kInputs);
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
  constexpr int64_t kTiles = 4, kStep = kPanel * sizeof(T);
  static_assert(kAhead / kStep % kDepth<X> == 0);
  constexpr auto kRange = std::make_integer_sequence<int, kTileRows>{};
  const int64_t depth = padded<X>(in);
  // Tiles of rows take their turns at a part of the panel, so that memory is busy during all.
  const int64_t tiles = std::max<int64_t>((rows + kTileRows - 1) / kTileRows, 1);
  const int64_t tile = (rows + tiles - 1) / tiles, together = std::min(tiles, kTiles);
  const int64_t part = together > 1 ? kAhead / kStep : depth, step = kStep / together;
  for (Panel<T, X> panel; next(panel);) {
    for (int64_t row = 0; row < rows; row += together * tile) {
      const int64_t n = std::min(together * tile, rows - row);
      Sums sums[kTiles * kTileRows];
      std::fill_n(sums, n, Sums{Vec(0.0f), Vec(0.0f)});
      for (int64_t i = 0; i < depth; i += part) {
        const int64_t inputs = std::min(part, depth - i);
        const T* weights = panel.weights + i * kPanel;
        Ahead ahead{reinterpret_cast<const char*>(weights) + kAhead, step};
        for (int64_t r = 0; r < n; r += tile, ahead.at += inputs * step) {
          const auto add = [&](auto range) {
            panel_sums(panel.x + (row + r) * ld + i, ld, weights, inputs, ahead, sums + r, range);
          };
          with_row_count(std::min(tile, n - r), add, kRange);
        }
      }
      for (int64_t r = 0; r < n; ++r) take(panel, row + r, sums[r]);
    }
  }
}

}  // namespace MTP_SIMD
}  // namespace mtp
