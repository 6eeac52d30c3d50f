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
// Where the row's statistics were saved by an earlier call, a second kernel makes the gradient:
// each logit is read, differentiated and written by one thread, which needs no other.
//
// Bytes per row of V logits of size s, with class weights and label smoothing 4V for each pass more
// (from L2: they are the same for every row):
//   read     sV, plus s times what is not kept, if there is a gradient; with saved statistics sV
//   written  sV if there is a gradient
//   ignored row: read 0, written sV if there is a gradient
// Results and statistics, a few bytes a row, are not counted.
// Shared memory: ReduceScratch (640 bytes) and the part of the slice that is kept; with saved
// statistics none.
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
  static constexpr int kGradientThreads = 256;
  // With kMaxThreads: 2 leave 64 registers a thread, too few for the rare case of smoothing.
  static constexpr int kBlocksPerSm = smoothing ? 1 : 2;
  static constexpr int kBatch = 4;  // vectors that a thread has in flight
};

// What is known of a part of a row: its maximum, where that is first, the sum of exp(z_v - max),
// and under label smoothing sum_v a_v z_v.
struct Partial {
  float max, sum;
  int argmax;
  float smooth_sum;

  // The maximum starts at a finite value: exp(-inf - -inf) would be NaN.
  __device__ static Partial none() { return {-FLT_MAX, 0.0f, INT_MAX, 0.0f}; }
};

struct MergePartials {
  __device__ Partial operator()(const Partial& a, const Partial& b) const {
    const float max = fmaxf(a.max, b.max);
    int argmax = a.argmax < b.argmax ? a.argmax : b.argmax;
    if (a.max > b.max) argmax = a.argmax;
    if (b.max > a.max) argmax = b.argmax;
    return {max, a.sum * fast_exp(a.max - max) + b.sum * fast_exp(b.max - max), argmax,
            a.smooth_sum + b.smooth_sum};
  }
};

// How a row lies in memory and what of it is this thread's: `head` elements up to the first 16-byte
// boundary, whole vectors, and a tail. The vectors are shared out over `size` blocks; the one of
// this rank has `count` of them from vector `begin` on, of which it keeps all but the first
// `streamed`. Thread t takes vectors t, t + blockDim.x, ... of each of the two parts; the few
// elements of head and tail are one thread's each.
template <class T>
struct Slice {
  int head, begin, count, streamed;
  int edge;  // this thread's element of head or tail, or -1

