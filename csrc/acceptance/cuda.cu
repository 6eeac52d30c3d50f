// The acceptance step and the sampler on a GPU, as cpu.cpp has them: one launch, nothing allocated,
// nothing that the host has to wait for; seeds, positions and all other values by sequence are read
// from device memory.
//
// A team of 1, 2, 4 or 8 blocks, a cluster, takes one sequence. Where there are no clusters (before
// sm_90) that is one block, or for a batch of one up to 8 blocks, a cooperative grid that exchanges
// through global memory. All threads of the team run Judge side by side: what a decision depends on
// is the same in all of them, and each step through a row is one of the collectives of
// cuda_row.cuh.
//
// Bytes per row of V logits of size s, where it is judged: sV from global memory, and sV again from
// the nearest cache if the sequence is sampled without top-k. Filters read some of the tiles
// (math.h) again, as cuda_filters.cuh says. The row that a token is drawn from: one tile by each
// warp; under draft logits both rows once more, for the residual. Rows after the first rejection
// (under the block rule: after the last draft) are not read. Log-probabilities: 2sV for each token
// emitted. A cooperative grid moves besides, through the L2 cache, 4 bytes a tile written and as
// many read by each block for each maximum, sum and count, and for each histogram 6 KiB written by
// each block and up to 6 KiB read from each block by each.
//
// Shared memory: 14.5 KiB.
#include <cfloat>
#include <climits>
#include <cmath>

#include "acceptance/check.h"
#include "acceptance/cuda_filters.cuh"
#include "acceptance/cuda_row.cuh"
#include "acceptance/math.h"
#include "acceptance/params.h"
#include "cuda/launch.h"

namespace mtp {

template <class StorageType>
struct AcceptanceTraits {
  using Storage = StorageType;
  static constexpr int kMaxThreads = 512;
  static constexpr int kBlocksPerSm = 1;  // 2 leave 64 registers a thread, too few
};

struct SharedMemory {
  SharedBins bins;
  TileScratch target, draft;
  float sums[kMaxTiles];
};
static_assert(sizeof(SharedMemory) == 14848, "as the header says");

__device__ inline SharedMemory& shared() {
  return *reinterpret_cast<SharedMemory*>(shared_memory());
}

// Reads a row and applies the sequence's temperature and filters. False: no logit is finite.
template <class T>
__device__ bool read_filtered(Distribution<T>& d, const T* row, const SamplingParams& sampling,
                              int64_t b) {
  const double temperature = sampling.temperature[b];
  if (temperature == 0.0) return d.read(row, 1.0, false);
  // Top-k finds its few logits by their order; without it the sums of the whole row are needed.
  if (!d.read(row, temperature, !needs_top_k(sampling, b, d.tiles.vocab))) return false;
  if (needs_filters(sampling, b, d.tiles.vocab)) {
    Histogram<T> histogram(d, shared().bins, shared().sums);
    Filters<Distribution<T>, Histogram<T>>(d, histogram).apply(sampling, b);
  }
  return true;
}

// The rows of one sequence, as Judge (math.h) walks them.
template <class T>
class Rows {
 public:
  __device__ Rows(const AcceptParams& params, int64_t b, const Tiles& tiles)
      : params_(params),
        b_(b),
        tiles_(tiles),
        target_(tiles, shared().target),
        draft_(tiles, shared().draft) {}

  __device__ bool load(int64_t i) { return load(target_, params_.target, i); }
  __device__ bool load_draft(int64_t i) { return load(draft_, params_.draft, i); }

  __device__ int64_t argmax() const { return target_.argmax(); }
  __device__ double target(int64_t id) const { return target_.probability(id); }
  __device__ double draft(int64_t id) const { return draft_.probability(id); }

  // With weights 2^t: H = log(sum of 2^t) - (sum of 2^t t) / (sum of 2^t), t in nats.
  __device__ double entropy() {
    sum_tiles([&](int id) {
      const float z = clean<T>(to_float(mtp::load(target_.row + id)));
      const float t = (z - target_.max) * target_.scale;
      return target_.weight_of(id) * fmaxf(t, -FLT_MAX);  // 0 * -inf would be NaN
    });
    constexpr double kLn2 = 0.69314718055994531;
    return log(target_.total) - kLn2 * sum_of(tiles_.count, sums()) / target_.total;
  }

