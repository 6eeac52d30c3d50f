// The acceptance step and the sampler on the CPU.
//
// A thread takes one sequence at a time; where there are fewer sequences than threads, all threads
// share the passes over each row instead. Rows are read as the rule asks for them: after a
// rejection nothing more is read, save the one row that the next token comes from. No probabilities
// are written: a row leaves its tiles' maxima and sums, on the stack. Nothing is allocated.
#include <algorithm>
#include <cmath>

#include "acceptance/cpu_filters.h"
#include "acceptance/cpu_row.h"
#include "acceptance/math.h"
#include "acceptance/params.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace mtp {
namespace MTP_SIMD {
namespace {

// Reads a row and applies the sequence's temperature and filters. False: no logit is finite.
template <class T>
bool read_filtered(Distribution<T>& d, const T* row, const SamplingParams& sampling, int64_t b) {
  const double temperature = sampling.temperature[b];
  if (temperature == 0.0) return d.read(row, 1.0, false);
  // Top-k finds its few logits by their order; without it the sums of the whole row are needed.
  if (!d.read(row, temperature, !needs_top_k(sampling, b, d.tiles.vocab))) return false;
  if (needs_filters(sampling, b, d.tiles.vocab)) {
    Histogram<T> histogram(d);
    Filters(d, histogram).apply(sampling, b);
  }
  return true;
}

// An id drawn from the distribution, whose sums must be there.
template <class T>
int64_t sample_from(const Distribution<T>& d, double u) {
  return d.with_weight([&](const auto& weight) { return pick(d.tiles, d.scratch.sum, u, weight); });
}

// The rows of one sequence, as Judge (math.h) walks them.
template <class T>
class Rows {
 public:
  Rows(const AcceptParams& params, int64_t b, const Tiles& tiles)
      : params_(params),
        b_(b),
        tiles_(tiles),
        target_(tiles, target_scratch_),
        draft_(tiles, draft_scratch_) {}

  bool load(int64_t i) { return load(target_, params_.target, i); }
  bool load_draft(int64_t i) { return load(draft_, params_.draft, i); }

  int64_t argmax() const { return target_.argmax(); }
  double target(int64_t id) const { return target_.probability(id); }
  double draft(int64_t id) const { return draft_.probability(id); }

  // With weights 2^t: H = log(sum of 2^t) - (sum of 2^t t) / (sum of 2^t), t in nats.
  double entropy() {
    const Vec top(target_.max), scale(target_.scale);
    target_.with_weight([&](const auto& weight) {
      sum_tiles([&](int64_t i, int64_t n) {
        const Vec t = (load_clean(target_.row + i, n) - top) * scale;
        return weight(i, n) * max(t, Vec(-FLT_MAX));  // 0 * -inf would be NaN
      });
      return 0;
    });
    constexpr double kLn2 = 0.69314718055994531;
    return std::log(target_.total) - kLn2 * sum_in_order(sums_, tiles_.count) / target_.total;
  }

  double residual_mass(double prefix) {
    with_residual(prefix, [&](const auto& weight) {
      sum_tiles(weight);
      return 0;
    });
    return sum_in_order(sums_, tiles_.count);
  }

  int64_t sample(double u) const { return sample_from(target_, u); }

  int64_t sample_residual(double u, double prefix, int64_t draft) {
    if (params_.draft.data == nullptr) return sample_without(u, draft);
    return with_residual(prefix, [&](const auto& weight) {
      sum_tiles(weight);
      return pick(tiles_, sums_, u, weight);
    });
  }

 private:
  // From p without the draft, which is all that P p leaves when q is one-hot there.
  int64_t sample_without(double u, int64_t id) {
    return target_.with_weight([&](const auto& weight) {
      const auto without = [&](int64_t i, int64_t n) {
        const Vec kept = weight(i, n);
        if (id < i || id >= i + Vec::kLanes) return kept;
        float lanes[Vec::kLanes];
        kept.store(lanes);
        lanes[id - i] = 0.0f;
        return Vec::load(lanes);
      };
      // Summed again, not subtracted: the id may outweigh the rest of its tile by far.
      std::copy(target_scratch_.sum, target_scratch_.sum + tiles_.count, sums_);
      const int tile = static_cast<int>(id / tiles_.size);
      sums_[tile] = sum_of_weights(tiles_.begin(tile), tiles_.end(tile), without);
      return pick(tiles_, sums_, u, without);
    });
  }

  bool load(Distribution<T>& d, const LogitsView& logits, int64_t i) {
    return read_filtered(d, logits.row<T>(b_, i), params_.sampling, b_);
  }

