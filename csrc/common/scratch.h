// What a kernel keeps while it runs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/matrix_registers.h"
#include "common/workspace.h"

namespace mtp {
namespace MTP_SIMD {

// Groups of rows in a workspace, each a thread's own or a half's. A group starts on a cache line;
// where the width is whole lines, so does every row, and no vector of them lies in two. Zeros
// behind `width` elements up to the next row (padded). Groups are two pages apart: the processor
// fetches more than a thread reads, and would take from the others what they are about to write.
template <class T>
class Scratch {
 public:
  Scratch(Workspace& workspace, int64_t groups, int64_t rows, int64_t width)
      : ld(padded<T>(width)),
        step((rows * ld + kLine - 1) / kLine * kLine + kApart),
        data_(static_cast<T*>(workspace.take(sizeof(T) * groups * step))) {
    for (int64_t r = 0; r < groups * rows; ++r) {
      T* x = row(r / rows, r % rows);
      std::fill(x + width, x + ld, T{});
    }
  }

  T* row(int64_t group, int64_t r) const { return data_ + group * step + r * ld; }

  const int64_t ld, step;  // elements from row to row, from group to group

 private:
  static constexpr int64_t kLine = 64 / sizeof(T), kApart = 8192 / sizeof(T);

  T* const data_;
};

}  // namespace MTP_SIMD
}  // namespace mtp
