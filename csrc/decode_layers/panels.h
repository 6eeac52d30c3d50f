// Products of a few rows with a weight that is packed into panels: the weight's rows lie side by
// side, one input after the other, so that a vector holds the weights of as many outputs. Nothing
// is summed across a vector, and a panel is read from memory front to back.
//
// T is what the weight is stored in: the model's dtype, or int8 with a scale for each output, which
// a panel begins with. X is what the rows are. Where the weight is int8: whole numbers and a factor
// for each row, int16 by pairs of inputs or, where there is AMX, two rows of int8 for one.
// Otherwise: bfloat16 where the weight is and the processor has such products, by pairs
// (AVX512_BF16) or by matrices (AMX, to which 16 rows are as much work as one); float32 everywhere
// else. A row's sums are made in one order whatever stands beside it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
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
constexpr int64_t kDepth =
    std::is_same_v<X, float> ? 1 : 4 / sizeof(X);  // inputs that lie together

// Whether rows are whole numbers, which a row's factor makes what they were.
template <class X>
constexpr bool kIntegers = std::is_integral_v<X>;

// Rows in memory for each row: of int8 two, its higher and its lower bits (split in rows.h).
template <class X>
constexpr int64_t kSplit = std::is_same_v<X, int8_t> ? 2 : 1;

inline int64_t panels_of(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }

// Elements of a panel before its weights: an int8 panel's scales.
template <class T>
constexpr int64_t kScales = std::is_same_v<T, int8_t> ? kPanel * sizeof(float) : 0;

// Elements of a panel.
template <class T, class X>
inline int64_t panel_size(int64_t in) {
  return kScales<T> + kPanel * padded<X>(in);
}

// Where the outputs of a panel's two vectors lie: one vector's beside the other's or, if bfloat16
// is to be widened, each beside its fellow, so that a shift and a mask make the vectors.
template <class T, class X>
struct PanelOrder {
  static constexpr bool kAlternating = std::is_same_v<T, BFloat16> && std::is_same_v<X, float>;
  static constexpr int64_t kNext = kAlternating ? 2 : kDepth<X>;  // elements from output to output
  static constexpr int64_t kSecond = kAlternating ? 1 : kLanes * kDepth<X>;  // to the second vector
};

// The first of x, at most n, and zeros behind them.
template <class T>
inline Vec load_some(const T* x, int64_t n) {
  return n >= kLanes ? Vec::load(x) : Vec::load(x, n, Vec(0.0f));
}

// The largest |x| of n; NaN where one is not finite.
template <class T>
inline float largest(const T* x, int64_t n) {
  Vec top(0.0f), zeros(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec v = load_some(x + i, n - i);
    top = max(top, max(v, -v));
    zeros = fma(v, Vec(0.0f), zeros);
  }
  return top.hmax() + zeros.hsum();
}

// One vector's outputs of a panel, the first rows of a weight (count, in) that are `ld` apart;
// beyond them they are 0.
template <class X, class T>
inline void pack_half(const T* weight, int64_t count, int64_t in, int64_t ld, T* half,
                      float* /*scales*/) {
  constexpr int64_t kNext = PanelOrder<T, X>::kNext;
  for (int64_t i = 0; i < padded<X>(in); i += kDepth<X>, half += kPanel * kDepth<X>) {
    int64_t o = 0;
    for (; i + kDepth<X> <= in && o < std::min(count, kLanes); ++o) {
      memcpy(half + o * kNext, weight + o * ld + i, kDepth<X> * sizeof(T));
    }
    for (; o < kLanes; ++o) {  // the edges
      for (int64_t j = 0; j < kDepth<X>; ++j) {
        half[o * kNext + j] = o < count && i + j < in ? weight[o * ld + i + j] : T{};
      }
    }
  }
}

// The same in int8, each output as numbers from -127 to 127 times a scale. An output that has a
// weight which is not finite has the scale NaN.
template <class X, class T>
inline void pack_half(const T* weight, int64_t count, int64_t in, int64_t ld, int8_t* half,
                      float* scales) {
  for (int64_t i = 0; i < padded<X>(in); i += kDepth<X>) {
    std::fill_n(half + i * kPanel, kLanes * kDepth<X>, int8_t{0});
  }
  std::fill_n(scales, kLanes, 0.0f);
  for (int64_t o = 0; o < std::min(count, kLanes); ++o, weight += ld) {
    scales[o] = largest(weight, in) / 127.0f;
    if (!(scales[o] >= std::numeric_limits<float>::min())) continue;  // so small weights are 0
    for (int64_t i = 0; i < in; i += kLanes) {
      float whole[kLanes];
      round(load_some(weight + i, in - i) / Vec(scales[o])).store(whole);
      for (int64_t j = 0; j < kLanes && i + j < padded<X>(in); j += kDepth<X>) {
        int8_t* to = half + (i + j) * kPanel + o * PanelOrder<int8_t, X>::kNext;
        for (int64_t k = 0; k < kDepth<X>; ++k) to[k] = static_cast<int8_t>(whole[j + k]);
      }
    }
  }
}

