// The registers of AMX, which hold matrices of up to 16 rows of 64 bytes: set up once, and again
// when a kernel wants other rows, since that takes as long as some products.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/simd_level.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace mtp {
namespace MTP_SIMD {

// Inputs of a row with the zeros behind them: as many as such a register is wide.
template <class X>
inline int64_t padded(int64_t in) {
  constexpr int64_t kWhole = std::is_same_v<X, float> ? 1 : 64 / sizeof(X);
  return (in + kWhole - 1) / kWhole * kWhole;
}

// Whether products of rows of X are made on these registers.
template <class X>
inline bool by_matrices() {
#if defined(__AVX512BF16__)
  return std::is_same_v<X, BFloat16> && has_amx();
#else
  return false;
#endif
}

#if defined(__AVX512BF16__)

// What this thread's registers 0 to 2 are set up for.
inline thread_local int64_t matrix_rows = 0;

// Numbers 0 to 2 get `rows` rows, the others 16.
inline void set_up_matrix_registers(int64_t rows) {
  if (matrix_rows == rows) return;
  matrix_rows = rows;
  struct {  // as ldtilecfg reads it
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {0, 0, 0, 16, 16, 16, 16, 16};
  } shapes;
  for (int i = 0; i < 3; ++i) shapes.rows[i] = static_cast<uint8_t>(rows);
  // The intrinsic does not say how much is read.
  __asm__ volatile("" : : "r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
}

#endif

// A thread that has made products lets go of the matrix registers, which would be saved with it.
inline void release_matrix_registers() {
#if defined(__AVX512BF16__)
  if (matrix_rows > 0) _tile_release();
  matrix_rows = 0;
#endif
}

}  // namespace MTP_SIMD
}  // namespace mtp
