// Cross-entropy of rows of logits on the CPU: loss, statistics and gradient.
//
// A thread takes one row at a time. The first pass brings the row from memory and makes the sum of
// exponentials; those it keeps (in the gradient's own row for float32, in a workspace that stays in
// the core's cache for 16-bit storage), so the second pass only scales them. With saved statistics
// there is one pass, which makes the exponentials anew. Nothing is allocated, and a row's result
// does not depend on the thread count.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "common/parallel.h"
#include "common/simd.h"
#include "cross_entropy/math.h"
#include "cross_entropy/params.h"

namespace mtp {
namespace MTP_SIMD {
namespace {

constexpr int kLanes = Vec::kLanes;
constexpr int kUnroll = 8;
constexpr int64_t kBlock = kUnroll * kLanes;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Exponentials are taken relative to a reference that trails the running maximum by at most
// kSlack, so it changes rarely: the sum and what was kept need no rescaling in between.
constexpr float kSlack = 10.0f;

// The references that a row's kept exponentials belong to: those from begin[j] on to reference[j].
struct References {
  static constexpr int kMax = 32;
  int64_t begin[kMax];
  float reference[kMax];
  int count = 0;

  void add(int64_t i, float value) {
    begin[count] = i;
    reference[count++] = value;
  }
};

template <class T, bool kSoftcap>
struct Row {
  const T* logits;  // (vocab)
  int64_t vocab;
  Vec cap, inverse_cap;