// What is fetched lies so many bytes ahead that it loads while several rows are computed.
constexpr int64_t kAhead = 8192;

inline void fetch(const void* weights, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLineBytes) {
    prefetch_far(static_cast<const char*>(weights) + i);
  }
}

// A panel, the rows to multiply with it, and the caller's numbers for it.
template <class T, class X>
struct Panel {
  const X* x;
  const T* weights;
  int64_t block, index, part;
  bool fresh = false;              // the rows may be in another core's cache
  const float* factors = nullptr;  // of rows of whole numbers
};

// A row's products with a panel.
struct Sums {
  Vec first, second;
};

// Sums made with a panel's weights as they are stored, times their scales.
template <class T>
inline Sums scaled(Sums sums, const T* panel) {
  if constexpr (kScales<T> > 0) {
    const float* scales = reinterpret_cast<const float*>(panel);
    sums = {sums.first * Vec::load(scales), sums.second * Vec::load(scales + kLanes)};
  }
  return sums;
}

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
    prefetch_far(ahead.at);
    if (sizeof(T) * kPanel > kLineBytes) prefetch_far(ahead.at + kLineBytes);
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

// Inputs whose products, with numbers of up to 15 and 7 bits, an int32 can hold.
constexpr int64_t kMostIntegers = 512;

template <int... r>
__attribute__((noinline)) void panel_sums(const int16_t* x, int64_t ld, const int8_t* panel,
                                          int64_t in, Ahead ahead, Sums* sums,
                                          std::integer_sequence<int, r...>) {
  Ints a[sizeof...(r)], b[sizeof...(r)];
  ((a[r] = b[r] = Ints::zero()), ...);
  for (int64_t i = 0; i < in; i += 2, panel += 2 * kPanel, ahead.at += 2 * ahead.step) {
    prefetch_far(ahead.at);
    const Ints w0 = Ints::load(panel), w1 = Ints::load(panel + kPanel);
    Ints v;
    ((v = Ints::pair(x + r * ld + i), a[r] = add_products(a[r], v, w0),
      b[r] = add_products(b[r], v, w1)),
     ...);
  }
  ((sums[r] = {sums[r].first + a[r].floats(), sums[r].second + b[r].floats()}), ...);
}

#if defined(__AVX512BF16__)

template <int... r>
inline void panel_sums(const BFloat16* x, int64_t ld, const BFloat16* panel, int64_t in,
                       Ahead ahead, Sums* sums, std::integer_sequence<int, r...>) {
  Vec a[sizeof...(r)], b[sizeof...(r)];
  ((a[r] = sums[r].first, b[r] = sums[r].second), ...);
  for (int64_t i = 0; i < in; i += 2, panel += 2 * kPanel, ahead.at += 2 * ahead.step) {
    prefetch_far(ahead.at);
    prefetch_far(ahead.at + kLineBytes);
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

// A row's sums from those of its two parts, which are int32.
inline Vec joined(const float* high, const float* low) {
  const auto load = [](const float* p) { return Vec(_mm512_cvtepi32_ps(_mm512_loadu_si512(p))); };
  return fma(load(high), Vec(256.0f), load(low));
}

// panel_products with the matrix registers of AMX. Numbers 0, 1: sums of 16 rows and 16 outputs; 2:
// 16 rows and 32 inputs of x (of int8 64); 3, 4: as many inputs and 16 outputs of a panel. They
// stay set up. Sums are handed over a row at a time between the products that follow: what is made
// of them takes place while these wait for memory.
template <class X, class N, class F>
inline void matrix_products(int64_t rows, int64_t ld, int64_t in, N next, const F& take) {
  using P = Panel<X, X>;
  constexpr int64_t kRows = 16, kLine = 64 / sizeof(X), kInputs = kLine;
  constexpr int64_t kTogetherBytes = kDepth<X> * sizeof(X) * kPanel, kSteps = 4;
  constexpr int64_t kAheadOfMatrices = 4096;
  rows *= kSplit<X>;
  const int64_t tile_rows = std::min(rows, kRows), x_bytes = ld * sizeof(X);
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
    const X *x = panel.x + first * ld, *w = panel.weights + kScales<X>;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t i = 0; i < steps || from < to; ++i) {
      if (i < steps) {
        const auto prefetch_quarter = [&](int64_t quarter) __attribute__((always_inline)) {
          for (int64_t line = 0; line < 8; ++line) {
            prefetch(w + kAheadOfMatrices / sizeof(X) + (8 * quarter + line) * kLine);
          }
        };
        if (panel.fresh && i + kSteps < steps) {
          for (int64_t r = 0; r < tile_rows; ++r) {
            prefetch(x + r * ld + (i + kSteps) * kInputs);
          }
        }
        prefetch_quarter(0);
        _tile_loadd(2, x + i * kInputs, x_bytes);
        prefetch_quarter(1);
        _tile_loadd(3, w, kTogetherBytes);
        prefetch_quarter(2);
        if constexpr (kSplit<X> == 2) {
          _tile_dpbssd(0, 2, 3);
        } else {
          _tile_dpbf16ps(0, 2, 3);
        }
        prefetch_quarter(3);
        _tile_loadd(4, w + kTogetherBytes / 2 / sizeof(X), kTogetherBytes);
        if constexpr (kSplit<X> == 2) {
          _tile_dpbssd(1, 2, 4);
        } else {
          _tile_dpbf16ps(1, 2, 4);
        }
        w += kInputs * kPanel;
      }
      if (from < to) {
        Sums both{Vec::load(sums[0][from]), Vec::load(sums[1][from])};
        const int64_t r = (summed_first + from) / kSplit<X>;
        if constexpr (kSplit<X> == 2) {
          const Vec factor(summed.factors[r]);
          both = {joined(sums[0][from], sums[0][from + 1]) * factor,
                  joined(sums[1][from], sums[1][from + 1]) * factor};
        }
        from += kSplit<X>;
        take(summed, r, scaled(both, summed.weights));
      }
    }
    if (!more) return;
    _tile_stored(0, sums[0], sizeof sums[0][0]);
    _tile_stored(1, sums[1], sizeof sums[1][0]);
    summed = panel, summed_first = first, from = row - first, to = tile_rows;
  }
}

