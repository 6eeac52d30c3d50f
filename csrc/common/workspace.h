// Memory for a kernel that is called again and again: in a decode step, whose weights go through
// all caches, an allocation costs as much as some products.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <vector>

namespace mtp {

// Calls that take no more than those before allocate nothing, once what the largest took in pieces
// has become one block. For one call at a time.
class Workspace {
 public:
  static constexpr size_t kLine = 64;

  // Begins a call: what was taken before is free again.
  void reset();

  // Memory that starts on a cache line.
  void* take(size_t bytes);

 private:
  struct Delete {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t{kLine}); }
  };
  void add_block(size_t bytes);

  std::vector<std::unique_ptr<char, Delete>> blocks_;
  size_t total_ = 0, size_ = 0, used_ = 0;  // of all blocks; of the last
};

}  // namespace mtp
