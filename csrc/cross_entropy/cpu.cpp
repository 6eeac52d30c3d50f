// Cross-entropy of rows of logits on the CPU: loss, statistics and gradient.
//
// A thread takes one row at a time. The row comes from memory once, for the running maximum and
// sum; the gradient pass finds it in the core's cache and may write over it. Nothing is allocated,
// and a row's result does not depend on the thread count.
#include <cmath>
#include <limits>

#include "common/parallel.h"
#include "common/simd.h"
#include "cross_entropy/math.h"
#include "cross_entropy/params.h"

namespace mtp {
namespace MTP_SIMD {
namespace {

// Vectors whose exponentials share one rescaling of the running sum.
constexpr int kUnroll = 8;

template <class T, bool kSoftcap>
struct Row {
  const T* logits;  // (vocab)
  int64_t vocab;
  Vec cap, inverse_cap;

  // Vector i of the row, softcapped; lanes past the end hold `fill`.
  Vec whole(int64_t i) const { return capped(Vec::load(logits + i)); }
  Vec tail(int64_t i, Vec fill) const {
    const Vec raw = Vec::load(logits + i, vocab - i, fill);
    if constexpr (!kSoftcap) return raw;
    float lanes[Vec::kLanes];
    fill.store(lanes);
    capped(raw).store(lanes, vocab - i);
    return Vec::load(lanes);
  }
  Vec capped(Vec raw) const {
    if constexpr (kSoftcap) return softcap(raw, cap, inverse_cap);
    return raw;
  }
  // One logit with the same arithmetic as a whole vector.
  float at(int64_t i) const {
    float lanes[Vec::kLanes];
    capped(Vec(to_float(logits[i]))).store(lanes);
    return lanes[0];
  }
};

template <class T, bool kSoftcap>
RowStats row_stats(const Row<T, kSoftcap>& row, int64_t target, const float* class_weight,
                   bool smoothing) {
  constexpr int kLanes = Vec::kLanes;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  // The running maximum starts at a finite value: exp(-inf - -inf) would be NaN.
  Vec max_lanes(-FLT_MAX), sum(0.0f), smooth(0.0f);
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= row.vocab; i += kUnroll * kLanes) {
    Vec z[kUnroll];
    for (int k = 0; k < kUnroll; ++k) z[k] = row.whole(i + k * kLanes);
    Vec top = max(max(max(z[0], z[1]), max(z[2], z[3])), max(max(z[4], z[5]), max(z[6], z[7])));
    top = max(max_lanes, top);
    Vec piece[kUnroll];
    for (int k = 0; k < kUnroll; ++k) piece[k] = exp(z[k] - top);
    for (int step = kUnroll / 2; step > 0; step /= 2) {
      for (int k = 0; k < step; ++k) piece[k] = piece[k] + piece[k + step];
    }
    sum = fma(sum, exp(max_lanes - top), piece[0]);
    max_lanes = top;
    if (smoothing) {
      for (int k = 0; k < kUnroll; ++k) {
        const Vec a = class_weight ? Vec::load(class_weight + i + k * kLanes) : Vec(1.0f);
        smooth = fma(a, z[k], smooth);
      }
    }
  }
  for (; i < row.vocab; i += kLanes) {
    const int64_t n = row.vocab - i < kLanes ? row.vocab - i : kLanes;
    const Vec z = n < kLanes ? row.tail(i, Vec(-kInfinity)) : row.whole(i);
    const Vec top = max(max_lanes, z);
    sum = fma(sum, exp(max_lanes - top), exp(z - top));
    max_lanes = top;
    if (smoothing) {
      const Vec a = class_weight ? Vec::load(class_weight + i, n, Vec(0.0f)) : Vec(1.0f);
      smooth = fma(a, n < kLanes ? row.tail(i, Vec(0.0f)) : z, smooth);
    }
  }
  const float max = max_lanes.hmax();
  const float total = (sum * exp(max_lanes - Vec(max))).hsum();
  return {max, std::log(total), row.at(target), smooth.hsum()};
}

// argmax == target, ties to the lowest id.
template <class T, bool kSoftcap>
bool is_argmax(const Row<T, kSoftcap>& row, const RowStats& stats, int64_t target) {
  if (stats.target_logit != stats.max) return false;
  const Vec top(stats.max);
  int64_t i = 0;
  for (; i + Vec::kLanes <= target; i += Vec::kLanes) {
    if (equal_lanes(row.whole(i), top) != 0) return false;
  }
  for (; i < target; ++i) {
    if (row.at(i) == stats.max) return false;
  }
  return true;
}

// grad may be the row itself: each vector is read before it is written.
template <class T, bool kSoftcap>
void write_gradient(const Row<T, kSoftcap>& row, const RowStats& stats, const RowCoefficients& c,
                    int64_t target, const float* class_weight, T* grad) {
  constexpr int kLanes = Vec::kLanes;
  // p_v = exp(z_v - max) / sum, not exp(z_v - lse): lse rounds at the size of max.
  const Vec top(stats.max), on_class(-c.on_class);
  const Vec on_probability(c.on_probability * std::exp(-stats.log_sum));
  const auto gradient = [&](Vec z, Vec a) {
    const Vec g = fma(on_probability, exp(z - top), on_class * a);
    if constexpr (kSoftcap) return g * softcap_derivative(z, row.inverse_cap);
    return g;
  };
  const float at_target = [&] {
    const Vec a(class_weight ? class_weight[target] : 1.0f);
    float lanes[kLanes];
    Vec g = fma(on_probability, exp(Vec(stats.target_logit) - top),
                fma(on_class, a, Vec(-c.on_target)));
    if constexpr (kSoftcap) g = g * softcap_derivative(Vec(stats.target_logit), row.inverse_cap);
    g.store(lanes);
    return lanes[0];
  }();
  int64_t i = 0;
  for (; i + kLanes <= row.vocab; i += kLanes) {
    const Vec a = class_weight ? Vec::load(class_weight + i) : Vec(1.0f);
    gradient(row.whole(i), a).store(grad + i);
  }
  if (i < row.vocab) {
    const int64_t n = row.vocab - i;
    const Vec a = class_weight ? Vec::load(class_weight + i, n, Vec(0.0f)) : Vec(1.0f);
    gradient(row.tail(i, Vec(0.0f)), a).store(grad + i, n);
  }
  grad[target] = from_float<T>(at_target);
}

template <class T>
void fill_row(T* grad, int64_t vocab, float value) {
  const T stored = from_float<T>(value);
  for (int64_t i = 0; i < vocab; ++i) grad[i] = stored;
}

template <class T, bool kSoftcap>
void one_row(const CrossEntropyParams& p, const LossTerms& terms, int64_t r) {
  const int64_t target = p.target[r];
  T* grad = p.grad ? static_cast<T*>(p.grad) + r * p.grad_ld : nullptr;
  const auto write_stats = [&](float loss, float lse, bool correct) {
    if (p.loss) p.loss[r] = loss;
    if (p.lse) p.lse[r] = lse;
    if (p.correct) p.correct[r] = correct;
  };
  if (target == p.ignore_index || target < 0 || target >= p.vocab) {
    const float value = target == p.ignore_index ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    write_stats(value, value, false);
    if (grad) fill_row(grad, p.vocab, value);
    return;
  }
  const Row<T, kSoftcap> row{static_cast<const T*>(p.logits) + r * p.ld, p.vocab, Vec(p.softcap),
                             Vec(kSoftcap ? 1.0f / p.softcap : 0.0f)};
  const float weight = p.row_weight ? p.row_weight[r] : 1.0f;
  const float target_class_weight = p.class_weight ? p.class_weight[target] : 1.0f;
  const RowStats stats = row_stats(row, target, p.class_weight, terms.label_smoothing != 0.0f);
  write_stats(p.loss ? row_loss(stats, terms, weight, target_class_weight) : 0.0f, row_lse(stats),
              p.correct && is_argmax(row, stats, target));
  if (grad) {
    const float upstream = p.grad_output ? p.grad_output[r] : 1.0f;
    const RowCoefficients c =
        row_coefficients(stats, terms, weight * upstream, target_class_weight);
    write_gradient(row, stats, c, target, p.class_weight, grad);
  }
}

}  // namespace
}  // namespace MTP_SIMD

template <>
void cross_entropy_rows<SimdLevel::MTP_SIMD>(const CrossEntropyParams& p, int threads) {
  using namespace MTP_SIMD;
  const LossTerms terms{p.label_smoothing, p.z_loss, p.class_weight_sum,
                        p.label_smoothing / static_cast<float>(p.vocab)};
  // Pieces of about 16K logits: small vocabularies should not pay for a hand-over on every row.
  const int64_t grain = p.vocab < 16384 ? 16384 / (p.vocab > 0 ? p.vocab : 1) : 1;
  dispatch_dtype(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    const auto run = [&](auto cap) {
      parallel_for(threads, p.rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) one_row<T, decltype(cap)::value>(p, terms, r);
      });
    };
    if (p.softcap > 0.0f) {
      run(std::true_type{});
    } else {
      run(std::false_type{});
    }
  });
}

}  // namespace mtp