#endif

// panel_products with vectors.
template <class T, class X, class N, class F>
inline void vector_products(int64_t rows, int64_t ld, int64_t depth, N next, const F& take) {
  constexpr int64_t kTiles = 4, kStep = kPanel * sizeof(T);
  constexpr int64_t kMeanwhile = 512;  // bytes that are fetched while a row is taken
  constexpr int64_t kPart = kIntegers<X> ? std::min(kAhead / kStep, kMostIntegers) : kAhead / kStep;
  static_assert(kPart % kDepth<X> == 0);
  constexpr auto kRange = std::make_integer_sequence<int, kTileRows>{};
  // Tiles of rows take their turns at a part of the panel, so that memory is busy during all.
  const int64_t tiles = std::max<int64_t>((rows + kTileRows - 1) / kTileRows, 1);
  const int64_t tile = (rows + tiles - 1) / tiles, together = std::min(tiles, kTiles);
  const int64_t part = kIntegers<X> || together > 1 ? kPart : depth, step = kStep / together;
  for (Panel<T, X> panel; next(panel);) {
    const T* behind = panel.weights + kScales<T> + depth * kPanel + kAhead / sizeof(T);
    for (int64_t row = 0; row < rows; row += together * tile) {
      const int64_t n = std::min(together * tile, rows - row);
      Sums sums[kTiles * kTileRows];
      std::fill_n(sums, n, Sums{Vec(0.0f), Vec(0.0f)});
      for (int64_t i = 0; i < depth; i += part) {
        const int64_t inputs = std::min(part, depth - i);
        const T* weights = panel.weights + kScales<T> + i * kPanel;
        Ahead ahead{reinterpret_cast<const char*>(weights) + kAhead, step};
        for (int64_t r = 0; r < n; r += tile, ahead.at += inputs * step) {
          const auto add = [&](auto range) {
            panel_sums(panel.x + (row + r) * ld + i, ld, weights, inputs, ahead, sums + r, range);
          };
          with_row_count(std::min(tile, n - r), add, kRange);
        }
      }
      for (int64_t r = 0; r < n; ++r) {
        if constexpr (kIntegers<X>) {
          const Vec factor(panel.factors[row + r]);
          sums[r] = {sums[r].first * factor, sums[r].second * factor};
        }
        take(panel, row + r, scaled(sums[r], panel.weights));
        if (row + r < kAhead / kMeanwhile) {
          fetch(behind + (row + r) * kMeanwhile / sizeof(T), kMeanwhile);
        }
      }
    }
  }
}

// The products of rows (`rows`, in), `ld` apart, with panels: next(panel) is true as long as there
// is another, and says which. Calls take(panel, r, sums) for each panel, in their order, and each
// of its rows. Rows and panels have zeros from `in` on to padded(in).
template <class T, class X, class N, class F>
inline void panel_products(int64_t rows, int64_t ld, int64_t in, N next, const F& take) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, X> && !std::is_same_v<X, float>) {
    if (has_amx()) return matrix_products<X>(rows, ld, padded<X>(in), next, take);
  }
#endif
  if constexpr (kSplit<X> == 1) vector_products<T, X>(rows, ld, padded<X>(in), next, take);
}

}  // namespace MTP_SIMD
}  // namespace mtp
