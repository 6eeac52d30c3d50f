// Checks of the arguments that come as tensors, one value for each sequence. Numbers are checked in
// Python, where they cost nothing. On the CPU a value out of range is an error; a GPU's values are
// not known to the host, and such a sequence emits nothing.
#pragma once

#include <cfloat>
#include <cstdint>

#include "acceptance/params.h"
#include "common/macros.h"

namespace mtp {

// The name of an argument of sequence b that is out of range; null: all is well.
MTP_HD inline const char* out_of_range(const SamplingParams& s, int64_t b) {
  // NaN fails every comparison.
  if (!(s.temperature[b] >= 0.0 && s.temperature[b] <= DBL_MAX)) return "temperature";
  if (s.top_k[b] < 0) return "top_k";
  if (!(s.top_p[b] > 0.0 && s.top_p[b] <= 1.0)) return "top_p";
  if (!(s.min_p[b] >= 0.0 && s.min_p[b] < 1.0)) return "min_p";
  return nullptr;
}

MTP_HD inline const char* out_of_range(const AcceptParams& p, int64_t b) {
  if (p.num_draft[b] < 0 || p.num_draft[b] > p.max_draft) return "num_draft";
  return out_of_range(p.sampling, b);
}

MTP_HD inline const char* out_of_range(const SampleParams& p, int64_t b) {
  return out_of_range(p.sampling, b);
}

struct BadArgument {
  const char* name;  // null: all is well
  int64_t sequence;
};

template <class Params>
BadArgument check(const Params& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    if (const char* name = out_of_range(p, b)) return {name, b};
  }
  return {nullptr, 0};
}

}  // namespace mtp
