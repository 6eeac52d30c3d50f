// Scalar products of a few rows with many. The many, a weight's rows, are read once from memory,
// where they are; the few stay in the nearest cache. Products of bfloat16 are the processor's own
// where it has them, by pairs (AVX512_BF16) or by matrices (AMX, to which 16 rows are as much work
// as one); everywhere else they are float32. A row's sums are made in one order whatever stands
// beside it.
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
namespace few_rows {

constexpr int kOutputs = 3;                       // rows of the weight at once
constexpr int kRows = Vec::kLanes == 16 ? 8 : 4;  // of x at once: accumulators fill the registers
constexpr int64_t kMatrix = 16;                   // rows of a register of AMX

// The rows of x as products() reads them: where they are; widened, if they are multiplied as
// float32; for AMX, copied so that the same pair of inputs of 16 rows lies side by side.
template <class T>
class Rows {
 public:
  using X = Factor<T>;
  static constexpr int64_t kTogether = kMatrix, kPair = 2;

  // `packed` is memory for packed_size(rows, in) elements, on a cache line.
  Rows(const T* x, int64_t ld, int64_t rows, int64_t in, X* packed)
      : count(rows), in(in), x_(x), ld_(ld), packed_(packed) {}

  static int64_t packed_size(int64_t rows, int64_t in) {
    if (by_matrices<T>()) return blocks_of(rows) * kTogether * padded<T>(in);
    return kWiden ? (rows * in + kLine - 1) / kLine * kLine : 0;
  }

  // Fetches the memory that pack() writes.
  void prepare() const {
    const int64_t size = packed_size(count, in);
    for (int64_t i = 0; i < size; i += kLine) prefetch_to_write(packed_ + i);
  }

  // Of each row, by any thread, before products().
  void pack(int64_t r) const {
    const T* from = x_ + r * ld_;
    if constexpr (kWiden) {
      convert(from, in, packed_ + r * in);
    } else if (by_matrices<T>()) {
      X* to = block(r / kTogether) + r % kTogether * kPair;
      int64_t i = 0;
      for (; i + kPair <= in; i += kPair, to += kStep) memcpy(to, from + i, kPair * sizeof(X));
      for (; i < padded<T>(in); i += kPair, to += kStep) {
        for (int64_t j = 0; j < kPair; ++j) to[j] = i + j < in ? from[i + j] : X{};
      }
    }
  }

  // Row r and, `ld` further on, the next; not for AMX.
  const X* row(int64_t r) const {
    if constexpr (kWiden)
      return packed_ + r * in;
    else
      return x_ + r * ld_;
  }
  int64_t ld() const { return kWiden ? in : ld_; }

  int64_t blocks() const { return blocks_of(count); }
  // Rows [b * kTogether, ...): (padded(in) / kPair, kTogether, kPair).
  X* block(int64_t b) const { return packed_ + b * kTogether * padded<T>(in); }

  const int64_t count, in;

 private:
  static constexpr bool kWiden = !std::is_same_v<T, X>;
  static constexpr int64_t kStep = kTogether * kPair, kLine = kLineBytes / sizeof(X);
  static int64_t blocks_of(int64_t rows) { return (rows + kTogether - 1) / kTogether; }

  const T* const x_;
  const int64_t ld_;
  X* const packed_;
};

// sums[r] = the lanes of a[r] added up, in an order that does not depend on R.
template <int R>
__attribute__((always_inline)) inline void sums_of_lanes(const Vec (&a)[R], float (&sums)[kRows]) {
#if defined(__AVX512F__)
  const auto at = [&](int r) { return r < R ? a[r % R].v : _mm512_setzero_ps(); };
  const auto pairs = [](__m512 p, __m512 q) {
    return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(p, q), _mm512_unpackhi_ps(p, q)));
  };
  for (int r = 0; r < R; r += 4) {
    const __m512d p = pairs(at(r), at(r + 1)), q = pairs(at(r + 2), at(r + 3));
    const __m512 four = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)),
                                      _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
    const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    _mm_storeu_ps(sums + r, _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
  }
#else
  for (int r = 0; r < R; ++r) sums[r] = a[r].hsum();
#endif
}

// What comes next of the weight's rows, into the second-level cache: the processor's own
// prefetching does not run far enough ahead to load while several rows are computed.
template <class T>
void prefetch_next(const T* const (&w)[kOutputs], int64_t i) {
  constexpr int64_t kAhead = 4096 / sizeof(T);
  for (int j = 0; j < kOutputs; ++j) prefetch_far(w[j] + i + kAhead);
}