  __device__ double residual_mass(double prefix) {
    sum_tiles(residual(prefix, -1));
    return sum_of(tiles_.count, sums());
  }

  __device__ int64_t sample(double u) const { return target_.sample(u); }

  __device__ int64_t sample_residual(double u, double prefix, int64_t draft) {
    const Residual weight = residual(prefix, draft);
    sum_tiles(weight);
    return pick(tiles_, u, sums(), weight);
  }

  // Log-softmax of raw row i at one id.
  __device__ float log_probability(int64_t i, int64_t id) {
    const T* row = params_.target.row<T>(b_, i);
    target_.read(row, 1.0, true);
    const float z = fminf(to_float(mtp::load(row + id)), kLargest<T>);
    return static_cast<float>(static_cast<double>(z) - target_.max - log(target_.total));
  }

 private:
  __device__ bool load(Distribution<T>& d, const LogitsView& logits, int64_t i) {
    return read_filtered(d, logits.row<T>(b_, i), params_.sampling, b_);
  }

  __device__ auto sums() const {
    return [](int tile) -> double { return shared().sums[tile]; };
  }

  template <class F>
  __device__ void sum_tiles(const F& weight) {
    const auto sum_tile = [&](int tile) {
      float sum = 0.0f;
      if (shared().target.max[tile] >= target_.floor) {  // no weight without p's
        const int end = static_cast<int>(tiles_.end(tile));
#pragma unroll 1
        for (int id = static_cast<int>(tiles_.begin(tile)) + lane_in_warp(); id < end;
             id += kWarp) {
          sum += weight(id);
        }
      }
      tiles_.team.publish(shared().sums + tile, warp_reduce(sum, Sum{}));
    };
    tiles_.gather(sum_tile, shared().sums);
  }

  // Weight of max(P p - q, 0) at an id; for a deterministic draft that of P p without it.
  struct Residual {
    const Rows& rows;
    float on_p, on_q;
    int64_t draft;

    __device__ float operator()(int id) const {
      const float p = rows.target_.weight_of(id);
      if (rows.params_.draft.data == nullptr) return id == draft ? 0.0f : p;
      const float q = rows.draft_.weight_of(id);
      return residual_weight(Lane(p) * Lane(on_p), Lane(q) * Lane(on_q)).v;
    }
  };

  __device__ Residual residual(double prefix, int64_t draft) const {
    return {*this, static_cast<float>(prefix / target_.total),
            static_cast<float>(1.0 / draft_.total), draft};
  }

