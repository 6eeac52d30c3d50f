// What the acceptance step and the sampler read and write. One call handles a whole batch; the CPU
// and the CUDA kernel take the same structs.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"
#include "common/simd_level.h"
#include "common/status.h"

namespace mtp {

// One value for each sequence, or one for all of them.
template <class Stored, class Value>
struct PerSequence {
  const Stored* values;  // (batch), or null
  Value same;            // where values is null

  MTP_HD Value operator[](int64_t b) const { return values ? static_cast<Value>(values[b]) : same; }
};
using PerSequenceReal = PerSequence<float, double>;
using PerSequenceInt = PerSequence<int64_t, int64_t>;

struct SamplingParams {
  PerSequenceReal temperature;    // 0: greedy
  PerSequenceInt top_k;           // 0: off
  PerSequenceReal top_p;          // 1: off
  PerSequenceReal min_p;          // 0: off
  PerSequenceInt seed, position;  // key and counter of every draw
};

// Logits of one dtype, rows contiguous.
struct LogitsView {
  const void* data;  // (batch, rows, vocab), strides in elements
  int64_t batch_stride, row_stride;

  template <class T>
  MTP_HD const T* row(int64_t b, int64_t i) const {
    return static_cast<const T*>(data) + b * batch_stride + i * row_stride;
  }
};

enum class AcceptRule : int { kExact = 0, kBlock = 1, kTypical = 2 };

struct AcceptParams {
  LogitsView target;            // (batch, max_draft + 1, vocab)
  LogitsView draft;             // (batch, max_draft, vocab), or null data: deterministic drafts
  const int64_t* draft_tokens;  // (batch, max_draft), draft_tokens_ld apart
  PerSequenceInt num_draft;     // in [0, max_draft]
  SamplingParams sampling;
  int64_t* tokens;          // (batch, max_draft + 1), padded with pad_token
  int32_t* num_tokens;      // (batch)
  int32_t* num_accepted;    // (batch)
  float* logprobs;          // (batch, max_draft + 1), 0 where padded; or null
  unsigned char* exchange;  // CUDA: (acceptance_exchange_bytes), 16-byte aligned; null for none
  int64_t batch, max_draft, vocab, draft_tokens_ld;
  int64_t eos_token;  // emission ends after it; negative: none
  int64_t pad_token;
  double typical_epsilon, typical_delta;
  AcceptRule rule;
  DType dtype;
};

struct SampleParams {
  LogitsView logits;  // (batch, 1, vocab)
  SamplingParams sampling;
  int64_t* tokens;          // (batch), tokens_ld apart; -1 where a row has no finite logit
  unsigned char* exchange;  // as above
  int64_t batch, vocab, tokens_ld;
  int64_t index;  // the draft's place in its block
  DType dtype;
};

template <SimdLevel level>  // defined in cpu.cpp, which is compiled once per level
void accept_batch(const AcceptParams& params, int threads);
template <SimdLevel level>
void sample_batch(const SampleParams& params, int threads);

inline void speculative_accept_cpu(const AcceptParams& params, int threads) {
  with_simd_level([&](auto level) { accept_batch<level.value>(params, threads); });
}

inline void sample_cpu(const SampleParams& params, int threads) {
  with_simd_level([&](auto level) { sample_batch<level.value>(params, threads); });
}

// On the current device, queued on `stream` (a cudaStream_t). Defined in cuda.cu.
Status speculative_accept_cuda(const AcceptParams& params, void* stream);
Status sample_cuda(const SampleParams& params, void* stream);

// How much memory the blocks of one call need on the current device to exchange what they find; 0
// where they have other means. It may hold anything.
Status acceptance_exchange_bytes(int64_t batch, int64_t vocab, int64_t& bytes);

}  // namespace mtp
