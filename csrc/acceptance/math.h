// The formulas of the acceptance step, once, for every backend: random draws, the accept rules,
// the order of logits under the filters, and the control flow of one sequence.
//
// p and q are the target's and the draft's distributions after temperature and filters. For
// deterministic drafts q is one-hot at the draft. In logits NaN counts as -inf, and +inf as the
// largest finite number of the storage type.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "acceptance/params.h"
#include "common/dtype.h"
#include "common/macros.h"
#include "common/philox.h"

namespace mtp {

// What a draw is for. Streams never share a draw: a draft and its verdict must be independent.
enum class Salt : uint32_t { kDraft = 0, kAccept = 1, kResidual = 2, kBonus = 3 };

// The draws of one sequence in one step. Keyed by the number of tokens committed before the step
// and the index within it, not by the absolute position: under the block rule an outcome depends
// on draws at places that the next step judges again, and reusing them there biases the output.
struct Draws {
  int64_t seed, position;

  MTP_HD double uniform(int64_t index, Salt salt) const {
    const uint64_t key = static_cast<uint64_t>(seed), at = static_cast<uint64_t>(position);
    const PhiloxWords counter{{static_cast<uint32_t>(at), static_cast<uint32_t>(at >> 32),
                               static_cast<uint32_t>(index), static_cast<uint32_t>(salt)}};
    return uniform_of(
        philox4x32_10(counter, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32))
            .word[0]);
  }
};

// u < min(1, p / q), also where q is 0.
MTP_HD inline bool accepts_token(double u, double p, double q) { return u * q < p; }

// P_i = min(1, P_{i-1} p / q), and 0 for 0 / 0.
MTP_HD inline double block_prefix(double previous, double p, double q) {
  const double joint = previous * p;
  if (joint < q) return joint / q;
  return joint > 0.0 ? 1.0 : 0.0;
}

// h_i = Z / (Z + 1 - P), Z the mass of max(P p - q, 0) in the next row. At P = 1 that is 1, also
// where p == q and Z is 0: then the next prefix is 1 again, and a longer one is accepted.
MTP_HD inline double block_threshold(double prefix, double residual_mass) {
  return prefix >= 1.0 ? 1.0 : residual_mass / (residual_mass + 1.0 - prefix);
}

MTP_HD inline bool accepts_typical(double p, double entropy, double epsilon, double delta) {
  const double bound = delta * exp(-entropy);
  return p > (epsilon < bound ? epsilon : bound);
}

// Weight of the residual max(P p - q, 0); F is a vector of one lane or more.
template <class F>
MTP_HD F residual_weight(F scaled_p, F q) {
  return max(scaled_p - q, F(0.0f));
}

// A row's weights are 2^((z - max) * scale).
MTP_HD inline float exponent_scale(double temperature) {
  const double scale = 1.44269504088896341 / temperature;
  if (!(scale < FLT_MAX)) return FLT_MAX;
  return scale > FLT_MIN ? static_cast<float>(scale) : FLT_MIN;
}

// 2^t for t <= 0: exactly 1 at 0, exactly 0 below -150, else within 1.3e-7 of the true value,
// relative. NaN counts as -inf, t > 0 as 0. Operations that round alike everywhere, so that draws
// agree between backends.
template <class F>
MTP_HD F exp2_of_nonpositive(F t) {
  const F bounded = min(max(t, F(-160.0f)), F(0.0f));  // in this order NaN becomes -160
  const F n = round(bounded);
  const F f = bounded - n;
  F p = fma(F(1.326472731e-3f), f, F(9.671512991e-3f));
  p = fma(p, f, F(5.550733581e-2f));
  p = fma(p, f, F(2.402224243e-1f));
  p = fma(p, f, F(6.931470037e-1f));
  return scale_by_power(fma(p, f, F(1.0f)), n);
}

// A row is cut into tiles whose size depends on the vocabulary alone: sums by tile are the same
// however tiles fall to threads.
constexpr int kMaxTiles = 128;

struct Tiling {
  int64_t vocab, size;
  int count;

  MTP_HD explicit Tiling(int64_t vocab) : vocab(vocab) {
    constexpr int64_t kUnit = 128;
    size = kUnit * ((vocab + kUnit * kMaxTiles - 1) / (kUnit * kMaxTiles));
    count = static_cast<int>((vocab + size - 1) / size);
  }
  MTP_HD int64_t begin(int tile) const { return tile * size; }
  MTP_HD int64_t end(int tile) const { return vocab < begin(tile) + size ? vocab : begin(tile) + size; }
};

// Maxima and sums of a row's tiles.
struct TileScratch {
  float max[kMaxTiles], sum[kMaxTiles];
};

template <class T>
constexpr float kLargest = FLT_MAX;
template <>
inline constexpr float kLargest<BFloat16> = 0x1.fep127f;
template <>
inline constexpr float kLargest<Half> = 65504.0f;

// Logits as unsigned integers of the same order, as narrow as the storage type allows. -0 and 0
// must be made equal before (add 0). NaN has no place here.
template <class T>
struct OrderKey;
template <>
struct OrderKey<float> {
  static constexpr int kDropped = 0;  // low bits of the float32 that are always 0
};
template <>
struct OrderKey<BFloat16> {
  static constexpr int kDropped = 16;
};
template <>
struct OrderKey<Half> {
  static constexpr int kDropped = 13;
};

template <class T>
MTP_HD uint32_t order_key(float z) {
  const uint32_t bits = float_to_bits(z);
  return (bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u)) >> OrderKey<T>::kDropped;
}