  Vec capped(Vec raw) const {
    if constexpr (kSoftcap) return softcap(raw, cap, inverse_cap);
    return raw;
  }
  Vec whole(int64_t i) const { return capped(Vec::load(logits + i)); }
  // Up to a vector's worth of logits from i on; lanes past the end hold `fill`.
  Vec tail(int64_t i, Vec fill) const {
    const int64_t n = vocab - i;
    if (n >= kLanes) return whole(i);
    float lanes[kLanes];
    fill.store(lanes);
    capped(Vec::load(logits + i, n, fill)).store(lanes, n);
    return Vec::load(lanes);
  }
  // One logit with the same arithmetic as a whole vector.
  float at(int64_t i) const {
    float lanes[kLanes];
    capped(Vec(to_float(logits[i]))).store(lanes);
    return lanes[0];
  }
};

Vec class_weights(const float* class_weight, int64_t i, int64_t n) {
  if (class_weight == nullptr) return Vec(1.0f);
  return n >= kLanes ? Vec::load(class_weight + i) : Vec::load(class_weight + i, n, Vec(0.0f));
}

void scale_row(float* values, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) values[i] *= factor;
}

// First pass. With kKeep, exponentials[v] = exp(z_v - reference); it may be the row itself.
// `argmax` receives the lowest id of the maximum, -1 where no logit is finite.
template <bool kKeep, class T, bool kSoftcap>
RowStats row_stats(const Row<T, kSoftcap>& row, int64_t target, const float* class_weight,
                   bool smoothing, float* exponentials, References& references, int64_t& argmax) {
  const float target_logit = target < 0 || target >= row.vocab ? NAN : row.at(target);
  float row_max = -FLT_MAX, reference = -FLT_MAX;  // finite: exp(-inf - -inf) would be NaN
  Vec sum(0.0f), smooth(0.0f);

  // Where vector `i` and those behind it have their first element equal to the maximum.
  const auto find_max = [&](int64_t i) -> int64_t {
    for (; i < row.vocab; i += kLanes) {
      const uint32_t equal = equal_lanes(row.tail(i, Vec(-kInfinity)), Vec(row_max));
      if (equal != 0) return i + __builtin_ctz(equal);
    }
    return -1;
  };
  argmax = -1;
  // Before a block is read for the last time: the maximum so far, and a reference that suits it.
  const auto enter_block = [&](int64_t i, Vec top) {
    if (references.count > 0 && !any_greater(top, Vec(row_max))) return;
    if (any_greater(top, Vec(row_max))) {
      row_max = top.hmax();
      argmax = find_max(i);
    }
    if (references.count > 0 && row_max <= reference + kSlack) return;
    const float next = row_max;
    sum = sum * exp(Vec(reference - next));
    if (kKeep && references.count == References::kMax) {
      for (int j = 0; j < References::kMax; ++j) {
        const int64_t begin = references.begin[j];
        const int64_t stop = j + 1 < References::kMax ? references.begin[j + 1] : i;
        scale_row(exponentials + begin, stop - begin, std::exp(references.reference[j] - next));
      }
      references.count = 0;
      references.add(0, next);
    } else {
      if (!kKeep) references.count = 0;
      references.add(i, next);
    }
    reference = next;
  };

  int64_t i = 0;
  for (; i + kBlock <= row.vocab; i += kBlock) {
    Vec z[kUnroll];
    for (int k = 0; k < kUnroll; ++k) z[k] = row.whole(i + k * kLanes);
    enter_block(i,
                max(max(max(z[0], z[1]), max(z[2], z[3])), max(max(z[4], z[5]), max(z[6], z[7]))));
    if (smoothing) {
      for (int k = 0; k < kUnroll; ++k) {
        smooth = fma(class_weights(class_weight, i + k * kLanes, kLanes), z[k], smooth);
      }
    }
    const Vec shift(reference);
    for (int k = 0; k < kUnroll; ++k) {
      z[k] = exp(z[k] - shift);
      if constexpr (kKeep) z[k].store(exponentials + i + k * kLanes);
    }
    sum = sum + (((z[0] + z[1]) + (z[2] + z[3])) + ((z[4] + z[5]) + (z[6] + z[7])));
  }
  for (; i < row.vocab; i += kLanes) {
    const int64_t n = row.vocab - i < kLanes ? row.vocab - i : kLanes;
    const Vec z = row.tail(i, Vec(-kInfinity));
    const Vec z_or_zero = row.tail(i, Vec(0.0f));
    enter_block(i, z);
    if (smoothing) smooth = fma(class_weights(class_weight, i, n), z_or_zero, smooth);
    const Vec e = exp(z - Vec(reference));
    if constexpr (kKeep) e.store(exponentials + i, n);
    sum = sum + e;
  }

  return {row_max, sum.hsum() * std::exp(reference - row_max), target_logit, smooth.hsum()};
}

// Second pass: from what the first pass kept, or (kKeep false) from the logits once more. grad may
// be the row itself and the exponentials.
template <bool kKeep, class T, bool kSoftcap>
void write_gradient(const Row<T, kSoftcap>& row, const RowStats& stats, const RowCoefficients& c,
                    int64_t target, const float* class_weight, const float* exponentials,
                    const References& references, T* grad) {
  const float on_probability = c.on_probability / stats.sum;
  const Vec on_class(-c.on_class), top(stats.max);
  const auto derivative = [&](Vec z, Vec g) {
    if constexpr (kSoftcap) return g * softcap_derivative(z, row.inverse_cap);
    return g;
  };
  // In float32 up to the end: the vector pass below rounds p_v to the storage type first.
  const auto at_target = [&] {
    const Vec z(stats.target_logit), a(class_weight ? class_weight[target] : 1.0f);
    float lanes[kLanes];
    derivative(z, fma(Vec(on_probability), exp(z - top), fma(on_class, a, Vec(-c.on_target))))
        .store(lanes);
    return lanes[0];
  };
  const auto piece = [&](int64_t i, int64_t n, Vec factor) {
    const Vec a = class_weights(class_weight, i, n);
    if constexpr (kKeep) {
      const Vec e =
          n < kLanes ? Vec::load(exponentials + i, n, Vec(0.0f)) : Vec::load(exponentials + i);
      return fma(factor, e, on_class * a);
    } else {
      const Vec z = row.tail(i, Vec(0.0f));
      return derivative(z, fma(factor, exp(z - top), on_class * a));
    }
  };
  for (int j = 0; j < references.count; ++j) {
    const int64_t stop = j + 1 < references.count ? references.begin[j + 1] : row.vocab;
    const Vec factor(kKeep ? on_probability * std::exp(references.reference[j] - stats.max)
                           : on_probability);
    int64_t i = kKeep ? references.begin[j] : 0;
    for (; i + kLanes <= stop; i += kLanes) piece(i, kLanes, factor).store(grad + i);
    if (i < stop) piece(i, stop - i, factor).store(grad + i, stop - i);
  }
  if (target >= 0 && target < row.vocab) grad[target] = from_float<T>(at_target());
}

template <class T, bool kSoftcap>
void one_row(const CrossEntropyParams& p, const LossTerms& terms, int64_t r, int worker) {
  const int64_t target = p.target[r];
  T* grad = p.grad ? static_cast<T*>(p.grad) + r * p.grad_ld : nullptr;
  const auto write_results = [&](const RowStats& stats, float loss, float lse, int64_t argmax) {
    if (p.loss) p.loss[r] = loss;
    if (p.lse) p.lse[r] = lse;
    if (p.correct) p.correct[r] = argmax == target && in_range(p, target);
    if (p.argmax) p.argmax[r] = argmax;
    if (p.stats) p.stats[r] = stats;
  };
  if (target == p.ignore_index) {
    if (!p.saved) write_results({}, 0.0f, 0.0f, -1);
    if (grad) std::fill_n(grad, p.vocab, T{});
    return;
  }
  const Row<T, kSoftcap> row{static_cast<const T*>(p.logits) + r * p.ld, p.vocab, Vec(p.softcap),
                             Vec(kSoftcap ? 1.0f / p.softcap : 0.0f)};
  const float weight = p.row_weight ? p.row_weight[r] : 1.0f;
  const float class_weight = target_class_weight(p, target);
  const auto coefficients = [&](const RowStats& stats) {
    const float upstream = p.grad_output ? p.grad_output[r] : 1.0f;
    return row_coefficients(stats, terms, weight * upstream, class_weight);
  };
  References references;
  if (p.saved) {
    const RowStats& stats = p.saved[r];
    references.add(0, stats.max);
    write_gradient<false>(row, stats, coefficients(stats), target, p.class_weight, nullptr,
                          references, grad);
    return;
  }
  const bool smoothing = terms.label_smoothing != 0.0f;
  int64_t argmax;
  if (grad == nullptr) {
    const RowStats stats =
        row_stats<false>(row, target, p.class_weight, smoothing, nullptr, references, argmax);
    write_results(stats, row_loss(stats, terms, weight, class_weight), row_lse(stats), argmax);
    return;
  }
  // The derivative of the softcap needs the logits again, so there they are not given up.
  constexpr bool kKeep = !kSoftcap;
  float* exponentials = p.workspace + worker * p.vocab;
  if constexpr (std::is_same_v<T, float>) exponentials = grad;
  const RowStats stats =
      row_stats<kKeep>(row, target, p.class_weight, smoothing, exponentials, references, argmax);
  write_results(stats, row_loss(stats, terms, weight, class_weight), row_lse(stats), argmax);
  write_gradient<kKeep>(row, stats, coefficients(stats), target, p.class_weight, exponentials,
                        references, grad);
}

}  // namespace
}  // namespace MTP_SIMD

