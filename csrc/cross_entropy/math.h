// The formulas of the loss, once, for every backend. F is float (scalar code, CUDA) or a SIMD
// vector.
//
// For one row with logits z (softcapped), target y, row weight w, class weights a (A = sum a_v),
// label smoothing e, lse = logsumexp(z):
//
//   loss   = w * [(1-e) a_y (lse - z_y) + (e/V) (A lse - sum_v a_v z_v) + z_loss lse^2]
//   dz_v   = on_probability * p_v - on_class * a_v - [v == y] * on_target,   p = softmax(z)
//
// p_v = exp(z_v - max) / sum, not exp(z_v - lse), whose argument would round at the size of max.
#pragma once

#include <cmath>

#include "common/macros.h"
#include "cross_entropy/params.h"

namespace mtp {

// The row's coefficients of the formulas above, w and the upstream gradient included.
struct RowCoefficients {
  float on_probability, on_class, on_target;
};

struct LossTerms {
  float label_smoothing, z_loss, class_weight_sum;
  float per_class;  // label_smoothing / vocab
};

MTP_HD inline LossTerms loss_terms(const CrossEntropyParams& p) {
  const float vocab = static_cast<float>(p.vocab);
  return {p.label_smoothing, p.z_loss, p.class_weight_sum ? *p.class_weight_sum : vocab,
          p.label_smoothing / vocab};
}

// Whether a target is a class, and its weight.
MTP_HD inline bool in_range(const CrossEntropyParams& p, int64_t target) {
  return target >= 0 && target < p.vocab;
}
MTP_HD inline float target_class_weight(const CrossEntropyParams& p, int64_t target) {
  return p.class_weight && in_range(p, target) ? p.class_weight[target] : 1.0f;
}

MTP_HD inline float row_lse(const RowStats& row) { return row.max + logf(row.sum); }

MTP_HD inline float row_loss(const RowStats& row, const LossTerms& terms, float row_weight,
                             float target_class_weight) {
  const float lse = row_lse(row);
  float loss = (1.0f - terms.label_smoothing) * target_class_weight *
               ((row.max - row.target_logit) + logf(row.sum));
  // Each term only where it is asked for: 0 * inf (a masked class under smoothing) is NaN.
  if (terms.label_smoothing != 0.0f) {
    loss += terms.per_class * (terms.class_weight_sum * lse - row.smooth_sum);
  }
  if (terms.z_loss != 0.0f) loss += terms.z_loss * lse * lse;
  return row_weight * loss;
}

MTP_HD inline RowCoefficients row_coefficients(const RowStats& row, const LossTerms& terms,
                                               float row_weight, float target_class_weight) {
  if (std::isnan(row.target_logit)) row_weight = row.target_logit;  // a target that is no class
  const float on_target = (1.0f - terms.label_smoothing) * target_class_weight;
  const float on_probability =
      on_target + terms.per_class * terms.class_weight_sum + 2.0f * terms.z_loss * row_lse(row);
  return {row_weight * on_probability, row_weight * terms.per_class, row_weight * on_target};
}

// z = cap * tanh(raw / cap)
template <class F>
MTP_HD F softcap(F raw, F cap, F inverse_cap) {
  return cap * tanh(raw * inverse_cap);
}

// dz / d(raw), from z itself.
template <class F>
MTP_HD F softcap_derivative(F z, F inverse_cap) {
  const F t = z * inverse_cap;
  return F(1.0f) - t * t;
}

}  // namespace mtp
