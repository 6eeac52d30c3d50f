#include "common/workspace.h"

#include <algorithm>

namespace mtp {

void Workspace::reset() {
  used_ = 0;
  if (blocks_.size() <= 1) return;
  const size_t total = total_;
  blocks_.clear();
  total_ = 0;
  add_block(total);
}

void* Workspace::take(size_t bytes) {
  bytes = (bytes + kLine - 1) / kLine * kLine;
  if (blocks_.empty() || used_ + bytes > size_) add_block(std::max(bytes, total_));
  used_ += bytes;
  return blocks_.back().get() + used_ - bytes;
}

void Workspace::add_block(size_t bytes) {
  blocks_.emplace_back(static_cast<char*>(::operator new(bytes, std::align_val_t{kLine})));
  total_ += bytes;
  size_ = bytes;
  used_ = 0;
}

}  // namespace mtp
