// A vector of floats as wide as the instruction set of this translation unit, with the loads,
// stores and functions that the CPU kernels need. Three bodies, one interface: AVX-512 (16 lanes),
// AVX2 (8) and the compiler's portable vectors (4).
//
// Everything lives in a namespace named after the level (mtp::avx512, ...): code that was compiled
// for another level must never be linked in its place.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/macros.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mtp {
namespace MTP_SIMD {

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kLanes = 16;
  using Mask = __mmask16;
  __m512 v;

  Vec() = default;
  Vec(__m512 x) : v(x) {}
  explicit Vec(float x) : v(_mm512_set1_ps(x)) {}

  static Mask first(int64_t n) { return static_cast<Mask>((1u << n) - 1u); }

  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static Vec load(const BFloat16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  static Vec load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  // p[0], p[2], ... and p[1], p[3], ...
  static Vec load_even(const BFloat16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
  }
  static Vec load_odd(const BFloat16* p) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), high));
  }
  static Vec load(const float* p, int64_t n, Vec fill) {
    return _mm512_mask_loadu_ps(fill.v, first(n), p);
  }
  static Vec load(const BFloat16* p, int64_t n, Vec fill) {
    const Vec x = widen(_mm256_maskz_loadu_epi16(first(n), p));
    return _mm512_mask_blend_ps(first(n), fill.v, x.v);
  }
  static Vec load(const Half* p, int64_t n, Vec fill) {
    const __m512 x = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
    return _mm512_mask_blend_ps(first(n), fill.v, x);
  }

  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(BFloat16* p) const { _mm256_storeu_si256((__m256i*)p, narrow()); }
  void store(Half* p) const { _mm256_storeu_si256((__m256i*)p, half()); }
  // The nearest whole numbers.
  void store(int16_t* p) const {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v)));
  }
  void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  void store(BFloat16* p, int64_t n) const { _mm256_mask_storeu_epi16(p, first(n), narrow()); }
  void store(Half* p, int64_t n) const { _mm256_mask_storeu_epi16(p, first(n), half()); }

  friend Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
  friend Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
  friend Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
  friend Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
  friend Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
  // As the instruction has it: b where either is NaN.
  friend Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
  friend Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
  friend Vec round(Vec a) {
    return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // x * 2^n for integral n from -125 to 128, the range of every level. Slow where the result is
  // subnormal.
  friend Vec scale_by_power(Vec x, Vec n) { return _mm512_scalef_ps(x.v, n.v); }

  // Bit i is set where lane i of a equals b.
  friend uint32_t equal_lanes(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
  friend bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0; }
  friend Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v);
  }
  float hmax() const { return _mm512_reduce_max_ps(v); }
  float hsum() const { return _mm512_reduce_add_ps(v); }

 private:
  static Vec widen(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  __m256i narrow() const {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(v);  // subnormals become 0
#else
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const Mask nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
  }
  __m256i half() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

// Sums of products of whole numbers, as many as Vec has lanes. Operands are pairs of int16: a lane
// adds both products of its pair.
struct Ints {
  __m512i v;

  static Ints zero() { return {_mm512_setzero_si512()}; }
  static Ints load(const int8_t* p) {
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p))};
  }
  static Ints pair(const int16_t* p) {  // the same for every lane
    int32_t both;
    memcpy(&both, p, sizeof both);
    return {_mm512_set1_epi32(both)};
  }
  friend Ints add_products(Ints sum, Ints a, Ints b) {
#if defined(__AVX512VNNI__)
    return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)};
#else
    return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v))};