template <>
void cross_entropy_rows<SimdLevel::MTP_SIMD>(const CrossEntropyParams& p, int threads) {
  using namespace MTP_SIMD;
  const LossTerms terms = loss_terms(p);
  // Pieces of about 16K logits: small vocabularies should not pay for a hand-over on every row.
  const int64_t grain = p.vocab < 16384 ? 16384 / (p.vocab > 0 ? p.vocab : 1) : 1;
  dispatch_dtype(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    const auto run = [&](auto cap) {
      parallel_for(threads, p.rows, grain, [&](int64_t begin, int64_t end, int worker) {
        for (int64_t r = begin; r < end; ++r) one_row<T, decltype(cap)::value>(p, terms, r, worker);
      });
    };
    if (p.softcap > 0.0f) {
      run(std::true_type{});
    } else {
      run(std::false_type{});
    }
  });
}

template <>
void scaled_add_run<SimdLevel::MTP_SIMD>(const ScaledAddParams& p, int threads) {
  using namespace MTP_SIMD;
  dispatch_dtype(p.x_dtype, [&](auto from) {
    dispatch_dtype(p.y_dtype, [&](auto to) {
      const auto* x = static_cast<const decltype(from)*>(p.x);
      auto* y = static_cast<decltype(to)*>(p.y);
      const Vec alpha(p.alpha), zero(0.0f);
      parallel_for(threads, p.n, int64_t{1} << 15, [&](int64_t i, int64_t end) {
        for (; i + kLanes <= end; i += kLanes) {
          const Vec scaled = Vec::load(x + i) * alpha;
          (p.accumulate ? Vec::load(y + i) + scaled : scaled).store(y + i);
        }
        if (const int64_t n = end - i; n > 0) {
          const Vec scaled = Vec::load(x + i, n, zero) * alpha;
          (p.accumulate ? Vec::load(y + i, n, zero) + scaled : scaled).store(y + i, n);
        }
      });
    });
  });
}

}  // namespace mtp