  const AcceptParams& params_;
  int64_t b_;
  const Tiles& tiles_;
  Distribution<T> target_, draft_;
};

// Grid: a team for each sequence.
template <class Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads, Traits::kBlocksPerSm)
    speculative_accept_kernel(const __grid_constant__ AcceptParams p) {
  using T = typename Traits::Storage;
  const Tiles tiles(p.vocab, Team(p.exchange, sizeof(SharedMemory)));
  const int64_t b = tiles.team.index();
  const int64_t width = p.max_draft + 1;
  const int64_t* drafts = p.draft_tokens + b * p.draft_tokens_ld;
  Rows<T> rows(p, b, tiles);
  Decision decision{0, -1};
  if (out_of_range(p, b) == nullptr) decision = Judge<Rows<T>>(rows, p, b).decide();
  const int64_t emitted = decision.accepted + (decision.next >= 0 ? 1 : 0);
  const auto token = [&](int64_t i) { return i < decision.accepted ? drafts[i] : decision.next; };
  const bool writes = tiles.team.rank() == 0;
  if (writes && threadIdx.x == 0) {
    p.num_tokens[b] = static_cast<int32_t>(emitted);
    p.num_accepted[b] = static_cast<int32_t>(decision.accepted);
  }
#pragma unroll 1
  for (int64_t i = threadIdx.x; writes && i < width; i += blockDim.x) {
    p.tokens[b * width + i] = i < emitted ? token(i) : p.pad_token;
    if (p.logprobs && i >= emitted) p.logprobs[b * width + i] = 0.0f;
  }
  if (p.logprobs == nullptr) return;
#pragma unroll 1
  for (int64_t i = 0; i < emitted; ++i) {
    const float logprob = rows.log_probability(i, token(i));
    if (writes && threadIdx.x == 0) p.logprobs[b * width + i] = logprob;
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads, Traits::kBlocksPerSm)
    sample_kernel(const __grid_constant__ SampleParams p) {
  using T = typename Traits::Storage;
  const Tiles tiles(p.vocab, Team(p.exchange, sizeof(SharedMemory)));
  const int64_t b = tiles.team.index();
  Distribution<T> d(tiles, shared().target);
  int64_t token = -1;
  if (out_of_range(p, b) == nullptr && read_filtered(d, p.logits.row<T>(b, 0), p.sampling, b)) {
    const Draws draws{p.sampling.seed[b], p.sampling.position[b]};
    token = p.sampling.temperature[b] == 0.0 ? d.argmax()
                                             : d.sample(draws.uniform(p.index, Salt::kDraft));
  }
  if (tiles.team.rank() == 0 && threadIdx.x == 0) p.tokens[b * p.tokens_ld] = token;
}

// As many warps as a row has tiles, as far as the device has room for them.
struct Plan {
  int team, threads;  // team: blocks for each sequence
  bool cooperative;
};

template <class Traits, class Params>
Status plan_sequences(void (*kernel)(Params), int64_t batch, int64_t vocab, const Device& device,
                      Plan& plan) {
  bool clusters = false;
  const Status status = compiled_with_clusters(kernel, clusters);
  clusters = clusters && device.has_clusters;
  const int tiles = Tiling(vocab).count;
  constexpr int kMaxWarps = Traits::kMaxThreads / kWarp;
  plan = {1, (tiles < kMaxWarps ? tiles : kMaxWarps) * kWarp, false};
  // A cooperative grid is one team.
  while ((clusters || batch == 1) && plan.team < kMaxCluster && tiles > kMaxWarps * plan.team &&
         2 * batch * plan.team <= device.sms) {
    plan.team *= 2;
  }
  plan.cooperative = !clusters && plan.team > 1;
  return status;
}

// One kernel over a batch.
template <class Traits, class Params>
Status launch_sequences(void (*kernel)(Params), const Params& p, const Device& device,
                        void* stream) {
  if (p.batch == 0) return {};
  Plan plan;
  const Status status = plan_sequences<Traits>(kernel, p.batch, p.vocab, device, plan);
  if (!status.ok()) return status;
  if (plan.cooperative != (p.exchange != nullptr)) return {"exchange: not as exchange_bytes says"};
  return launch(kernel,
                {p.batch * plan.team, plan.threads, sizeof(SharedMemory),
                 plan.cooperative ? 1 : plan.team, plan.cooperative},
                stream, p);
}

template <class Params, class F>
Status dispatch(const Params& p, const F& launch_as) {
  if (p.vocab > INT_MAX - 128) return {"a vocabulary of more than 2^31 - 129 is not supported"};
  Device device;
  const Status status = get_device(device);
  if (!status.ok()) return status;
  return dispatch_dtype(p.dtype, [&](auto storage) {
    return launch_as(AcceptanceTraits<decltype(storage)>{}, device);
  });
}

Status speculative_accept_cuda(const AcceptParams& p, void* stream) {
  return dispatch(p, [&](auto traits, const Device& device) {
    using Traits = decltype(traits);
    return launch_sequences<Traits>(&speculative_accept_kernel<Traits>, p, device, stream);
  });
}

Status sample_cuda(const SampleParams& p, void* stream) {
  return dispatch(p, [&](auto traits, const Device& device) {
    using Traits = decltype(traits);
    return launch_sequences<Traits>(&sample_kernel<Traits>, p, device, stream);
  });
}

Status acceptance_exchange_bytes(int64_t batch, int64_t vocab, int64_t& bytes) {
  using Traits = AcceptanceTraits<float>;
  Device device;
  Status status = get_device(device);
  if (!status.ok()) return status;
  Plan plan;
  status = plan_sequences<Traits>(&sample_kernel<Traits>, batch, vocab, device, plan);
  bytes = plan.cooperative ? plan.team * static_cast<int64_t>(sizeof(SharedMemory)) : 0;
  return status;
}

}  // namespace mtp
