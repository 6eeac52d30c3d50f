// Checks of the arguments that come as host tensors, one value for each sequence. Numbers are
// checked in Python, where they cost nothing.
#pragma once

#include <cfloat>
#include <cstdint>

#include "acceptance/params.h"

namespace mtp {

struct BadArgument {
  const char* name;  // null: all is well
  int64_t sequence;
};

inline BadArgument check_sampling(const SamplingParams& s, int64_t batch) {
  for (int64_t b = 0; b < batch; ++b) {
    // NaN fails every comparison.
    if (!(s.temperature[b] >= 0.0 && s.temperature[b] <= DBL_MAX)) return {"temperature", b};
    if (s.top_k[b] < 0) return {"top_k", b};
    if (!(s.top_p[b] > 0.0 && s.top_p[b] <= 1.0)) return {"top_p", b};
    if (!(s.min_p[b] >= 0.0 && s.min_p[b] < 1.0)) return {"min_p", b};
  }
  return {nullptr, 0};
}

inline BadArgument check_accept(const AcceptParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.num_draft[b] < 0 || p.num_draft[b] > p.max_draft) return {"num_draft", b};
  }
  return check_sampling(p.sampling, p.batch);
}

}  // namespace mtp
