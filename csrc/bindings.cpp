// The Python face of the kernels, and the only file that knows Python. Tensors arrive as integers
// (data pointers, sizes, strides, dtype codes) that mtp_fast/ops has checked; nothing here checks
// them again. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "acceptance/check.h"
#include "acceptance/params.h"
#include "commit/params.h"
#include "common/huge_pages.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "common/simd_functions.h"
#include "common/simd_level.h"
#include "common/workspace.h"
#include "cross_entropy/params.h"
#include "decode_layers/params.h"
#include "few_row_linear/params.h"
#include "gemm/params.h"

#if MTP_WITH_CUDA
#include "cuda/device.h"
#endif

namespace py = pybind11;

namespace mtp {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

CrossEntropyParams cross_entropy_params(int dtype, uintptr_t logits, int64_t ld, uintptr_t grad,
                                        int64_t grad_ld, int64_t rows, int64_t vocab,
                                        uintptr_t target, uintptr_t row_weight,
                                        uintptr_t class_weight, uintptr_t class_weight_sum,
                                        uintptr_t grad_output, uintptr_t saved, uintptr_t workspace,
                                        uintptr_t loss, uintptr_t lse, uintptr_t correct,
                                        uintptr_t argmax, uintptr_t stats, int64_t ignore_index,
                                        float label_smoothing, float z_loss, float softcap) {
  CrossEntropyParams p{};
  p.logits = pointer<const void>(logits);
  p.grad = pointer<void>(grad);
  p.target = pointer<const int64_t>(target);
  p.row_weight = pointer<const float>(row_weight);
  p.class_weight = pointer<const float>(class_weight);
  p.class_weight_sum = pointer<const float>(class_weight_sum);
  p.grad_output = pointer<const float>(grad_output);
  p.saved = pointer<const RowStats>(saved);
  p.workspace = pointer<float>(workspace);
  p.loss = pointer<float>(loss);
  p.lse = pointer<float>(lse);
  p.correct = pointer<bool>(correct);
  p.argmax = pointer<int64_t>(argmax);
  p.stats = pointer<RowStats>(stats);
  p.rows = rows;
  p.vocab = vocab;
  p.ld = ld;
  p.grad_ld = grad_ld;
  p.ignore_index = ignore_index;
  p.label_smoothing = label_smoothing;
  p.z_loss = z_loss;
  p.softcap = softcap;
  p.dtype = static_cast<DType>(dtype);
  return p;
}

// An op's entry points: the number of threads, or the device and the stream, and then what `make`
// turns into the parameters of its kernel.
template <class Params, class... Args>
auto cpu_entry(void (*kernel)(const Params&, int), Params (*make)(Args...)) {
  return [=](int threads, Args... args) { kernel(make(args...), threads); };
}

// The name of an argument by sequence that is out of range and the sequence that has it; ("", 0) if
// there is none.
using Fault = std::pair<const char*, int64_t>;

// The same for kernels whose arguments by sequence are checked first.
template <class Params, class... Args>
auto checked_cpu_entry(void (*kernel)(const Params&, int), Params (*make)(Args...)) {
  return [=](int threads, Args... args) -> Fault {
    const Params params = make(args...);
    const BadArgument bad = check(params);
    if (bad.name != nullptr) return {bad.name, bad.sequence};
    kernel(params, threads);
    return {"", 0};
  };
}

// A call of an entry point with its arguments, to be made again and again: in a decode step the way
// through Python counts. What the arguments point to is read, and checked, each time.
struct Call {
  Fault operator()() const { return make(); }

