// Products of matrices on the registers of AMX, which multiply bfloat16 into float32 sums.
//
// A product of two float32 is the sum of the nine products of their planes (pack.h). The six that
// are not below its 24th bit are made; that still takes less time than a product by vectors.
//
// C is made in blocks. Of a block, and of a piece of the inputs after the other, the threads
// together pack the columns of B into panels of 32 columns, which stay in a core's second-level
// cache; then each takes rows of A, 32 at a time, through all the panels. A piece is taken through
// several blocks beside each other where their sums take little memory, so that A is packed once.
// An element of C is summed in the same order whatever the number of threads.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "common/huge_pages.h"
#include "common/matrix_registers.h"
#include "common/rounds.h"
#include "gemm/pack.h"
#include "gemm/params.h"

namespace mtp {
namespace {

constexpr int64_t kSums = kPanel * kPanel;  // of a panel of A and one of B, in float32
constexpr int64_t kDepth = 1024;            // inputs of a piece; of float32 a third
constexpr int64_t kColumns = 576;           // of a block
constexpr int64_t kRows = 1024;             // of a block, for each thread
constexpr int64_t kMostKept = 32 << 20;     // bytes of an operand that is packed once, or of sums

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }
int64_t panels(int64_t n) { return blocks(n, kPanel) * kPanel; }

// The size of equal pieces of n, at most about `most`: whole panels.
int64_t piece(int64_t n, int64_t most) { return panels(blocks(n, blocks(n, most))); }

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> buffer(int64_t n) {
  constexpr int64_t kHugePage = 2 << 20;
  const int64_t bytes = blocks(n * int64_t{sizeof(T)}, kHugePage) * kHugePage;
  Buffer<T> memory(static_cast<T*>(std::aligned_alloc(kHugePage, bytes)));
  if (memory == nullptr) throw std::bad_alloc();
  advise_huge_pages(reinterpret_cast<uintptr_t>(memory.get()), bytes);
  return memory;
}

// Registers 4 and 5 hold a plane of A, 6 and 7 of B, 0 to 3 the sums.
inline void load_a(const BFloat16* plane) {
  _tile_loadd(4, plane, 64);
  _tile_loadd(5, plane + kTileSize, 64);
}
inline void load_b(const BFloat16* plane) {
  _tile_loadd(6, plane, 64);
  _tile_loadd(7, plane + kTileSize, 64);
}
inline void multiply() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// sums (32, 32) = a panel of A times one of B, or += that.
template <class T>
void multiply_panels(const BFloat16* a, const BFloat16* b, int64_t depth, bool accumulate,
                     float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t size = depth / kPanel * kStep<T>;
  if constexpr (kPlanes<T> == 3) {
    // The small products first: a large sum would swallow them one by one.
    for (int64_t i = 0; i < size; i += kStep<T>) {
      load_a(a + i);
      load_b(b + i + 2 * kPlane);
      multiply();
      load_b(b + i + kPlane);
      multiply();
      load_a(a + i + kPlane);
      multiply();
      load_b(b + i);
      multiply();
      load_a(a + i + 2 * kPlane);
      multiply();
    }
  }
  for (int64_t i = 0; i < size; i += kStep<T>) {
    load_a(a + i);
    load_b(b + i);
    multiply();
  }
  constexpr int64_t kRowBytes = kPanel * sizeof(float);
  alignas(64) float more[kSums];
  float* to = accumulate ? more : sums;
  _tile_stored(0, to, kRowBytes);
  _tile_stored(1, to + kTile, kRowBytes);
  _tile_stored(2, to + kTile * kPanel, kRowBytes);
  _tile_stored(3, to + kTile * kPanel + kTile, kRowBytes);
  if (accumulate) {
    for (int64_t i = 0; i < kSums; i += 16) {
      _mm512_store_ps(sums + i, _mm512_add_ps(_mm512_load_ps(sums + i), _mm512_load_ps(more + i)));
    }
  }
}

// Up to 16 results. Past the caches, where they are a cache line and nothing is added to them.
inline void write(__m512 x, int64_t n, bool accumulate, float* c) {
  const __mmask16 mask = static_cast<__mmask16>(first_of(n));
  if (accumulate) {
    _mm512_mask_storeu_ps(c, mask, _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, c)));
  } else if (n >= 16 && reinterpret_cast<uintptr_t>(c) % 64 == 0) {
    _mm512_stream_ps(c, x);
  } else {
    _mm512_mask_storeu_ps(c, mask, x);
  }
}