// sums[j][r] = x[r] . w[j]; row r of x is x + r * ld. The rows are a pack, and what is handed on at
// the end is a copy: accumulators with an index that varies, or an address, would live in memory.
template <class T, int... r>
void float_dots(const float* x, int64_t ld, const T* const (&w)[kOutputs], int64_t n,
                float (&sums)[kOutputs][kRows], std::integer_sequence<int, r...>) {
  const Vec zero(0.0f);
  Vec a[sizeof...(r)], b[sizeof...(r)], c[sizeof...(r)];
  ((a[r] = b[r] = c[r] = zero), ...);
  const auto add = [&](const auto& load) __attribute__((always_inline)) {
    const Vec w0 = load(w[0]), w1 = load(w[1]), w2 = load(w[2]);
    Vec v;
    ((v = load(x + r * ld), a[r] = fma(w0, v, a[r]), b[r] = fma(w1, v, b[r]),
      c[r] = fma(w2, v, c[r])),
     ...);
  };
  int64_t i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) {
    prefetch_next(w, i);
    add([&](const auto* p) { return Vec::load(p + i); });
  }
  if (i < n) add([&](const auto* p) { return Vec::load(p + i, n - i, zero); });
  sums_of_lanes({a[r]...}, sums[0]);
  sums_of_lanes({b[r]...}, sums[1]);
  sums_of_lanes({c[r]...}, sums[2]);
}

#if defined(__AVX512BF16__)

template <int... r>
void bfloat16_dots(const BFloat16* x, int64_t ld, const BFloat16* const (&w)[kOutputs], int64_t n,
                   float (&sums)[kOutputs][kRows], std::integer_sequence<int, r...>) {
  constexpr int64_t kPairs = 2 * Vec::kLanes;
  const Vec zero(0.0f);
  Vec a[sizeof...(r)], b[sizeof...(r)], c[sizeof...(r)];
  ((a[r] = b[r] = c[r] = zero), ...);
  const auto add = [&](const auto& load) __attribute__((always_inline)) {
    const __m512bh w0 = load(w[0]), w1 = load(w[1]), w2 = load(w[2]);
    __m512bh v;
    ((v = load(x + r * ld), a[r] = _mm512_dpbf16_ps(a[r].v, w0, v),
      b[r] = _mm512_dpbf16_ps(b[r].v, w1, v), c[r] = _mm512_dpbf16_ps(c[r].v, w2, v)),
     ...);
  };
  int64_t i = 0;
  for (; i + kPairs <= n; i += kPairs) {
    prefetch_next(w, i);
    add([&](const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p + i); });
  }
  if (i < n) {
    const __mmask32 rest = (1u << (n - i)) - 1u;
    add([&](const BFloat16* p) { return (__m512bh)_mm512_maskz_loadu_epi16(rest, p + i); });
  }
  sums_of_lanes({a[r]...}, sums[0]);
  sums_of_lanes({b[r]...}, sums[1]);
  sums_of_lanes({c[r]...}, sums[2]);
}

#endif

template <int R, class T>
void dots(const Factor<T>* x, int64_t ld, const T* const (&w)[kOutputs], int64_t n,
          float (&sums)[kOutputs][kRows]) {
  constexpr auto rows = std::make_integer_sequence<int, R>{};
  if constexpr (std::is_same_v<Factor<T>, float>) {
    float_dots(x, ld, w, n, sums, rows);
  } else {
    bfloat16_dots(x, ld, w, n, sums, rows);
  }
}

template <class F, int... r>
void with_rows(int64_t rows, const F& f, std::integer_sequence<int, r...>) {
  (void)((rows == r + 1 && (f(std::integral_constant<int, r + 1>{}), true)) || ...);
}

#if defined(__AVX512BF16__)