#endif
  }
  Vec floats() const { return _mm512_cvtepi32_ps(v); }
};

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;

  Vec() = default;
  Vec(__m256 x) : v(x) {}
  explicit Vec(float x) : v(_mm256_set1_ps(x)) {}

  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static Vec load(const BFloat16* p) {
    const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
  }
  static Vec load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  // p[0], p[2], ... and p[1], p[3], ...
  static Vec load_even(const BFloat16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16));
  }
  static Vec load_odd(const BFloat16* p) {
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), high));
  }
  template <class T>
  static Vec load(const T* p, int64_t n, Vec fill) {
    float lanes[kLanes];
    fill.store(lanes);
    for (int64_t i = 0; i < n; ++i) lanes[i] = to_float(p[i]);
    return load(lanes);
  }

  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(BFloat16* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(high),
                                                   _mm256_extracti128_si256(high, 1)));
  }
  void store(Half* p) const {
    _mm_storeu_si128((__m128i*)p,
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  void store(int16_t* p) const {
    const __m256i whole = _mm256_cvtps_epi32(v);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi32(_mm256_castsi256_si128(whole),
                                                  _mm256_extracti128_si256(whole, 1)));
  }
  template <class T>
  void store(T* p, int64_t n) const {
    float lanes[kLanes];
    store(lanes);
    for (int64_t i = 0; i < n; ++i) p[i] = from_float<T>(lanes[i]);
  }

  friend Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
  friend Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
  friend Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
  friend Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
  friend Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
  friend Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
  friend Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
  friend Vec round(Vec a) {
    return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  // As 2 x * 2^(n - 1), since 2^128 is no float; n from -125 to 128.
  friend Vec scale_by_power(Vec x, Vec n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(126));
    return (x + x) * Vec(_mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
  }

  friend uint32_t equal_lanes(Vec a, Vec b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)));
  }
  friend bool any_greater(Vec a, Vec b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)) != 0;
  }
  friend Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return _mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ));
  }
  float hmax() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  float hsum() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
};

struct Ints {
  __m256i v;

  static Ints zero() { return {_mm256_setzero_si256()}; }
  static Ints load(const int8_t* p) {
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p))};
  }
  static Ints pair(const int16_t* p) {
    int32_t both;
    memcpy(&both, p, sizeof both);
    return {_mm256_set1_epi32(both)};
  }
  friend Ints add_products(Ints sum, Ints a, Ints b) {
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(a.v, b.v))};
  }
  Vec floats() const { return _mm256_cvtepi32_ps(v); }
};

#else

// The compiler's own vectors: SSE2, NEON or whatever the target's baseline has.
struct Vec {
  static constexpr int kLanes = 4;
  typedef float Float4 __attribute__((vector_size(16)));
  typedef int32_t Int4 __attribute__((vector_size(16)));
  Float4 v;

  Vec() = default;
  Vec(Float4 x) : v(x) {}
  explicit Vec(float x) : v{x, x, x, x} {}

  static Vec load(const float* p) {
    Vec r;
    memcpy(&r.v, p, sizeof r.v);
    return r;
  }
  template <class T>
  static Vec load(const T* p) {
    return Float4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
  }
  // p[0], p[2], ... and p[1], p[3], ...
  static Vec load_even(const BFloat16* p) {
    Int4 pairs;
    memcpy(&pairs, p, sizeof pairs);
    return (Float4)(kLittleEndian ? pairs << 16 : pairs & kHigh);
  }
  static Vec load_odd(const BFloat16* p) {
    Int4 pairs;
    memcpy(&pairs, p, sizeof pairs);
    return (Float4)(kLittleEndian ? pairs & kHigh : pairs << 16);
  }
  template <class T>
  static Vec load(const T* p, int64_t n, Vec fill) {
    for (int64_t i = 0; i < n; ++i) fill.v[i] = to_float(p[i]);
    return fill;
  }
  void store(float* p) const { memcpy(p, &v, sizeof v); }
  void store(int16_t* p) const {
    for (int64_t i = 0; i < kLanes; ++i) p[i] = static_cast<int16_t>(round(*this).v[i]);
  }
  template <class T>
  void store(T* p) const {
    store(p, kLanes);
  }
  template <class T>
  void store(T* p, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) p[i] = from_float<T>(v[i]);
  }

  friend Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend Vec operator/(Vec a, Vec b) { return a.v / b.v; }
  friend Vec fma(Vec a, Vec b, Vec c) { return a.v * b.v + c.v; }
  friend Vec max(Vec a, Vec b) { return a.v > b.v ? a.v : b.v; }
  friend Vec min(Vec a, Vec b) { return a.v < b.v ? a.v : b.v; }
  // Adding and taking away 1.5 * 2^23 rounds |x| < 2^22 to an integer in the default mode.
  friend Vec round(Vec a) { return (a + Vec(12582912.0f)) - Vec(12582912.0f); }
  // As 2 x * 2^(n - 1), since 2^128 is no float; n from -125 to 128.
  friend Vec scale_by_power(Vec x, Vec n) {
    return (x + x) * Vec((Float4)((__builtin_convertvector(n.v, Int4) + 126) << 23));
  }

  friend uint32_t equal_lanes(Vec a, Vec b) {
    const Int4 equal = a.v == b.v;
    return (equal[0] & 1u) | (equal[1] & 2u) | (equal[2] & 4u) | (equal[3] & 8u);
  }
  friend bool any_greater(Vec a, Vec b) {
    const Int4 greater = a.v > b.v;
    return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
  }
  friend Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return a.v < b.v ? yes.v : no.v; }

  float hmax() const {
    const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
  }
  float hsum() const { return (v[0] + v[2]) + (v[1] + v[3]); }

 private:
  static constexpr bool kLittleEndian = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
  static constexpr int32_t kHigh = -65536;
};

