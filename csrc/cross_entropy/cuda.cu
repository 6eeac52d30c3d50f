// Cross-entropy of rows of logits on a GPU: loss, statistics and gradient, as cpu.cpp has it.
//
// A cluster of 1, 2, 4 or 8 blocks takes one row, each block a slice. The slice comes from global
// memory once, in 16-byte vectors, for the running maximum and sum, and stays in shared memory; the
// blocks exchange one Partial each; then the gradient is made from shared memory and may be written
// over the logits. The part of a slice that shared memory does not hold (rows that 8 blocks cannot
// hold, or that one block cannot where there are no clusters) is read twice, the second time in
// reverse order, since its end is what the L2 cache is most likely to have. Without a gradient
// nothing is kept: one block reads the row.
//
// Bytes per row of V logits of size s, with class weights and label smoothing 4V for each pass more
// (from L2: they are the same for every row):
//   read     sV, plus s times what is not kept, if there is a gradient
//   written  sV if there is a gradient
//   ignored row: read 0, written sV if there is a gradient
// Shared memory: ReduceScratch (800 bytes) and the part of the slice that is kept.
#include <cfloat>
#include <climits>
#include <cmath>

#include "cross_entropy/math.h"
#include "cross_entropy/params.h"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"

namespace mtp {

template <class StorageType, bool softcap, bool smoothing>
struct CrossEntropyTraits {
  using Storage = StorageType;
  static constexpr bool kSoftcap = softcap;
  static constexpr bool kSmoothing = smoothing;
  static constexpr int kMaxThreads = 512;
  // With kMaxThreads: 2 leave 64 registers a thread, too few for the rare case of smoothing.
  static constexpr int kBlocksPerSm = smoothing ? 1 : 2;
  static constexpr int kBatch = 4;  // vectors that a thread has in flight
};

// What is known of a part of a row: its maximum, where that is first, the sum of exp(z_v - max),
// and under label smoothing sum_v a_v z_v and sum_v a_v.
struct Partial {
  float max, sum;
  int argmax;
  float smooth_sum, class_weight_sum;

  // The maximum starts at a finite value: exp(-inf - -inf) would be NaN.
  __device__ static Partial none() { return {-FLT_MAX, 0.0f, INT_MAX, 0.0f, 0.0f}; }
};

struct MergePartials {
  __device__ Partial operator()(const Partial& a, const Partial& b) const {
    const float max = fmaxf(a.max, b.max);
    int argmax = a.argmax < b.argmax ? a.argmax : b.argmax;
    if (a.max > b.max) argmax = a.argmax;
    if (b.max > a.max) argmax = b.argmax;
    return {max, a.sum * fast_exp(a.max - max) + b.sum * fast_exp(b.max - max), argmax,
            a.smooth_sum + b.smooth_sum, a.class_weight_sum + b.class_weight_sum};
  }
};

// How a row lies in memory and what of it is this thread's: `head` elements up to the first 16-byte
// boundary, whole vectors, and a tail. A block has `count` vectors from vector `begin` on, of which
// it keeps all but the first `streamed`. Thread t takes vectors t, t + blockDim.x, ... of each of
// the two parts; the few elements of head and tail are one thread's each.
template <class T>
struct Slice {
  int head, begin, count, streamed;
  int edge;  // this thread's element of head or tail, or -1

  __device__ Slice(const T* row, int vocab, int keep, const Cluster& cluster) {
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    head = misaligned == 0 ? 0 : kPack<T> - misaligned;
    if (head > vocab) head = vocab;
    const int vectors = (vocab - head) / kPack<T>;
    const int share = (vectors + cluster.size - 1) / cluster.size;
    begin = cluster.rank * share;
    if (begin > vectors) begin = vectors;
    count = vectors - begin < share ? vectors - begin : share;
    streamed = count > keep ? count - keep : 0;
    // Threads 0 to head - 1 of the first block, and the next ones of the last block for the tail.
    const int thread = static_cast<int>(threadIdx.x);
    const int tail_begin = head + vectors * kPack<T>;
    const int in_tail = thread - head;
    edge = -1;
    if (cluster.rank == 0 && thread < head) edge = thread;
    if (cluster.rank == cluster.size - 1 && in_tail >= 0 && in_tail < vocab - tail_begin) {
      edge = tail_begin + in_tail;
    }
  }

