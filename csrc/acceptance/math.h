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

// 2^t for t <= 0: exactly 1 at 0, exactly 0 up to -100, else within 1.3e-7 of the true value,
// relative. NaN counts as -inf, t > 0 as 0. The bound keeps results, and probabilities made of
// them, from being subnormal, which takes processors 200 cycles. Operations that round alike
// everywhere, so that draws agree between backends.
template <class F>
MTP_HD MTP_INLINE F exp2_of_nonpositive(F t) {
  const F least(-100.0f), bounded = min(max(t, least), F(0.0f));  // in this order NaN is -100
  const F n = round(bounded);
  const F f = bounded - n;
  F p = fma(F(1.326472731e-3f), f, F(9.671512991e-3f));
  p = fma(p, f, F(5.550733581e-2f));
  p = fma(p, f, F(2.402224243e-1f));
  p = fma(p, f, F(6.931470037e-1f));
  return select_less(least, t, scale_by_power(fma(p, f, F(1.0f)), n), F(0.0f));
}

// A row is cut into tiles whose size depends on the vocabulary alone: sums by tile are the same
// however tiles fall to threads.
constexpr int kMaxTiles = 128;

struct Tiling {
  int64_t vocab;
  int size, count;

  MTP_HD explicit Tiling(int64_t vocab) : vocab(vocab) {
    constexpr int64_t kUnit = 128;
    size = static_cast<int>(kUnit * ((vocab + kUnit * kMaxTiles - 1) / (kUnit * kMaxTiles)));
    count = static_cast<int>((vocab + size - 1) / size);
  }
  MTP_HD int64_t begin(int tile) const { return int64_t{tile} * size; }
  MTP_HD int64_t end(int tile) const {
    return vocab < begin(tile) + size ? vocab : begin(tile) + size;
  }
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
//   argmax()                       lowest id of the largest target logit
//   target(id), draft(id)          p(id), q(id)
//   entropy()                      of p
//   residual_mass(P)               sum of max(P p - q, 0)
//   sample(u)                      from p
//   sample_residual(u, P, draft)   from max(P p - q, 0); -1 where that is 0 everywhere
// Each is called in one place, since a GPU's compiler will copy it there.
template <class Rows>
class Judge {
 public:
  MTP_HD Judge(Rows& rows, const AcceptParams& params, int64_t b)
      : rows_(rows),
        params_(params),
        b_(b),
        greedy_(params.sampling.temperature[b] == 0.0),
        takes_best_(greedy_ || params.rule == AcceptRule::kTypical),
        stochastic_(!takes_best_ && params.draft.data != nullptr) {}

  MTP_HD Decision decide() {
    const bool by_block = !greedy_ && params_.rule == AcceptRule::kBlock;
    int64_t accepted = 0;  // under the block rule: the longest prefix i with u_i <= h_i
    double accepted_prefix = 1.0, prefix = 1.0;
    bool rejected = false;
    for (int64_t i = 0;; ++i) {
      const bool usable = rows_.load(i);
      // A draft whose own distribution is unusable cannot be judged: the drafts end before it.
      const bool drafted = usable && has_draft(i) && (!stochastic_ || rows_.load_draft(i));
      if (by_block && !rejected) {
        const double u = i > 0 ? uniform(i - 1, Salt::kAccept) : 0.0;
        if (drafted) {
          if (u <= threshold(i, prefix)) {
            accepted = i;
            accepted_prefix = prefix;
          }
          prefix = block_prefix(prefix, rows_.target(draft(i)), draft_probability(i));
          continue;
        }
        if (u > prefix) {  // The last prefix is judged by h = P alone. Back to what was accepted.
          rejected = true;
          i = accepted - 1;
          continue;
        }
      } else if (!rejected && drafted && accepts(i)) {
        if (is_eos(draft(i))) return {i + 1, -1};
        continue;
      }
      return cut_at_eos({i, usable ? next(i, drafted, accepted_prefix) : -1});
    }
  }

 private:
  // What belongs to the sequence is read where it is needed: a GPU's registers are few.
  MTP_HD int64_t draft(int64_t i) const {
    return params_.draft_tokens[b_ * params_.draft_tokens_ld + i];
  }
  MTP_HD double uniform(int64_t index, Salt salt) const {
    return Draws{params_.sampling.seed[b_], params_.sampling.position[b_]}.uniform(index, salt);
  }

  // Whether there is a draft at i that a row can judge. The drafts end before an invalid id.
  MTP_HD bool has_draft(int64_t i) const {
    return i < params_.num_draft[b_] && draft(i) >= 0 && draft(i) < params_.vocab;
  }
  MTP_HD bool is_eos(int64_t token) const {
    return params_.eos_token >= 0 && token == params_.eos_token;
  }
  MTP_HD double draft_probability(int64_t i) const {
    return stochastic_ ? rows_.draft(draft(i)) : 1.0;
  }

  // Of the block rule: h_i, by what the next row leaves. For a deterministic draft
  // max(P p - q, 0) is P p without the draft.
  MTP_HD double threshold(int64_t i, double prefix) {
    const double mass =
        stochastic_ ? rows_.residual_mass(prefix) : prefix * (1.0 - rows_.target(draft(i)));
    return block_threshold(prefix, mass);
  }

  MTP_HD bool accepts(int64_t i) {
    if (greedy_) return rows_.argmax() == draft(i);
    const double p = rows_.target(draft(i));
    if (params_.rule == AcceptRule::kTypical) {
      return accepts_typical(p, rows_.entropy(), params_.typical_epsilon, params_.typical_delta);
    }
    return accepts_token(uniform(i, Salt::kAccept), p, draft_probability(i));
  }

  // The token in the place of the rejected draft i, or after the last one.
  MTP_HD int64_t next(int64_t i, bool rejected_draft, double prefix) {
    if (takes_best_) return rows_.argmax();
    const double u = uniform(i, rejected_draft ? Salt::kResidual : Salt::kBonus);
    const int64_t token = rejected_draft ? rows_.sample_residual(u, prefix, draft(i)) : -1;
    return token >= 0 ? token
                      : rows_.sample(u);  // p == q up to rounding, or p one-hot at the draft
  }

  MTP_HD Decision cut_at_eos(Decision decision) const {
    for (int64_t i = 0; i < decision.accepted; ++i) {
      if (is_eos(draft(i))) return {i + 1, -1};
    }
    return decision;
  }

  Rows& rows_;
  const AcceptParams& params_;
  int64_t b_;
  bool greedy_, takes_best_, stochastic_;
};

}  // namespace mtp