// products() with the matrix registers of AMX. Numbers 0, 1: sums of 16 outputs and 16 rows; 2, 3:
// 32 inputs of 16 outputs, as they lie in the weight; 4: 32 inputs of 16 rows of x.
template <class F>
void matrix_products(const Rows<BFloat16>& x, const BFloat16* weight, int64_t ld, int64_t out,
                     const F& take) {
  constexpr int64_t kTile = kMatrix, kInputs = 32, kBytes = sizeof(BFloat16),
                    kLine = kInputs * kBytes;
  const __m512i column =
      _mm512_set_epi32(240, 224, 208, 192, 176, 160, 144, 128, 112, 96, 80, 64, 48, 32, 16, 0);
  alignas(64) BFloat16 edges[2][kTile][kInputs];
  alignas(64) float sums[2 * kTile][kTile], outputs[2 * kTile];
  struct Operand {
    const BFloat16* data;
    int64_t step;
  };
  // At the weight's edges a copy with zeros around it: what lies there instead may not be finite.
  const auto operand = [&](int64_t o, int64_t i, BFloat16(&edge)[kTile][kInputs]) -> Operand {
    const BFloat16* from = weight + o * ld + i;
    if (o + kTile <= out && i + kInputs <= x.in) return {from, ld * kBytes};
    const __mmask32 inputs = 0xffffffffu >> (kInputs - std::min(kInputs, x.in - i));
    for (int64_t j = 0; j < kTile; ++j, from += ld) {
      _mm512_store_si512(edge[j], _mm512_maskz_loadu_epi16(o + j < out ? inputs : 0, from));
    }
    return {edge[0], kLine};
  };
  set_up_matrix_registers(kTile);
  for (int64_t o = 0; o < out; o += 2 * kTile) {
    for (int64_t b = 0; b < x.blocks(); ++b) {
      const BFloat16* pairs = x.block(b);
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t i = 0; i < x.in; i += kInputs, pairs += kInputs * kTile) {
        // What comes next, in the order of memory.
        const BFloat16* next = weight + (o + 2 * kTile) * ld + i * 2 * kTile;
        for (int64_t j = 0; j < 2 * kTile; ++j) prefetch_far(next + j * kInputs);
        const Operand first = operand(o, i, edges[0]), second = operand(o + kTile, i, edges[1]);
        _tile_loadd(4, pairs, kLine);
        _tile_loadd(2, first.data, first.step);
        _tile_dpbf16ps(0, 2, 4);
        _tile_loadd(3, second.data, second.step);
        _tile_dpbf16ps(1, 3, 4);
      }
      _tile_stored(0, sums[0], kLine);
      _tile_stored(1, sums[kTile], kLine);
      for (int64_t r = 0; r < std::min(kTile, x.count - b * kTile); ++r) {
        for (int64_t half : {int64_t{0}, kTile}) {
          _mm512_store_ps(outputs + half, _mm512_i32gather_ps(column, sums[half] + r, 4));
        }
        take(b * kTile + r, o, outputs, std::min(2 * kTile, out - o));
      }
    }
  }
}

#endif

// Calls take(r, o, sums, n) so that sums[j] = x[r] . weight[o + j] of each row of x and each of the
// `out` outputs comes once; rows of the weight are `ld` apart. Without AMX the weight is read as
// kOutputs streams side by side: one alone leaves the memory idle.
template <class T, class F>
void products(const Rows<T>& x, const T* weight, int64_t ld, int64_t out, const F& take) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (by_matrices<T>()) return matrix_products(x, weight, ld, out, take);
  }
#endif
  const int64_t share = (out + kOutputs - 1) / kOutputs;
  for (int64_t o = 0; o < share; ++o) {
    const T* w[kOutputs];
    for (int j = 0; j < kOutputs; ++j)
      w[j] = weight + (o + j * share < out ? o + j * share : o) * ld;
    for (int64_t row = 0; row < x.count; row += kRows) {
      const auto tile = [&](auto count) {
        float sums[kOutputs][kRows];
        dots<count>(x.row(row), x.ld(), w, x.in, sums);
        for (int j = 0; j < kOutputs && o + j * share < out; ++j) {
          for (int r = 0; r < count; ++r) take(row + r, o + j * share, &sums[j][r], 1);
        }
      };
      with_rows(std::min<int64_t>(kRows, x.count - row), tile,
                std::make_integer_sequence<int, kRows>{});
    }
  }
}

// Fetches the rows of the weight with which products() begins, if it goes through them in order.
template <class T>
void prefetch_first(const T* weight, int64_t ld, int64_t out) {
  if (!by_matrices<T>()) return;
  const int64_t size = std::min(out, 2 * kMatrix) * ld;
  for (int64_t i = 0; i < size; i += kLineBytes / sizeof(T)) prefetch_far(weight + i);
}

// Outputs of `in` products each that are worth handing to a thread: not too few, two pieces a
// thread, so that one that is disturbed leaves some of its share to the others, and as many whole
// steps of products().
template <class T>
int64_t outputs_per_piece(int64_t out, int64_t in, int threads) {
  constexpr int64_t kSmallest = 16384;
  const int64_t step = by_matrices<T>() ? 2 * kMatrix : kOutputs;
  const int64_t grain =
      std::max(out / (2 * int64_t{threads}), kSmallest / std::max<int64_t>(in, 1));
  return std::max<int64_t>((grain + step - 1) / step, 1) * step;
}

}  // namespace few_rows
}  // namespace MTP_SIMD
}  // namespace mtp