  std::function<Fault()> make;
};

// From the arguments of an entry point, which are those of `make`, to such a call.
template <class Entry, class Params, class... Args>
auto binding(const Entry& entry, Params (*)(Args...)) {
  return [=](int threads, Args... args) {
    return Call{[=]() -> Fault {
      if constexpr (std::is_void_v<decltype(entry(threads, args...))>) {
        entry(threads, args...);
        return {"", 0};
      } else {
        return entry(threads, args...);
      }
    }};
  };
}

// One call after the other, up to the first fault.
Call in_sequence(std::vector<Call> calls) {
  return {[calls = std::move(calls)]() -> Fault {
    for (const Call& call : calls) {
      const Fault fault = call();
      if (*fault.first != '\0') return fault;
    }
    return {"", 0};
  }};
}

#if MTP_WITH_CUDA
void raise_if(Status status) {
  if (!status.ok()) throw std::runtime_error(std::string("CUDA: ") + status.error);
}

template <class Params, class... Args>
auto cuda_entry(Status (*kernel)(const Params&, void*), Params (*make)(Args...)) {
  return [=](int device, uintptr_t stream, Args... args) {
    const DeviceGuard guard(device);
    raise_if(guard.status());
    raise_if(kernel(make(args...), pointer<void>(stream)));
  };
}

int64_t acceptance_exchange(int device, uintptr_t, int64_t batch, int64_t vocab) {
  const DeviceGuard guard(device);
  raise_if(guard.status());
  int64_t bytes = 0;
  raise_if(acceptance_exchange_bytes(batch, vocab, bytes));
  return bytes;
}
#endif

FewRowLinearParams few_row_linear_params(int dtype, uintptr_t x, uintptr_t weight,
                                         int64_t weight_ld, uintptr_t y, int64_t rows, int64_t in,
                                         int64_t out) {
  return {pointer<const void>(x),
          pointer<const void>(weight),
          pointer<float>(y),
          rows,
          in,
          out,
          weight_ld,
          static_cast<DType>(dtype)};
}

#if MTP_WITH_AMX
GemmParams gemm_params(int dtype, int64_t m, int64_t n, int64_t k, uintptr_t a, int64_t a_ld,
                       bool a_transposed, uintptr_t b, int64_t b_ld, bool b_transposed, uintptr_t c,
                       bool accumulate) {
  return {{pointer<const void>(a), a_ld, a_transposed},
          {pointer<const void>(b), b_ld, b_transposed},
          pointer<float>(c),
          m,
          n,
          k,
          accumulate,
          static_cast<DType>(dtype)};
}
#endif

DecodeShape decode_shape(int dtype, int64_t dim, int64_t ffn_dim, int64_t n_queries, int64_t n_keys,
                         int64_t head_dim) {
  return {dim, ffn_dim, n_queries, n_keys, head_dim, static_cast<DType>(dtype)};
}

// Bytes of a layer's packed weights, of a drafting head's, and of a block's cache for one sequence.
std::tuple<int64_t, int64_t, int64_t> decode_sizes(int dtype, int64_t dim, int64_t ffn_dim,
                                                   int64_t n_queries, int64_t n_keys,
                                                   int64_t head_dim, int64_t capacity) {
  const DecodeShape shape = decode_shape(dtype, dim, ffn_dim, n_queries, n_keys, head_dim);
  return {decode_packed_bytes_cpu(shape, false), decode_packed_bytes_cpu(shape, true),
          decode_cache_bytes_cpu(shape, capacity)};
}

void pack(int threads, int dtype, int64_t dim, int64_t ffn_dim, int64_t n_queries, int64_t n_keys,
          int64_t head_dim, uintptr_t weights, int64_t n_blocks, bool drafting, uintptr_t packed) {
  decode_pack_cpu(decode_shape(dtype, dim, ffn_dim, n_queries, n_keys, head_dim),
                  pointer<const DecodeWeights>(weights), n_blocks, drafting, pointer<void>(packed),
                  threads);
}

DecodeParams decode_params(int dtype, int64_t dim, int64_t ffn_dim, int64_t n_queries,
                           int64_t n_keys, int64_t head_dim, int64_t capacity, uintptr_t blocks,
                           uintptr_t packed, uintptr_t packed_drafting, uintptr_t cache,
                           int64_t n_layers, int64_t n_blocks, float norm_eps,
                           uintptr_t final_scale, uintptr_t rope, int64_t vocab,
                           uintptr_t embedding, uintptr_t unembedding, int64_t batch, int64_t rows,
                           uintptr_t start, uintptr_t tokens, uintptr_t trunk, uintptr_t hidden,
                           uintptr_t logits, uintptr_t trunk_row, int64_t trunk_rows,
                           uintptr_t drafts, int64_t drafts_ld,
                           const std::shared_ptr<Workspace>& workspace) {
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = pointer<const int64_t>(start)[b];
    if (first < 0 || first + rows > capacity) {
      throw std::out_of_range("rows at positions " + std::to_string(first) + " to " +
                              std::to_string(first + rows - 1) + " of sequence " +
                              std::to_string(b) + " lie outside a cache of " +
                              std::to_string(capacity));
    }
  }
  for (int64_t b = 0; trunk_row != 0 && b < batch; ++b) {
    const int64_t row = pointer<const int64_t>(trunk_row)[b];
    if (row < 0 || row >= trunk_rows) {
      throw std::out_of_range("row " + std::to_string(row) + " of sequence " + std::to_string(b) +
                              " is not one of " + std::to_string(trunk_rows));
    }
  }
  for (int64_t i = 0; tokens != 0 && i < batch * rows; ++i) {
    const int64_t token = pointer<const int64_t>(tokens)[i];
    if (token < 0 || token >= vocab) {
      throw std::out_of_range("token " + std::to_string(token) + " lies outside a vocabulary of " +
                              std::to_string(vocab));
    }
  }
  DecodeParams p{};
  static_cast<DecodeShape&>(p) = decode_shape(dtype, dim, ffn_dim, n_queries, n_keys, head_dim);
  p.blocks = pointer<const DecodeBlock>(blocks);
  p.packed = pointer<const void>(packed);
  p.packed_drafting = pointer<const void>(packed_drafting);
  p.cache = pointer<void>(cache);
  p.rope = pointer<const float>(rope);
  p.final_scale = pointer<const float>(final_scale);
  p.start = pointer<const int64_t>(start);
  p.embedding = pointer<const void>(embedding);
  p.unembedding = pointer<const void>(unembedding);
  p.tokens = pointer<const int64_t>(tokens);
  p.trunk = pointer<float>(trunk);
  p.hidden = pointer<float>(hidden);
  p.logits = pointer<float>(logits);
  p.trunk_row = pointer<const int64_t>(trunk_row);
  p.drafts = pointer<int64_t>(drafts);
  p.trunk_rows = trunk_rows;
  p.drafts_ld = drafts_ld;
  p.workspace = workspace.get();
  p.n_layers = n_layers;
  p.n_blocks = n_blocks;
  p.vocab = vocab;
  p.batch = batch;
  p.rows = rows;
  p.capacity = capacity;
  p.norm_eps = norm_eps;
  return p;
}

