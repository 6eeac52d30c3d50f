// A float with the interface of the CPU's vectors (common/simd.h), so that the formulas of math.h
// serve both. No product is contracted into a sum behind it: results round as they do on the CPU,
// and P p - q is exactly 0 where both are equal.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"

namespace mtp {

struct Lane {
  float v;

  __device__ explicit Lane(float x) : v(x) {}

  __device__ friend Lane operator+(Lane a, Lane b) { return Lane(__fadd_rn(a.v, b.v)); }
  __device__ friend Lane operator-(Lane a, Lane b) { return Lane(__fsub_rn(a.v, b.v)); }
  __device__ friend Lane operator*(Lane a, Lane b) { return Lane(__fmul_rn(a.v, b.v)); }
  __device__ friend Lane fma(Lane a, Lane b, Lane c) { return Lane(fmaf(a.v, b.v, c.v)); }
  // b where either is NaN.
  __device__ friend Lane max(Lane a, Lane b) { return a.v > b.v ? a : b; }
  __device__ friend Lane min(Lane a, Lane b) { return a.v < b.v ? a : b; }
  __device__ friend Lane select_less(Lane a, Lane b, Lane yes, Lane no) {
    return a.v < b.v ? yes : no;
  }
  __device__ friend Lane round(Lane a) { return Lane(rintf(a.v)); }
  // x * 2^n for integral n from -126 to 127.
  __device__ friend Lane scale_by_power(Lane x, Lane n) {
    return x * Lane(bits_to_float(static_cast<uint32_t>(static_cast<int>(n.v) + 127) << 23));
  }
};

}  // namespace mtp