template <class T>
class Gemm {
 public:
  Gemm(const GemmParams& p, int threads)
      : p_(p),
        a_{static_cast<const T*>(p.a.data), p.a.ld, !p.a.transposed, p.m, p.k},
        b_{static_cast<const T*>(p.b.data), p.b.ld, p.b.transposed, p.n, p.k},
        depth_(piece(p.k, kDepth / kPlanes<T>)),
        columns_(piece(p.n, kColumns)),
        rows_(std::min(kRows * threads, panels(p.m))),
        panel_(depth_ / kPanel * kStep<T>),
        a_packed_(packed_once(a_)),
        b_packed_(packed_once(b_)),
        across_(!a_packed_ && columns_ < p.n && rows_ * panels(p.n) * kFloat <= kMostKept),
        sums_width_(across_ ? panels(p.n) : columns_),
        a_panels_(buffer<BFloat16>(panel_ * (a_packed_ ? panels_of(a_)
                                             : across_ ? rows_ / kPanel
                                                       : threads))),
        b_panels_(buffer<BFloat16>(panel_ * (b_packed_ ? panels_of(b_) : columns_ / kPanel))),
        sums_(buffer<float>((depth_ < p.k ? rows_ : threads * kPanel) * sums_width_)) {}

  void run(Worker& worker) const {
    MTP_SIMD::set_up_matrix_registers(16);
    if (a_packed_) pack_once(worker, a_, a_panels_.get());
    if (b_packed_) pack_once(worker, b_, b_panels_.get());
    for (int64_t row = 0; row < p_.m; row += rows_) {
      for (int64_t from = 0; from < p_.n; from += sums_width_) {
        for (int64_t k = 0; k < p_.k; k += depth_) {
          if (across_) pack_rows(worker, row, k);
          const int64_t end = std::min(from + sums_width_, p_.n);
          for (int64_t column = from; column < end; column += columns_) {
            block(worker, row, column, k);
          }
        }
      }
    }
    _mm_sfence();  // after what went past the caches
    MTP_SIMD::release_matrix_registers();
  }

 private:
  static constexpr int64_t kFloat = sizeof(float);

  // Inputs of the piece that begins at k, panels of the block that begins at a row or a column.
  int64_t inputs(int64_t k) const { return std::min(depth_, panels(p_.k - k)); }
  int64_t row_panels(int64_t row) const { return blocks(std::min(rows_, p_.m - row), kPanel); }
  int64_t column_panels(int64_t column) const {
    return blocks(std::min(columns_, p_.n - column), kPanel);
  }

  template <class X>
  int64_t panels_of(const X& x) const {
    return blocks(x.outers, kPanel) * blocks(p_.k, depth_);
  }
  template <class X>
  bool packed_once(const X& x) const {
    return panels_of(x) * panel_ * int64_t{sizeof(BFloat16)} <= kMostKept;
  }
  template <class X>
  void pack_once(Worker& worker, const X& x, BFloat16* to) const {
    const int64_t n = blocks(x.outers, kPanel);
    worker.round(panels_of(x), 1, [&](int64_t i, int64_t) {
      const int64_t k = i / n * depth_;
      x.pack_panel(i % n * kPanel, k, inputs(k), to + i * panel_);
    });
  }
  template <class X>
  const BFloat16* packed_panel(const BFloat16* all, const X& x, int64_t outer, int64_t k) const {
    return all + (k / depth_ * blocks(x.outers, kPanel) + outer / kPanel) * panel_;
  }