void scaled_add(int threads, int x_dtype, uintptr_t x, int y_dtype, uintptr_t y, int64_t n,
                float alpha, bool accumulate) {
  scaled_add_cpu({pointer<const void>(x), pointer<void>(y), n, alpha, accumulate,
                  static_cast<DType>(x_dtype), static_cast<DType>(y_dtype)},
                 threads);
}

// Sampling arguments travel as (address of one value per sequence or 0, one value for all) pairs.
SamplingParams sampling_params(uintptr_t temperatures, double temperature, uintptr_t top_ks,
                               int64_t top_k, uintptr_t top_ps, double top_p, uintptr_t min_ps,
                               double min_p, uintptr_t seeds, int64_t seed, uintptr_t positions,
                               int64_t position) {
  return {{pointer<const float>(temperatures), temperature},
          {pointer<const int64_t>(top_ks), top_k},
          {pointer<const float>(top_ps), top_p},
          {pointer<const float>(min_ps), min_p},
          {pointer<const int64_t>(seeds), seed},
          {pointer<const int64_t>(positions), position}};
}

AcceptParams accept_params(int dtype, int64_t batch, int64_t max_draft, int64_t vocab,
                           uintptr_t target, int64_t target_batch_stride, int64_t target_row_stride,
                           uintptr_t draft, int64_t draft_batch_stride, int64_t draft_row_stride,
                           uintptr_t draft_tokens, int64_t draft_tokens_ld, uintptr_t num_drafts,
                           uintptr_t temperatures, double temperature, uintptr_t top_ks,
                           int64_t top_k, uintptr_t top_ps, double top_p, uintptr_t min_ps,
                           double min_p, uintptr_t seeds, int64_t seed, uintptr_t positions,
                           int64_t position, int rule, double typical_epsilon, double typical_delta,
                           int64_t eos_token, int64_t pad_token, uintptr_t tokens,
                           uintptr_t num_tokens, uintptr_t num_accepted, uintptr_t logprobs,
                           uintptr_t exchange) {
  AcceptParams p{};
  p.target = {pointer<const void>(target), target_batch_stride, target_row_stride};
  p.draft = {pointer<const void>(draft), draft_batch_stride, draft_row_stride};
  p.draft_tokens = pointer<const int64_t>(draft_tokens);
  p.num_draft = {pointer<const int64_t>(num_drafts), max_draft};
  p.sampling = sampling_params(temperatures, temperature, top_ks, top_k, top_ps, top_p, min_ps,
                               min_p, seeds, seed, positions, position);
  p.tokens = pointer<int64_t>(tokens);
  p.num_tokens = pointer<int32_t>(num_tokens);
  p.num_accepted = pointer<int32_t>(num_accepted);
  p.logprobs = pointer<float>(logprobs);
  p.exchange = pointer<unsigned char>(exchange);
  p.batch = batch;
  p.max_draft = max_draft;
  p.draft_tokens_ld = draft_tokens_ld;
  p.vocab = vocab;
  p.eos_token = eos_token;
  p.pad_token = pad_token;
  p.typical_epsilon = typical_epsilon;
  p.typical_delta = typical_delta;
  p.rule = static_cast<AcceptRule>(rule);
  p.dtype = static_cast<DType>(dtype);
  return p;
}