  template <class F>
  void sum_tiles(const F& weight) {
    tiles_.for_ranges([&](int first, int last) {
      for (int b = first; b < last; ++b) {
        // No weight without p's.
        sums_[b] = target_scratch_.max[b] < target_.floor
                       ? 0.0f
                       : sum_of_weights(tiles_.begin(b), tiles_.end(b), weight);
      }
    });
  }

  template <class F>
  auto with_residual(double prefix, const F& f) const {
    const Vec on_p(static_cast<float>(prefix / target_.total));
    const Vec on_q(static_cast<float>(1.0 / draft_.total));
    return target_.with_weight([&](const auto& p) {
      return draft_.with_weight([&](const auto& q) {
        return f(
            [&](int64_t i, int64_t n) { return residual_weight(p(i, n) * on_p, q(i, n) * on_q); });
      });
    });
  }

  const AcceptParams& params_;
  int64_t b_;
  Tiles tiles_;
  TileScratch target_scratch_, draft_scratch_;
  Distribution<T> target_, draft_;
  float sums_[kMaxTiles];
};

// Log-softmax of the raw logits at one id.
template <class T>
float log_probability(const T* row, int64_t id, const Tiles& tiles) {
  TileScratch scratch;
  Distribution<T> d(tiles, scratch);
  d.read(row, 1.0, true);
  const double z = std::min(to_float(row[id]), kLargest<T>);
  return static_cast<float>(z - d.max - std::log(d.total));
}

template <class T>
void accept_one(const AcceptParams& p, int64_t b, const Tiles& tiles) {
  Rows<T> rows(p, b, tiles);
  const Decision decision = Judge<Rows<T>>(rows, p, b).decide();
  const int64_t width = p.max_draft + 1;
  const int64_t* drafts = p.draft_tokens + b * p.draft_tokens_ld;
  int64_t* tokens = p.tokens + b * width;
  std::copy(drafts, drafts + decision.accepted, tokens);
  int64_t emitted = decision.accepted;
  if (decision.next >= 0) tokens[emitted++] = decision.next;
  std::fill(tokens + emitted, tokens + width, p.pad_token);
  p.num_tokens[b] = static_cast<int32_t>(emitted);
  p.num_accepted[b] = static_cast<int32_t>(decision.accepted);
  if (p.logprobs == nullptr) return;
  float* logprobs = p.logprobs + b * width;
  for (int64_t i = 0; i < width; ++i) {
    logprobs[i] = i < emitted ? log_probability(p.target.row<T>(b, i), tokens[i], tiles) : 0.0f;
  }
}

template <class T>
int64_t sample_one(const SampleParams& p, int64_t b, const Tiles& tiles) {
  TileScratch scratch;
  Distribution<T> d(tiles, scratch);
  if (!read_filtered(d, p.logits.row<T>(b, 0), p.sampling, b)) return -1;
  if (p.sampling.temperature[b] == 0.0) return d.argmax();
  const Draws draws{p.sampling.seed[b], p.sampling.position[b]};
  return sample_from(d, draws.uniform(p.index, Salt::kDraft));
}

// f(b, tiles) for each sequence of the batch, each of which has `rows` rows.
template <class F>
void for_sequences(int threads, int64_t batch, int64_t rows, int64_t vocab, const F& f) {
  constexpr int64_t kPiece = 16384;  // logits that are worth handing to another thread
  if (batch * rows * vocab < 2 * kPiece) threads = 1;
  const int within_row =
      static_cast<int>(std::min<int64_t>(threads, (vocab + kPiece - 1) / kPiece));
  const bool split_rows = batch < within_row;
  const Tiles tiles(vocab, split_rows ? within_row : 1);
  const int64_t grain = std::max<int64_t>(1, kPiece / (rows * vocab));
  parallel_for(split_rows ? 1 : threads, batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) f(b, tiles);
  });
}

}  // namespace
}  // namespace MTP_SIMD

template <>
void accept_batch<SimdLevel::MTP_SIMD>(const AcceptParams& p, int threads) {
  using namespace MTP_SIMD;
  dispatch_dtype(p.dtype, [&](auto storage) {
    for_sequences(threads, p.batch, p.max_draft + 1, p.vocab, [&](int64_t b, const Tiles& tiles) {
      accept_one<decltype(storage)>(p, b, tiles);
    });
  });
}

template <>
void sample_batch<SimdLevel::MTP_SIMD>(const SampleParams& p, int threads) {
  using namespace MTP_SIMD;
  dispatch_dtype(p.dtype, [&](auto storage) {
    for_sequences(threads, p.batch, 1, p.vocab, [&](int64_t b, const Tiles& tiles) {
      p.tokens[b * p.tokens_ld] = sample_one<decltype(storage)>(p, b, tiles);
    });
  });
}

}  // namespace mtp