  __device__ int kept() const { return count - streamed; }

  // Index in the row of the first element of the slice's vector `i`.
  __device__ int element(int i) const { return head + (begin + i) * kPack<T>; }
};

// Calls f(i, vectors[i]) for this thread's share of `count` vectors, a batch of loads at a time.
template <class Traits, Cache cache, bool reverse, class F>
__device__ void for_each_vector(const uint4* vectors, int count, const F& f) {
  constexpr int kBatch = Traits::kBatch;
  const int stride = static_cast<int>(blockDim.x);
  for (int first = static_cast<int>(threadIdx.x); first < count; first += kBatch * stride) {
    uint4 batch[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = first + k * stride;
      if (i < count) batch[k] = load<cache>(vectors + (reverse ? count - 1 - i : i));
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = first + k * stride;
      if (i < count) f(reverse ? count - 1 - i : i, batch[k]);
    }
  }
}

// One row's view of the arguments.
template <class Traits>
struct RowContext {
  using T = typename Traits::Storage;
  const T* logits;            // (vocab)
  T* grad;                    // (vocab), or null
  const float* class_weight;  // (vocab), or null for 1
  int vocab, target;
  float cap, inverse_cap;

  __device__ float capped(float raw) const {
    if constexpr (Traits::kSoftcap) return softcap(raw, cap, inverse_cap);
    return raw;
  }

  __device__ float weight(int v) const { return class_weight ? load(class_weight + v) : 1.0f; }

  // Adds N neighbouring logits, the first of them logit `first`, behind all that were added before.
  template <int N>
  __device__ void add(Partial& partial, const float (&raw)[N], int first) const {
    float z[N];
    float top = -FLT_MAX, sum = 0.0f;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      z[j] = capped(raw[j]);
      top = fmaxf(top, z[j]);
      if constexpr (Traits::kSmoothing) {
        const float a = weight(first + j);
        partial.smooth_sum += a * z[j];
        partial.class_weight_sum += a;
      }
    }
    const float max = fmaxf(partial.max, top);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += fast_exp(z[j] - max);
    partial.sum = partial.sum * fast_exp(partial.max - max) + sum;
    if (top > partial.max) {
#pragma unroll
      for (int j = N - 1; j >= 0; --j) {
        if (z[j] == top) partial.argmax = first + j;
      }
    }
    partial.max = max;
  }

  // x[j] becomes the gradient of logit first + j, whose raw value it was. scale is on_probability
  // over the row's sum.
  template <int N>
  __device__ void differentiate(float (&x)[N], int first, const RowCoefficients& c, float max,
                                float scale) const {
    const unsigned at = static_cast<unsigned>(target - first);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float z = capped(x[j]);
      float constant = 0.0f;
      if constexpr (Traits::kSmoothing) constant = -c.on_class * weight(first + j);
      if (at == static_cast<unsigned>(j)) constant -= c.on_target;
      x[j] = fmaf(scale, fast_exp(z - max), constant);
      if constexpr (Traits::kSoftcap) x[j] *= softcap_derivative(z, inverse_cap);
    }
  }

  // Writes N neighbouring gradients; one by one where grad is not aligned as logits is.
  __device__ void write(const float (&x)[kPack<T>], int first, bool aligned) const {
    if (aligned) {
      store(reinterpret_cast<uint4*>(grad + first), pack<T>(x));
    } else {
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) store(grad + first + j, from_float<T>(x[j]));
    }
  }
};

// The gradient of a row that has no loss, all of one value.
template <class T>
__device__ void fill_slice(T* row, int vocab, float value, const Cluster& cluster) {
  const Slice<T> slice(row, vocab, 0, cluster);
  float x[kPack<T>];
#pragma unroll
  for (float& element : x) element = value;
  const uint4 vector = pack<T>(x);
  for (int i = static_cast<int>(threadIdx.x); i < slice.count; i += static_cast<int>(blockDim.x)) {
    store(reinterpret_cast<uint4*>(row + slice.element(i)), vector);
  }
  if (slice.edge >= 0) store(row + slice.edge, from_float<T>(value));
}