SampleParams sample_params(int dtype, int64_t batch, int64_t vocab, uintptr_t logits,
                           int64_t batch_stride, uintptr_t temperatures, double temperature,
                           uintptr_t top_ks, int64_t top_k, uintptr_t top_ps, double top_p,
                           uintptr_t min_ps, double min_p, uintptr_t seeds, int64_t seed,
                           uintptr_t positions, int64_t position, int64_t index, uintptr_t tokens,
                           int64_t tokens_ld, uintptr_t exchange) {
  SampleParams p{};
  p.logits = {pointer<const void>(logits), batch_stride, 0};
  p.sampling = sampling_params(temperatures, temperature, top_ks, top_k, top_ps, top_p, min_ps,
                               min_p, seeds, seed, positions, position);
  p.tokens = pointer<int64_t>(tokens);
  p.exchange = pointer<unsigned char>(exchange);
  p.batch = batch;
  p.vocab = vocab;
  p.tokens_ld = tokens_ld;
  p.index = index;
  p.dtype = static_cast<DType>(dtype);
  return p;
}

CommitParams commit_params(uintptr_t end_tokens, int64_t n_ends, int64_t ends_ld,
                           uintptr_t prompt_length, uintptr_t limit, uintptr_t produced,
                           uintptr_t forwards, uintptr_t live, uintptr_t stuck, uintptr_t accepted,
                           uintptr_t output, uintptr_t drafted, uintptr_t block, uintptr_t start,
                           uintptr_t position, uintptr_t row, uintptr_t draft_start, int64_t batch,
                           int64_t output_ld, int64_t block_ld, int64_t judged, uintptr_t tokens,
                           uintptr_t num_tokens, uintptr_t num_accepted) {
  CommitParams p{};
  p.tokens = pointer<const int64_t>(tokens);
  p.num_tokens = pointer<const int32_t>(num_tokens);
  p.num_accepted = pointer<const int32_t>(num_accepted);
  p.end_tokens = pointer<const int64_t>(end_tokens);
  p.prompt_length = pointer<const int64_t>(prompt_length);
  p.limit = pointer<const int64_t>(limit);
  p.produced = pointer<int64_t>(produced);
  p.forwards = pointer<int64_t>(forwards);
  p.live = pointer<bool>(live);
  p.stuck = pointer<bool>(stuck);
  p.accepted = pointer<int64_t>(accepted);
  p.output = pointer<int64_t>(output);
  p.drafted = pointer<bool>(drafted);
  p.block = pointer<int64_t>(block);
  p.start = pointer<int64_t>(start);
  p.position = pointer<int64_t>(position);
  p.row = pointer<int64_t>(row);
  p.draft_start = pointer<int64_t>(draft_start);
  p.batch = batch;
  p.judged = judged;
  p.n_ends = n_ends;
  p.ends_ld = ends_ld;
  p.output_ld = output_ld;
  p.block_ld = block_ld;
  return p;
}

