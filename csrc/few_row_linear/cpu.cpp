// The CPU kernel of few_row_linear. Threads share the weight's rows; a thread takes two of them at
// a time against up to eight rows of x, which stay in the nearest cache. With AVX512_BF16 the
// bfloat16 products are the processor's own pair products; everywhere else they are float32.
#include <algorithm>
#include <type_traits>
#include <utility>

#include "common/parallel.h"
#include "common/simd.h"
#include "few_row_linear/params.h"

namespace mtp {
namespace MTP_SIMD {
namespace {

constexpr int kRows = 8;           // of x at once
constexpr int kOutputs = 2;        // rows of the weight at once
constexpr int64_t kPiece = 16384;  // weights that are worth handing to another thread

// sums[r] = the lanes of a[r] added up, in an order that does not depend on R.
#if defined(__AVX512F__)

template <int R>
inline void sums_of_lanes(const Vec (&a)[R], float* sums) {
  const auto at = [&](int r) { return r < R ? a[r % R].v : _mm512_setzero_ps(); };
  const auto pairs = [](__m512 p, __m512 q) {
    return _mm512_add_ps(_mm512_unpacklo_ps(p, q), _mm512_unpackhi_ps(p, q));
  };
  const auto fours = [](__m512 p, __m512 q) {
    const __m512d x = _mm512_castps_pd(p), y = _mm512_castps_pd(q);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  };
  const __m512 low = fours(pairs(at(0), at(1)), pairs(at(2), at(3)));
  const __m512 high = fours(pairs(at(4), at(5)), pairs(at(6), at(7)));
  __m512 all =
      _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x44), _mm512_shuffle_f32x4(low, high, 0xee));
  all = _mm512_add_ps(all, _mm512_shuffle_f32x4(all, all, 0xb1));
  _mm_storeu_ps(sums, _mm512_castps512_ps128(all));
  _mm_storeu_ps(sums + 4, _mm512_extractf32x4_ps(all, 2));
}

#else

template <int R>
inline void sums_of_lanes(const Vec (&a)[R], float* sums) {
  for (int r = 0; r < R; ++r) sums[r] = a[r].hsum();
}

#endif

// sums[j][r] = x[r] . w[j]. The rows are a pack: accumulators whose index is a loop's variable
// would be kept in memory.
template <class T, int... r>
void dots(const T* x, const T* const (&w)[kOutputs], int64_t in, float (&sums)[kOutputs][kRows],
          std::integer_sequence<int, r...>) {
  Vec a[sizeof...(r)] = {}, b[sizeof...(r)] = {}, v;
  int64_t i = 0;
  for (; i + Vec::kLanes <= in; i += Vec::kLanes) {
    const Vec w0 = Vec::load(w[0] + i), w1 = Vec::load(w[1] + i);
    ((v = Vec::load(x + r * in + i), a[r] = fma(w0, v, a[r]), b[r] = fma(w1, v, b[r])), ...);
  }
  if (const int64_t rest = in - i; rest > 0) {
    const Vec zero(0.0f);
    const Vec w0 = Vec::load(w[0] + i, rest, zero), w1 = Vec::load(w[1] + i, rest, zero);
    ((v = Vec::load(x + r * in + i, rest, zero), a[r] = fma(w0, v, a[r]), b[r] = fma(w1, v, b[r])),
     ...);
  }
  sums_of_lanes(a, sums[0]);
  sums_of_lanes(b, sums[1]);
}

#if defined(__AVX512F__)

template <int... r>
__attribute__((target("avx512bf16"))) void bfloat16_dots(const BFloat16* x,
                                                         const BFloat16* const (&w)[kOutputs],
                                                         int64_t in, float (&sums)[kOutputs][kRows],
                                                         std::integer_sequence<int, r...>) {
  Vec a[sizeof...(r)] = {}, b[sizeof...(r)] = {};
  __m512bh v;
  for (int64_t i = 0; i < in; i += 32) {
    const __mmask32 here = in - i >= 32 ? ~0u : (1u << (in - i)) - 1u;
    const auto w0 = (__m512bh)_mm512_maskz_loadu_epi16(here, w[0] + i);
    const auto w1 = (__m512bh)_mm512_maskz_loadu_epi16(here, w[1] + i);
    ((v = (__m512bh)_mm512_maskz_loadu_epi16(here, x + r * in + i),
      a[r] = _mm512_dpbf16_ps(a[r].v, w0, v), b[r] = _mm512_dpbf16_ps(b[r].v, w1, v)),
     ...);
  }
  sums_of_lanes(a, sums[0]);
  sums_of_lanes(b, sums[1]);
}

bool has_bfloat16_dots() {
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
}

#endif

template <int R, class T>
void outputs(const FewRowLinearParams& p, int64_t row, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x) + row * p.in;
  for (int64_t o = begin; o < end; o += kOutputs) {
    const T* first = static_cast<const T*>(p.weight) + o * p.weight_ld;
    const int count = end - o < kOutputs ? 1 : kOutputs;
    const T* const w[kOutputs] = {first, count == 1 ? first : first + p.weight_ld};
    float sums[kOutputs][kRows];
    constexpr auto rows = std::make_integer_sequence<int, R>{};
    bool done = false;
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, BFloat16>) {
      if ((done = has_bfloat16_dots())) bfloat16_dots(x, w, p.in, sums, rows);
    }
#endif
    if (!done) dots(x, w, p.in, sums, rows);
    for (int r = 0; r < R; ++r) {
      const int64_t at = (row + r) * p.out + o;
      for (int j = 0; j < count; ++j) {
        p.y[at + j] = p.residual ? p.residual[at + j] + sums[j][r] : sums[j][r];
      }
    }
  }
}

template <class T>
void tile(const FewRowLinearParams& p, int64_t row, int64_t begin, int64_t end) {
  switch (std::min<int64_t>(p.rows - row, kRows)) {
    case 1:
      return outputs<1, T>(p, row, begin, end);
    case 2:
      return outputs<2, T>(p, row, begin, end);
    case 3:
      return outputs<3, T>(p, row, begin, end);
    case 4:
      return outputs<4, T>(p, row, begin, end);
    case 5:
      return outputs<5, T>(p, row, begin, end);
    case 6:
      return outputs<6, T>(p, row, begin, end);
    case 7:
      return outputs<7, T>(p, row, begin, end);
    default:
      return outputs<8, T>(p, row, begin, end);
  }
}

}  // namespace
}  // namespace MTP_SIMD

template <>
void few_row_linear_run<SimdLevel::MTP_SIMD>(const FewRowLinearParams& p, int threads) {
  using namespace MTP_SIMD;
  const int64_t smallest = std::max<int64_t>(kOutputs, kPiece / std::max<int64_t>(p.in, 1));
  // Four pieces a thread: one that is disturbed leaves its share to the others.
  int64_t grain = std::max(smallest, p.out / (4 * int64_t{threads}));
  grain += grain % kOutputs;
  dispatch_dtype(p.dtype, [&](auto storage) {
    parallel_for(threads, p.out, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = 0; row < p.rows; row += kRows) {
        tile<decltype(storage)>(p, row, begin, end);
      }
    });
  });
}

}  // namespace mtp
