// Storage types of tensors and their conversion to the float32 that every kernel computes in.
// The codes are the contract with Python (mtp_fast/ops/_common.py).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/macros.h"

namespace mtp {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
static_assert(sizeof(BFloat16) == 2 && sizeof(Half) == 2, "16-bit storage");

MTP_HD inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

MTP_HD inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

MTP_HD inline float to_float(float x) { return x; }

MTP_HD inline float to_float(BFloat16 x) { return bits_to_float(uint32_t{x.bits} << 16); }

MTP_HD inline float to_float(Half x) {
  const uint32_t sign = uint32_t{x.bits} << 16 & 0x80000000u;
  const uint32_t magnitude = uint32_t{x.bits} & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // inf, NaN
    return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  }
  if (magnitude < 0x400u) {  // zero, subnormal: exact as an integer times 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return bits_to_float(sign | float_to_bits(value));
  }
  return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
}

template <class T>
MTP_HD T from_float(float x);

template <>
MTP_HD inline float from_float<float>(float x) {
  return x;
}

// Round to nearest, ties to even; NaN stays NaN (quiet).
template <>
MTP_HD inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
MTP_HD inline Half from_float<Half>(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};   // NaN
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // >= 65520: inf
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 lets the FPU round to 2^-24 units
    const uint32_t rounded = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
    return {static_cast<uint16_t>(sign | rounded)};
  }
  const uint32_t rounded = magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}

// Calls f(T{}) with the storage type of `dtype`.
template <class F>
auto dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Half{});
    default:
      return f(float{});
  }
}

}  // namespace mtp
