// What a kernel keeps while it runs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/matrix_registers.h"
#include "common/workspace.h"

namespace mtp {
namespace MTP_SIMD {

// Rows in a workspace. The first starts on a cache line; where the width is whole lines, so does
// every other, and no vector of them lies in two. Zeros behind `width` elements up to the next row
// (padded).
template <class T>
class Scratch {
 public:
  Scratch(Workspace& workspace, int64_t rows, int64_t width)
      : ld(padded<T>(width)), data_(static_cast<T*>(workspace.take(sizeof(T) * rows * ld))) {
    for (int64_t r = 0; r < rows; ++r) std::fill(data_ + r * ld + width, data_ + (r + 1) * ld, T{});
  }

  T* row(int64_t r) const { return data_ + r * ld; }

  const int64_t ld;  // elements from row to row

 private:
  T* const data_;
};

}  // namespace MTP_SIMD
}  // namespace mtp