template <class T>
MTP_HD float from_order_key(uint32_t key) {
  constexpr int kDropped = OrderKey<T>::kDropped;
  const uint32_t bits = key << kDropped;
  if (bits >> 31) return bits_to_float(bits ^ 0x80000000u);
  return bits_to_float(~(bits | ((1u << kDropped) - 1u)));
}

// ---- One sequence ----

// The first `accepted` drafts are kept, then `next` is emitted; -1: nothing follows.
struct Decision {
  int64_t accepted, next;
};

// `Rows` walks the rows of one sequence. load(i) makes row i of the target current, and
// load_draft(i) row i of the draft; false: the row has no finite logit. Of the current rows:
//   argmax()                     lowest id of the largest target logit
//   target(id), draft(id)        p(id), q(id)
//   entropy()                    of p
//   residual_mass(P)             sum of max(P p - q, 0)
//   sample(u)                    from p
//   sample_without(u, id)        from p without id
//   sample_residual(u, P)        from max(P p - q, 0)
template <class Rows>
class Judge {
 public:
  MTP_HD Judge(Rows& rows, const AcceptParams& params, int64_t b)
      : rows_(rows),
        params_(params),
        drafts_(params.draft_tokens + b * params.max_draft),
        num_draft_(params.num_draft[b]),
        draws_{params.sampling.seed[b], params.sampling.position[b]},
        greedy_(params.sampling.temperature[b] == 0.0) {}

  MTP_HD Decision decide() {
    if (greedy_) return decide_greedy();
    switch (params_.rule) {
      case AcceptRule::kBlock:
        return cut_at_eos(decide_block());
      case AcceptRule::kTypical:
        return decide_typical();
      default:
        return decide_exact();
    }
  }

 private:
  // Whether there is a draft at i that a row can judge. The drafts end before an invalid id.
  MTP_HD bool has_draft(int64_t i) const {
    return i < num_draft_ && drafts_[i] >= 0 && drafts_[i] < params_.vocab;
  }
  MTP_HD bool is_eos(int64_t token) const {
    return params_.eos_token >= 0 && token == params_.eos_token;
  }
  MTP_HD bool stochastic() const { return params_.draft.data != nullptr; }
  // A draft whose own distribution is unusable cannot be judged: the drafts end before it too.
  MTP_HD bool load_drafted(int64_t i) {
    return has_draft(i) && (!stochastic() || rows_.load_draft(i));
  }

  MTP_HD Decision decide_greedy() {
    for (int64_t i = 0;; ++i) {
      if (!rows_.load(i)) return {i, -1};
      const int64_t best = rows_.argmax();
      if (!has_draft(i) || drafts_[i] != best) return {i, best};
      if (is_eos(best)) return {i + 1, -1};
    }
  }

  MTP_HD Decision decide_exact() {
    for (int64_t i = 0;; ++i) {
      if (!rows_.load(i)) return {i, -1};
      if (!load_drafted(i)) return {i, rows_.sample(draws_.uniform(i, Salt::kBonus))};
      const int64_t draft = drafts_[i];
      const double q = stochastic() ? rows_.draft(draft) : 1.0;
      if (!accepts_token(draws_.uniform(i, Salt::kAccept), rows_.target(draft), q)) {
        return {i, recover(i, 1.0)};
      }
      if (is_eos(draft)) return {i + 1, -1};
    }
  }

  // The longest prefix i with u_i <= h_i; the last one is judged by h = P alone.
  MTP_HD Decision decide_block() {
    int64_t accepted = 0;
    double prefix = 1.0, accepted_prefix = 1.0;
    for (int64_t i = 0;; ++i) {
      const double u = i > 0 ? draws_.uniform(i - 1, Salt::kAccept) : 0.0;
      const bool usable = rows_.load(i);
      if (!usable || !load_drafted(i)) {
        if (u > prefix) break;
        return {i, usable ? rows_.sample(draws_.uniform(i, Salt::kBonus)) : -1};
      }
      const int64_t draft = drafts_[i];
      const double p = rows_.target(draft);
      const double mass = stochastic() ? rows_.residual_mass(prefix) : prefix * (1.0 - p);
      if (u <= block_threshold(prefix, mass)) {
        accepted = i;
        accepted_prefix = prefix;
      }
      prefix = block_prefix(prefix, p, stochastic() ? rows_.draft(draft) : 1.0);
    }
    rows_.load(accepted);
    load_drafted(accepted);
    return {accepted, recover(accepted, accepted_prefix)};
  }

  MTP_HD Decision decide_typical() {
    for (int64_t i = 0;; ++i) {
      if (!rows_.load(i)) return {i, -1};
      if (!has_draft(i) || !accepts_typical(rows_.target(drafts_[i]), rows_.entropy(),
                                            params_.typical_epsilon, params_.typical_delta)) {
        return {i, rows_.argmax()};
      }
      if (is_eos(drafts_[i])) return {i + 1, -1};
    }
  }

  // The token in the place of the rejected draft i. For a deterministic draft max(P p - q, 0) is
  // P p without the draft.
  MTP_HD int64_t recover(int64_t i, double prefix) {
    const double u = draws_.uniform(i, Salt::kResidual);
    return stochastic() ? rows_.sample_residual(u, prefix) : rows_.sample_without(u, drafts_[i]);
  }

  MTP_HD Decision cut_at_eos(Decision decision) const {
    for (int64_t i = 0; i < decision.accepted; ++i) {
      if (is_eos(drafts_[i])) return {i + 1, -1};
    }
    return decision;
  }

  Rows& rows_;
  const AcceptParams& params_;
  const int64_t* drafts_;  // (max_draft)
  int64_t num_draft_;
  Draws draws_;
  bool greedy_;
};

}  // namespace mtp