  void pack_rows(Worker& worker, int64_t row, int64_t k) const {
    worker.round(row_panels(row), 1, [&](int64_t i, int64_t) {
      a_.pack_panel(row + i * kPanel, k, inputs(k), a_panels_.get() + i * panel_);
    });
  }

  // Of A's rows from `row` on, panel i of the block's.
  const BFloat16* row_panel(const Worker& worker, int64_t row, int64_t i, int64_t k) const {
    BFloat16* panels = a_panels_.get();
    if (a_packed_) return packed_panel(panels, a_, row, k);
    if (across_) return panels + i * panel_;
    BFloat16* own = panels + worker.index() * panel_;
    a_.pack_panel(row, k, inputs(k), own);
    return own;
  }

  // In the order in which B is stored.
  void pack_columns(Worker& worker, int64_t column, int64_t k) const {
    const int64_t n = column_panels(column);
    const auto pack = [&](int64_t j, int64_t step, int64_t depth) {
      b_.pack_panel(column + j * kPanel, k + step * kPanel, depth,
                    b_panels_.get() + j * panel_ + step * kStep<T>);
    };
    if (b_.inner_contiguous) {
      worker.round(n, 1, [&](int64_t j, int64_t) { pack(j, 0, inputs(k)); });
    } else {
      worker.round(inputs(k) / kPanel, 1, [&](int64_t step, int64_t) {
        for (int64_t j = 0; j < n; ++j) pack(j, step, kPanel);
      });
    }
  }

  void block(Worker& worker, int64_t row, int64_t column, int64_t k) const {
    const BFloat16* b = b_panels_.get();
    if (b_packed_) {
      b = packed_panel(b, b_, column, k);
    } else {
      pack_columns(worker, column, k);
    }
    const int64_t n = column_panels(column);
    worker.round(row_panels(row), 1, [&](int64_t i, int64_t) {
      const int64_t first = row + i * kPanel;
      const BFloat16* a = row_panel(worker, first, i, k);
      float* sums = sums_.get() + (depth_ < p_.k ? i : worker.index()) * kPanel * sums_width_ +
                    column % sums_width_ * kPanel;
      for (int64_t j = 0; j < n; ++j) {
        multiply_panels<T>(a, b + j * panel_, inputs(k), k > 0, sums + j * kSums);
      }
      if (k + depth_ >= p_.k) write_rows(sums, first, column, n);
    });
  }

  // Row by row: short pieces of many rows take longer to write.
  void write_rows(const float* sums, int64_t row, int64_t column, int64_t n_columns) const {
    for (int64_t i = 0; i < std::min(kPanel, p_.m - row); ++i) {
      float* c = p_.c + (row + i) * p_.n + column;
      for (int64_t j = 0; j < n_columns * kPanel; j += 16) {
        const float* x = sums + j / kPanel * kSums + i * kPanel + j % kPanel;
        write(_mm512_load_ps(x), p_.n - column - j, p_.accumulate, c + j);
      }
    }
  }

  const GemmParams& p_;
  const Operand<T, true> a_;
  const Operand<T, false> b_;
  const int64_t depth_, columns_, rows_;  // of a piece, of a block
  const int64_t panel_;                   // elements
  const bool a_packed_, b_packed_;        // once, for all blocks
  const bool across_;  // A's rows of a piece are packed for all columns, whose sums are kept
  const int64_t sums_width_;
  const Buffer<BFloat16> a_panels_, b_panels_;
  // (rows, sums_width) between pieces, (threads * 32, sums_width) if there is one, in squares
  // of 32.
  const Buffer<float> sums_;
};

}  // namespace

void gemm_amx(const GemmParams& p, int threads) {
  const auto run = [&](auto gemm) {
    run_rounds(threads, [&](Worker& worker) { gemm.run(worker); });
  };
  if (p.dtype == DType::kFloat32) {
    run(Gemm<float>(p, threads));
  } else {
    run(Gemm<BFloat16>(p, threads));
  }
}

}  // namespace mtp