  __device__ Slice(const T* row, int vocab, int keep, int rank, int size) {
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    head = misaligned == 0 ? 0 : kPack<T> - misaligned;
    if (head > vocab) head = vocab;
    const int vectors = (vocab - head) / kPack<T>;
    const int share = (vectors + size - 1) / size;
    begin = rank * share;
    if (begin > vectors) begin = vectors;
    count = vectors - begin < share ? vectors - begin : share;
    streamed = count > keep ? count - keep : 0;
    // Threads 0 to head - 1 of the first block, and the next ones of the last block for the tail.
    const int thread = static_cast<int>(threadIdx.x);
    const int tail_begin = head + vectors * kPack<T>;
    const int in_tail = thread - head;
    edge = -1;
    if (rank == 0 && thread < head) edge = thread;
    if (rank == size - 1 && in_tail >= 0 && in_tail < vocab - tail_begin) {
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

template <class Traits>
__device__ LossTerms terms_of(const CrossEntropyParams& p) {
  if constexpr (Traits::kSmoothing) return loss_terms(p);
  return {0.0f, p.z_loss, 0.0f, 0.0f};
}

// One row's view of the arguments.
template <class Traits>
struct RowContext {
  using T = typename Traits::Storage;
  const T* logits;            // (vocab)
  T* grad;                    // (vocab), or null
  const float* class_weight;  // (vocab), or null for 1
  int vocab, target;          // target: -1 where it is outside [0, vocab)
  float cap, inverse_cap;

  __device__ RowContext(const CrossEntropyParams& p, int64_t r)
      : logits(static_cast<const T*>(p.logits) + r * p.ld),
        grad(p.grad ? static_cast<T*>(p.grad) + r * p.grad_ld : nullptr),
        class_weight(p.class_weight),
        vocab(static_cast<int>(p.vocab)),
        target(in_range(p, p.target[r]) ? static_cast<int>(p.target[r]) : -1),
        cap(p.softcap),
        inverse_cap(Traits::kSoftcap ? 1.0f / p.softcap : 0.0f) {}

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
        partial.smooth_sum += weight(first + j) * z[j];
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
};

// Makes and stores the gradient of one row, of logits that it is given.
template <class Traits>
struct GradientWriter {
  using T = typename Traits::Storage;
  const RowContext<Traits>& row;
  RowCoefficients c;
  float max, scale;  // scale: on_probability over the row's sum
  bool aligned;      // grad lies as logits does, so that their vectors fall together

  __device__ GradientWriter(const CrossEntropyParams& p, int64_t r, const RowContext<Traits>& row,
                            const RowStats& stats)
      : row(row), max(stats.max) {
    const float weight = p.row_weight ? p.row_weight[r] : 1.0f;
    const float upstream = p.grad_output ? p.grad_output[r] : 1.0f;
    c = row_coefficients(stats, terms_of<Traits>(p), weight * upstream,
                         target_class_weight(p, row.target));
    scale = c.on_probability / stats.sum;
    const auto address = [](const T* q) { return reinterpret_cast<uintptr_t>(q); };
    aligned = (address(row.grad) - address(row.logits)) % 16 == 0;
  }

  // x[j] becomes the gradient of logit first + j, whose raw value it was.
  template <int N>
  __device__ void differentiate(float (&x)[N], int first) const {
    const unsigned at = static_cast<unsigned>(row.target - first);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float z = row.capped(x[j]);
      float constant = 0.0f;
      if constexpr (Traits::kSmoothing) constant = -c.on_class * row.weight(first + j);
      if (at == static_cast<unsigned>(j)) constant -= c.on_target;
      x[j] = fmaf(scale, fast_exp(z - max), constant);
      if constexpr (Traits::kSoftcap) x[j] *= softcap_derivative(z, row.inverse_cap);
    }
  }

  // Of the logits from `first` on.
  __device__ void write(int first, uint4 vector) const {
    float x[kPack<T>];
    unpack<T>(vector, x);
    differentiate(x, first);
    if (aligned) {
      store(reinterpret_cast<uint4*>(row.grad + first), pack<T>(x));
    } else {
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) store(row.grad + first + j, from_float<T>(x[j]));
    }
  }
  // Of one logit that no other thread has.
  __device__ void write_edge(int at) const {
    float x[1] = {to_float(load<Cache::kOnce>(row.logits + at))};
    differentiate(x, at);
    store(row.grad + at, from_float<T>(x[0]));
  }
};

// The gradient of an ignored row: this block's slice of it becomes 0.
template <class T>
__device__ void clear_slice(T* row, int vocab, int rank, int size) {
  const Slice<T> slice(row, vocab, 0, rank, size);
  for (int i = static_cast<int>(threadIdx.x); i < slice.count; i += static_cast<int>(blockDim.x)) {
    store(reinterpret_cast<uint4*>(row + slice.element(i)), uint4{});
  }
  if (slice.edge >= 0) store(row + slice.edge, from_float<T>(0.0f));
}

__device__ inline void write_results(const CrossEntropyParams& p, int64_t row,
                                     const RowStats& stats, float loss, float lse, int argmax,
                                     bool correct) {
  if (p.loss) p.loss[row] = loss;
  if (p.lse) p.lse[row] = lse;
  if (p.correct) p.correct[row] = correct;
  if (p.argmax) p.argmax[row] = argmax == INT_MAX ? -1 : argmax;
  if (p.stats) p.stats[row] = stats;
}

// Grid: a cluster for each row. keep: vectors of its slice that a block has shared memory for.
template <class Traits>
__global__ void __launch_bounds__(Traits::kMaxThreads, Traits::kBlocksPerSm)
    cross_entropy_kernel(CrossEntropyParams p, int keep) {
  using T = typename Traits::Storage;
  const Cluster cluster = Cluster::current();
  const int64_t r = static_cast<int64_t>(blockIdx.x) / cluster.size;
  const bool reports = cluster.rank == 0 && threadIdx.x == 0;
  const RowContext<Traits> row(p, r);
  if (p.target[r] == p.ignore_index) {
    if (reports) write_results(p, r, {}, 0.0f, 0.0f, INT_MAX, false);
    if (row.grad) clear_slice(row.grad, row.vocab, cluster.rank, cluster.size);
    return;
  }
  cluster.arrive();

  auto& scratch = *reinterpret_cast<ReduceScratch<Partial>*>(shared_memory());
  uint4* kept = reinterpret_cast<uint4*>(shared_memory() + sizeof scratch);
  const Slice<T> slice(row.logits, row.vocab, keep, cluster.rank, cluster.size);
  const uint4* vectors = reinterpret_cast<const uint4*>(row.logits + slice.element(0));
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
  if (slice.edge >= 0) {
    const float edge[1] = {to_float(load(row.logits + slice.edge))};
    Partial of_edge = Partial::none();  // merged, since it may lie before the vectors
    row.add(of_edge, edge, slice.edge);
    partial = MergePartials{}(partial, of_edge);
  }
  // Read before the reduction: after it, another thread's gradient may lie there.
  float target_logit = row.target < 0 ? NAN : 0.0f;  // its value, only where it is needed
  if (reports && row.target >= 0)
    target_logit = row.capped(to_float(load(row.logits + row.target)));

  partial = cluster_reduce(partial, Partial::none(), MergePartials{}, cluster, scratch);

  const RowStats stats{partial.max, partial.sum, target_logit, partial.smooth_sum};
  if (reports) {
    const float weight = p.row_weight ? p.row_weight[r] : 1.0f;
    const float loss =
        row_loss(stats, terms_of<Traits>(p), weight, target_class_weight(p, row.target));
    write_results(p, r, stats, loss, row_lse(stats), partial.argmax, partial.argmax == row.target);
  }
  if (!row.grad) return;

  const GradientWriter<Traits> writer(p, r, row, stats);
  const int stride = static_cast<int>(blockDim.x);
  for (int i = static_cast<int>(threadIdx.x); i < slice.kept(); i += stride) {
    writer.write(slice.element(slice.streamed + i), kept[i]);
  }
  if (slice.edge >= 0) writer.write_edge(slice.edge);
  for_each_vector<Traits, Cache::kOnce, true>(vectors, slice.streamed, [&](int i, uint4 vector) {
    writer.write(slice.element(i), vector);
  });
}

// The gradient from saved statistics. Grid: `parts` blocks for each row.
template <class Traits>
__global__ void __launch_bounds__(Traits::kGradientThreads)
    cross_entropy_gradient_kernel(CrossEntropyParams p, int parts) {
  using T = typename Traits::Storage;
  const int64_t r = static_cast<int64_t>(blockIdx.x) / parts;
  const int part = static_cast<int>(blockIdx.x) % parts;
  const RowContext<Traits> row(p, r);
  if (p.target[r] == p.ignore_index) {
    clear_slice(row.grad, row.vocab, part, parts);
    return;
  }
  const GradientWriter<Traits> writer(p, r, row, p.saved[r]);
  const Slice<T> slice(row.logits, row.vocab, 0, part, parts);
  if (slice.edge >= 0) writer.write_edge(slice.edge);
  for_each_vector<Traits, Cache::kOnce, false>(
      reinterpret_cast<const uint4*>(row.logits + slice.element(0)), slice.count,
      [&](int i, uint4 vector) { writer.write(slice.element(i), vector); });
}

// One for each batch of loads, in whole warps.
template <class Traits>
int threads_for(int64_t vectors, int most) {
  const int64_t warps = vectors / (kWarp * Traits::kBatch);
  if (warps * kWarp > most) return most;
  return warps < 1 ? kWarp : static_cast<int>(warps) * kWarp;
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
  const int max_threads =
      plan.keep > comfortable || !gradient ? Traits::kMaxThreads : Traits::kMaxThreads / 2;
  plan.threads = threads_for<Traits>(slice(plan.cluster), max_threads);
  plan.shared_bytes = static_cast<size_t>(kScratch) + static_cast<size_t>(plan.keep) * 16;
  return plan;
}

template <class Traits>
Status launch_rows(const CrossEntropyParams& p, const Device& device, void* stream) {
  const int64_t vectors = p.vocab / kPack<typename Traits::Storage>;
  if (p.saved) {
    constexpr int kMost = Traits::kGradientThreads;
    const int parts = static_cast<int>(vectors / (kMost * Traits::kBatch)) + 1;
    return launch(&cross_entropy_gradient_kernel<Traits>,
                  {p.rows * parts, threads_for<Traits>(vectors, kMost), 0, 1}, stream, p, parts);
  }
  const auto kernel = &cross_entropy_kernel<Traits>;
  bool clusters = false;
  const Status status = compiled_with_clusters(kernel, clusters);
  if (!status.ok()) return status;
  const Plan plan =
      plan_row<Traits>(vectors, p.grad != nullptr, clusters && device.has_clusters, device);
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
