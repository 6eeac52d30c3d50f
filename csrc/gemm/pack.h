// How a product on AMX (amx.cpp) reads its operands: as tiles, which are what a register holds.
//
// A tile is 16 rows of 64 bytes. Of A it holds 16 rows and 32 inputs (k); of B 16 pairs of inputs
// and 16 columns, the two of a pair side by side. Taking words of 32 bits for elements, one is the
// transpose of the other.
//
// Tiles are bfloat16. Of float32 there are three, the planes: their sum has all the 24 bits of the
// operand, 8 each.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"

namespace mtp {

constexpr int64_t kTile = 16;              // rows of a tile
constexpr int64_t kPanel = 32;             // rows of A, columns of B, or inputs, that go together
constexpr int64_t kTileSize = 512;         // elements
constexpr int64_t kPlane = 2 * kTileSize;  // 32 rows or columns and 32 inputs
template <class T>
constexpr int kPlanes = std::is_same_v<T, float> ? 3 : 1;
template <class T>
constexpr int64_t kStep = kPlanes<T> * kPlane;

inline void transpose(__m512i (&x)[16]) {
  __m512i y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  // Quarter q of x[4 g + c] is now column 4 q + c of rows 4 g to 4 g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    y[c] = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88);  // quarters 0 and 2 of both
    y[4 + c] = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xdd);
    y[8 + c] = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88);
    y[12 + c] = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xdd);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    x[c] = _mm512_shuffle_i32x4(y[c], y[8 + c], 0x88);
    x[4 + c] = _mm512_shuffle_i32x4(y[4 + c], y[12 + c], 0x88);
    x[8 + c] = _mm512_shuffle_i32x4(y[c], y[8 + c], 0xdd);
    x[12 + c] = _mm512_shuffle_i32x4(y[4 + c], y[12 + c], 0xdd);
  }
}

// The upper halves of 32 words, one vector's after the other's.
inline __m512i behind(__m512 x, __m512 next) {
  struct alignas(64) Odd {
    uint16_t index[32] = {};
    constexpr Odd() {
      for (int i = 0; i < 32; ++i) index[i] = static_cast<uint16_t>(2 * i + 1);
    }
  };
  static constexpr Odd kOdd;
  return _mm512_permutex2var_epi16(_mm512_castps_si512(x), _mm512_load_si512(&kOdd),
                                   _mm512_castps_si512(next));
}

// The same, alternating.
inline __m512i beside(__m512 x, __m512 next) {
  return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(x), 16),
                                 _mm512_castps_si512(next));
}

// 8 bits of x, and in x what is left. Rounded they are the nearest; cut off, they cannot overflow.
inline __m512 take_bits(__m512& x, bool rounded) {
  const __m512i half = _mm512_set1_epi32(rounded ? 0x8000 : 0);
  const __m512 taken = _mm512_castsi512_ps(_mm512_and_si512(
      _mm512_add_epi32(_mm512_castps_si512(x), half), _mm512_set1_epi32(0xffff0000)));
  x = _mm512_sub_ps(x, taken);
  return taken;
}

// The planes of two vectors, joined. The last needs no rounding, and has a NaN for each number that
// is not finite.
template <class F>
inline void split(__m512 x, __m512 next, const F& join, __m512i (&planes)[3]) {
  for (int plane = 0; plane < 3; ++plane) {
    const __m512 bits = take_bits(x, plane == 1);
    planes[plane] = join(bits, take_bits(next, plane == 1));
  }
}

inline __mmask32 first_of(int64_t n) {
  if (n <= 0) return 0;
  return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
}

// 32 elements, the first n of them from memory and then zeros.
inline void load_row(const BFloat16* x, int64_t n, __m512i (&planes)[1]) {
  planes[0] = _mm512_maskz_loadu_epi16(first_of(n), x);
}
inline void load_row(const float* x, int64_t n, __m512i (&planes)[3]) {
  split(_mm512_maskz_loadu_ps(static_cast<__mmask16>(first_of(n)), x),
        _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_of(n - 16)), x + 16), behind, planes);
}

// 16 pairs of an element of x and one of `next`, the first n of x and m of `next` from memory.
inline void load_pairs(const BFloat16* x, int64_t n, const BFloat16* next, int64_t m,
                       __m512i (&planes)[1]) {
  const auto words = [](const BFloat16* row, int64_t count) {
    const __mmask16 mask = static_cast<__mmask16>(first_of(count));
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
  };
  planes[0] = _mm512_or_si512(words(x, n), _mm512_slli_epi32(words(next, m), 16));
}
inline void load_pairs(const float* x, int64_t n, const float* next, int64_t m,
                       __m512i (&planes)[3]) {
  split(_mm512_maskz_loadu_ps(static_cast<__mmask16>(first_of(n)), x),
        _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_of(m)), next), beside, planes);
}

// An operand, seen as `outers` (rows of A, columns of B) that have `inners` (inputs) each.
template <class T, bool kIsA>
struct Operand {
  const T* data;
  int64_t ld;
  bool inner_contiguous;  // inputs of an outer lie side by side; otherwise outers of an input do
  int64_t outers, inners;

  // A panel: 32 outers and inputs [begin, begin + depth), zero beyond the operand.
  void pack_panel(int64_t outer, int64_t begin, int64_t depth, BFloat16* to) const {
    for (int64_t i = 0; i < depth; i += kPanel, to += kStep<T>) {
      pack_tiles(outer, begin + i, to);
      pack_tiles(outer + kTile, begin + i, to + kTileSize);
    }
  }

 private:
  // A tile of every plane.
  void pack_tiles(int64_t outer, int64_t inner, BFloat16* to) const {
    const int64_t n_outers = outers - outer, n_inners = inners - inner;
    __m512i tiles[kPlanes<T>][16], planes[kPlanes<T>];
    for (int64_t i = 0; i < 16; ++i) {
      if (inner_contiguous) {
        load_row(data + (outer + i) * ld + inner, i < n_outers ? n_inners : 0, planes);
      } else {
        const T* row = data + (inner + 2 * i) * ld + outer;
        load_pairs(row, 2 * i < n_inners ? n_outers : 0, row + ld,
                   2 * i + 1 < n_inners ? n_outers : 0, planes);
      }
      for (int plane = 0; plane < kPlanes<T>; ++plane) tiles[plane][i] = planes[plane];
    }
    for (int plane = 0; plane < kPlanes<T>; ++plane, to += kPlane) {
      if (kIsA != inner_contiguous) transpose(tiles[plane]);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(to + i * 32, tiles[plane][i]);
    }
  }
};

}  // namespace mtp