struct Ints {
  typedef int8_t Byte8 __attribute__((vector_size(8)));
  typedef int16_t Short8 __attribute__((vector_size(16)));
  Vec::Int4 v;

  static Ints zero() { return {Vec::Int4{}}; }
  static Ints load(const int8_t* p) {
    Byte8 bytes;
    memcpy(&bytes, p, sizeof bytes);
    return {(Vec::Int4) __builtin_convertvector(bytes, Short8)};
  }
  static Ints pair(const int16_t* p) {
    int32_t both;
    memcpy(&both, p, sizeof both);
    return {Vec::Int4{both, both, both, both}};
  }
  friend Ints add_products(Ints sum, Ints a, Ints b) {
    return {sum.v + (a.v >> 16) * (b.v >> 16) + (a.v << 16 >> 16) * (b.v << 16 >> 16)};
  }
  Vec floats() const { return __builtin_convertvector(v, Vec::Float4); }
};

#endif

inline Vec operator-(Vec a) { return Vec(0.0f) - a; }

// x (n) in another type.
template <class T, class U>
inline void convert(const T* x, int64_t n, U* y) {
  constexpr int64_t kLanes = Vec::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) Vec::load(x + i).store(y + i);
  if (i < n) Vec::load(x + i, n - i, Vec(0.0f)).store(y + i, n - i);
}

// What rows are multiplied as with a weight of T: bfloat16 where the processor has its products.
#if defined(__AVX512BF16__)
template <class T>
using Factor = std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16, float>;
#else
template <class T>
using Factor = float;
#endif

// exp(x) for x <= 88.72, below 2 ulp of the true value (about 1.1 was seen over all floats);
// exactly 0 below -86.6, so that no result is subnormal, which takes processors 200 cycles. NaN
// stays NaN.
MTP_INLINE Vec exp(Vec x) {
  // exp(x) = 2^n * exp(r), |r| <= ln(2) / 2, ln(2) split in two so that n * high is exact.
  const Vec least(-86.6f), bounded = min(Vec(88.72f), max(least, x));  // in this order NaN passes
  const Vec n = round(bounded * Vec(1.44269504088896341f));
  const Vec r = fma(n, Vec(-1.42860682e-6f), fma(n, Vec(-0.693145751953125f), bounded));
  // Minimax polynomial of (exp(r) - 1 - r) / r^2 on the interval.
  Vec p = fma(Vec(1.9875691500e-4f), r, Vec(1.3981999507e-3f));
  p = fma(p, r, Vec(8.3334519073e-3f));
  p = fma(p, r, Vec(4.1665795894e-2f));
  p = fma(p, r, Vec(1.6666665459e-1f));
  p = fma(p, r, Vec(5.0000001201e-1f));
  return select_less(x, least, Vec(0.0f), scale_by_power(fma(p, r * r, r + Vec(1.0f)), n));
}

// tanh(x), below 4 ulp: a polynomial near 0, where 1 - 2 / (exp(2x) + 1) would cancel.
MTP_INLINE Vec tanh(Vec x) {
  const Vec y = x * x;
  Vec p = fma(Vec(-5.70498872745e-3f), y, Vec(2.06390887954e-2f));
  p = fma(p, y, Vec(-5.37397155531e-2f));
  p = fma(p, y, Vec(1.33314422036e-1f));
  p = fma(p, y, Vec(-3.33332819422e-1f));
  const Vec near_zero = fma(p * y, x, x);
  const Vec far = Vec(1.0f) - Vec(2.0f) / (exp(x + x) + Vec(1.0f));
  return select_less(y, Vec(0.390625f), near_zero, far);
}

}  // namespace MTP_SIMD
}  // namespace mtp