template <class T>
__device__ bool same_alignment(const T* a, const T* b) {
  return (reinterpret_cast<uintptr_t>(a) - reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}

__device__ inline void write_stats(const CrossEntropyParams& p, int64_t row, float loss, float lse,
                                   bool correct) {
  if (p.loss) p.loss[row] = loss;
  if (p.lse) p.lse[row] = lse;
  if (p.correct) p.correct[row] = correct;
}

// Grid: a cluster for each row. keep: vectors of its slice that a block has shared memory for.
template <class Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads, Traits::kBlocksPerSm)
    cross_entropy_kernel(CrossEntropyParams p, int keep) {
  using T = typename Traits::Storage;
  const Cluster cluster = Cluster::current();
  const int64_t r = static_cast<int64_t>(blockIdx.x) / cluster.size;
  const int vocab = static_cast<int>(p.vocab);
  const int64_t target = p.target[r];
  const bool reports = cluster.rank == 0 && threadIdx.x == 0;
  T* grad = p.grad ? static_cast<T*>(p.grad) + r * p.grad_ld : nullptr;
  if (target == p.ignore_index || target < 0 || target >= vocab) {
    const float value = target == p.ignore_index ? 0.0f : NAN;
    if (reports) write_stats(p, r, value, value, false);
    if (grad) fill_slice(grad, vocab, value, cluster);
    return;
  }
  cluster.arrive();

  auto& scratch = *reinterpret_cast<ReduceScratch<Partial>*>(shared_memory());
  uint4* kept = reinterpret_cast<uint4*>(shared_memory() + sizeof scratch);
  const RowContext<Traits> row{static_cast<const T*>(p.logits) + r * p.ld,
                               grad,
                               p.class_weight,
                               vocab,
                               static_cast<int>(target),
                               p.softcap,
                               Traits::kSoftcap ? 1.0f / p.softcap : 0.0f};
  const Slice<T> slice(row.logits, vocab, keep, cluster);
  const uint4* vectors = reinterpret_cast<const uint4*>(row.logits + slice.element(0));
  // Read before the reduction: after it, another thread's gradient may lie there.
  const float target_logit = reports ? row.capped(to_float(load(row.logits + target))) : 0.0f;

  Partial partial = Partial::none();
  const auto add = [&](int i, uint4 vector) {
    float x[kPack<T>];
    unpack<T>(vector, x);
    row.add(partial, x, slice.element(i));
  };
  for_each_vector<Traits, Cache::kKeep, false>(vectors, slice.streamed, add);
  for_each_vector<Traits, Cache::kOnce, false>(vectors + slice.streamed, slice.kept(),
                                               [&](int i, uint4 vector) {
                                                 kept[i] = vector;
                                                 add(slice.streamed + i, vector);
                                               });
  float edge[1] = {0.0f};
  if (slice.edge >= 0) {
    edge[0] = to_float(load<Cache::kOnce>(row.logits + slice.edge));
    Partial of_edge = Partial::none();  // merged, since it may lie before the vectors
    row.add(of_edge, edge, slice.edge);
    partial = MergePartials{}(partial, of_edge);
  }
  partial = cluster_reduce(partial, Partial::none(), MergePartials{}, cluster, scratch);

  // The sum of the class weights is made here, since the host would have to wait for it.
  const LossTerms terms{p.label_smoothing, p.z_loss, partial.class_weight_sum,
                        p.label_smoothing / static_cast<float>(vocab)};
  const RowStats stats{partial.max, logf(partial.sum), partial.sum, target_logit,
                       partial.smooth_sum};
  const float weight = p.row_weight ? p.row_weight[r] : 1.0f;
  const float target_class_weight = p.class_weight ? p.class_weight[target] : 1.0f;
  if (reports) {
    write_stats(p, r, row_loss(stats, terms, weight, target_class_weight), row_lse(stats),
                partial.argmax == row.target);
  }
  if (!grad) return;

  const float upstream = p.grad_output ? p.grad_output[r] : 1.0f;
  const RowCoefficients c = row_coefficients(stats, terms, weight * upstream, target_class_weight);
  const float scale = c.on_probability / stats.sum;
  const bool aligned = same_alignment<T>(grad, row.logits);
  const auto write = [&](int i, uint4 vector) {
    float x[kPack<T>];
    unpack<T>(vector, x);
    row.differentiate(x, slice.element(i), c, partial.max, scale);
    row.write(x, slice.element(i), aligned);
  };
  const int stride = static_cast<int>(blockDim.x);
  for (int i = static_cast<int>(threadIdx.x); i < slice.kept(); i += stride) {
    write(slice.streamed + i, kept[i]);
  }
  if (slice.edge >= 0) {
    row.differentiate(edge, slice.edge, c, partial.max, scale);
    store(grad + slice.edge, from_float<T>(edge[0]));
  }
  for_each_vector<Traits, Cache::kOnce, true>(vectors, slice.streamed, write);
}

