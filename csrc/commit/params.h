// What a decode loop does with the outcome of an acceptance step: append the tokens, stop sequences
// at their limits and end tokens, count, and lay out the next step. A sequence is one thread's
// work, the same function on both backends; on a GPU it takes the place of some twenty small
// launches.
#pragma once

#include <cstdint>

#include "common/macros.h"
#include "common/status.h"

namespace mtp {

struct CommitParams {
  // Of the acceptance step.
  const int64_t* tokens;        // (batch, judged + 1)
  const int32_t* num_tokens;    // (batch)
  const int32_t* num_accepted;  // (batch)
  // Of the generation.
  const int64_t* end_tokens;     // (n_ends) for each sequence, ends_ld apart; or null
  const int64_t* prompt_length;  // (batch)
  const int64_t* limit;          // (batch): of new tokens
  // The state.
  int64_t* produced;  // (batch): new tokens
  int64_t* forwards;  // (batch)
  bool* live;         // (batch): has not ended
  bool* stuck;        // (batch): has ended because its logits were not finite
  int64_t* accepted;  // (judged): steps in which the draft at each place was accepted
  int64_t* output;    // (batch, output_ld): new tokens
  bool* drafted;      // (batch, output_ld): which of them were drafts
  // The next step.
  int64_t* block;        // (batch, block_ld): its first column becomes the last token
  int64_t* start;        // (batch): that token's position
  int64_t* position;     // (batch): the position behind it
  int64_t* row;          // (batch): row of the step just judged from which drafts are made
  int64_t* draft_start;  // (batch): that row's position
  int64_t batch, judged, n_ends, ends_ld, output_ld, block_ld;
};

// Returns how many of the first places of `accepted`, which the sequences share, are to go up by 1.
MTP_HD inline int64_t commit_sequence(const CommitParams& p, int64_t b) {
  const int64_t* tokens = p.tokens + b * (p.judged + 1);
  const int64_t before = p.produced[b], offset = b * p.output_ld + before;
  const int64_t room = p.limit[b] - before;
  int64_t count = p.num_tokens[b] < room ? p.num_tokens[b] : room;
  bool ended = false;
  for (int64_t i = 0; i < count && !ended; ++i) {
    for (int64_t e = 0; e < p.n_ends; ++e) {
      if (p.end_tokens[b * p.ends_ld + e] == tokens[i]) ended = true;
    }
    if (ended) count = i + 1;
  }
  const bool was_live = p.live[b];
  if (was_live) {
    for (int64_t i = 0; i < count; ++i) {
      p.output[offset + i] = tokens[i];
      p.drafted[offset + i] = i < p.num_accepted[b];
    }
    ++p.forwards[b];
    p.stuck[b] = p.num_tokens[b] == 0;
    p.produced[b] = before + count;
    p.live[b] = count > 0 && count < room && !ended;
  }
  // A sequence that has ended, or that got no token, goes on where it is: its rows are unused.
  const int64_t produced = p.produced[b], end = p.prompt_length[b] + produced;
  p.block[b * p.block_ld] = p.output[b * p.output_ld + (produced > 0 ? produced - 1 : 0)];
  p.start[b] = end - 1;
  p.position[b] = end;
  p.row[b] = count > 0 ? count - 1 : 0;
  p.draft_start[b] = end > 1 ? end - 2 : 0;
  return was_live ? p.num_accepted[b] : 0;
}

inline void commit_cpu(const CommitParams& p, int) {
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t i = commit_sequence(p, b); i > 0; --i) ++p.accepted[i - 1];
  }
}

// On the current device, queued on `stream` (a cudaStream_t). Defined in cuda.cu.
Status commit_cuda(const CommitParams& params, void* stream);

}  // namespace mtp