// For the known-answer tests.
std::vector<uint32_t> philox(std::vector<uint32_t> counter, uint32_t key0, uint32_t key1) {
  PhiloxWords words;
  for (int i = 0; i < 4; ++i) words.word[i] = counter.at(i);
  words = philox4x32_10(words, key0, key1);
  return {words.word, words.word + 4};
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = MTP_COMPILER;
  info["pybind11"] = MTP_PYBIND11_VERSION;
  info["cuda"] = MTP_CUDA_VERSION;
  info["cuda_architectures"] = MTP_CUDA_ARCHS;
#if MTP_WITH_CUDA
  info["cuda_driver"] = driver_version();
#endif
  std::vector<std::string> levels;
  for (int level = 0; level <= static_cast<int>(best_simd_level()); ++level) {
    levels.push_back(name_of(static_cast<SimdLevel>(level)));
  }
  info["simd_levels"] = levels;
  info["simd"] = name_of(simd_level());
  info["threads_from"] = thread_source();
  return info;
}

}  // namespace
}  // namespace mtp

PYBIND11_MODULE(_C, m) {
  using namespace mtp;
  using without_gil = py::call_guard<py::gil_scoped_release>;
  simd_level();  // throws where MTP_FAST_SIMD is wrong
  m.def("cross_entropy", cpu_entry(cross_entropy_cpu, cross_entropy_params), without_gil());
  m.def("scaled_add", &mtp::scaled_add, without_gil());
  m.def("few_row_linear", cpu_entry(few_row_linear_cpu, few_row_linear_params), without_gil());
#if MTP_WITH_AMX
  m.def("gemm_amx", cpu_entry(gemm_amx, gemm_params), without_gil());
#endif
  m.def("decode_sizes", &decode_sizes);
  m.def("decode_pack", &pack, without_gil());
  m.def("advise_huge_pages", &advise_huge_pages);
  // The parts of a decode step.
  py::class_<Workspace, std::shared_ptr<Workspace>>(m, "Workspace", py::module_local())
      .def(py::init());
  py::class_<Call>(m, "Call", py::module_local()).def("__call__", &Call::operator(), without_gil());
  m.def("in_sequence", &in_sequence);
  m.def("bind_decode_layers", binding(cpu_entry(decode_layers_cpu, decode_params), decode_params));
  m.def("bind_decode_heads", binding(cpu_entry(decode_heads_cpu, decode_params), decode_params));
  m.def("bind_speculative_accept",
        binding(checked_cpu_entry(speculative_accept_cpu, accept_params), accept_params));
  m.def("bind_sample", binding(checked_cpu_entry(sample_cpu, sample_params), sample_params));
  m.def("bind_commit", binding(cpu_entry(commit_cpu, commit_params), commit_params));
  m.def("philox4x32_10", &philox);
  m.def("uniform_of", &uniform_of);
  m.def("simd_function", &simd_function);
#if MTP_WITH_CUDA
  m.def("cross_entropy_cuda", cuda_entry(cross_entropy_cuda, cross_entropy_params), without_gil());
  m.def("speculative_accept_cuda", cuda_entry(speculative_accept_cuda, accept_params),
        without_gil());
  m.def("acceptance_exchange_cuda", &acceptance_exchange);
  m.def("sample_cuda", cuda_entry(sample_cuda, sample_params), without_gil());
  m.def("commit_cuda", cuda_entry(commit_cuda, commit_params), without_gil());
#endif
  m.def("build_info", &build_info);
  m.def("has_amx", &has_amx);
  m.def("set_simd_level", [](int level) { set_simd_level(static_cast<SimdLevel>(level)); });
}