// How many blocks a row of `vectors` vectors takes, and how large they are.
struct Plan {
  int cluster, threads, keep;
  size_t shared_bytes;
};

template <class Traits>
Plan plan_row(int64_t vectors, bool gradient, bool clusters, const Device& device) {
  constexpr int kScratch = static_cast<int>(sizeof(ReduceScratch<Partial>));
  constexpr int kReserved = 1024;  // of an SM's shared memory, for each block on it
  static_assert(kScratch % 16 == 0, "what is kept is aligned");
  const auto slice = [&](int cluster) { return (vectors + cluster - 1) / cluster; };
  const int most = (device.shared_per_block - kScratch) / 16;
  // Four blocks on an SM: while one computes or stores, others load.
  const int comfortable = (device.shared_per_sm / 4 - kReserved - kScratch) / 16;
  Plan plan{1, 0, 0, 0};
  if (gradient) {
    while (clusters && plan.cluster < kMaxCluster && slice(plan.cluster) > comfortable) {
      plan.cluster *= 2;
    }
    plan.keep = static_cast<int>(slice(plan.cluster) < most ? slice(plan.cluster) : most);
  }
  const int64_t warps = slice(plan.cluster) / (kWarp * Traits::kBatch);
  const int max_threads =
      plan.keep > comfortable || !gradient ? Traits::kMaxThreads : Traits::kMaxThreads / 2;
  plan.threads = warps < 1 ? kWarp : static_cast<int>(warps) * kWarp;
  if (warps * kWarp > max_threads) plan.threads = max_threads;
  plan.shared_bytes = static_cast<size_t>(kScratch) + static_cast<size_t>(plan.keep) * 16;
  return plan;
}

template <class Traits>
Status launch_rows(const CrossEntropyParams& p, const Device& device, void* stream) {
  const auto kernel = &cross_entropy_kernel<Traits>;
  bool clusters = false;
  const Status status = compiled_with_clusters(kernel, clusters);
  if (!status.ok()) return status;
  const Plan plan = plan_row<Traits>(p.vocab / kPack<typename Traits::Storage>, p.grad != nullptr,
                                     clusters && device.has_clusters, device);
  return launch(kernel, {p.rows * plan.cluster, plan.threads, plan.shared_bytes, plan.cluster},
                stream, p, plan.keep);
}

Status cross_entropy_cuda(const CrossEntropyParams& p, void* stream) {
  if (p.rows == 0) return {};
  if (p.vocab > INT_MAX - 16) return {"a vocabulary of more than 2^31 - 17 is not supported"};
  Device device;
  const Status status = get_device(device);
  if (!status.ok()) return status;
  return dispatch_dtype(p.dtype, [&](auto storage) {
    using T = decltype(storage);
    const auto smoothed = [&](auto softcap) {
      constexpr bool kSoftcap = decltype(softcap)::value;
      return p.label_smoothing != 0.0f
                 ? launch_rows<CrossEntropyTraits<T, kSoftcap, true>>(p, device, stream)
                 : launch_rows<CrossEntropyTraits<T, kSoftcap, false>>(p, device, stream);
    };
    return p.softcap > 0.0f ? smoothed(std::true_type{}) : smoothed(std::false_type{});
  });
}

}  // namespace mtp
