// Transformer blocks over new rows of each sequence, against cached keys and values: a decode step
// from tokens to logits in one call. Everything is float32 but the weights, which stay in the dtype
// that the model stores them in, and the rows that go into products with the unembedding. Where the
// processor has products of bfloat16 and the weights are in it, so are all rows that go into
// products, keys and values.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/simd_level.h"
#include "common/workspace.h"

namespace mtp {

struct DecodeShape {
  int64_t dim, ffn_dim, n_queries, n_keys, head_dim;
  DType dtype;  // of the weights
};

// One block: x += out(attention(norm(x))); x += down(silu(gate(norm(x))) * up(norm(x))). These are
// a model's weights, contiguous; decode_pack copies them into the order in which they are read
// (packed.h). mtp_fast/decoding/cpu_layers.py fills tables of both structs, field by field.
struct DecodeWeights {
  const void* qkv;      // ((n_queries + 2 n_keys) * head_dim, dim)
  const void* out;      // (dim, n_queries * head_dim)
  const void* gate_up;  // (2 * ffn_dim, dim)
  const void* down;     // (dim, ffn_dim)
};

// The rest of a block.
struct DecodeBlock {
  const float* attention_scale;  // (dim): the norm's weight
  const float* qkv_bias;         // ((n_queries + 2 n_keys) * head_dim), or null
  const float* query_scale;      // (head_dim): weight of the queries' norm, or null
  const float* key_scale;        // (head_dim), or null
  const float* ffn_scale;        // (dim)
};

struct DecodeParams : DecodeShape {
  const DecodeBlock* blocks;    // the layers, then the drafting heads
  const void* packed;           // the layers' weights, by decode_pack at the same SIMD level
  const void* packed_drafting;  // likewise the drafting heads'
  void* cache;               // (batch, n_blocks, decode_cache_bytes): keys and values; first zeros
  const float* rope;         // (capacity, 2, head_dim): cosines, signed sines (apply_rope)
  const float* final_scale;  // (dim): weight of the norm behind the last layer and each head
  const void* embedding;     // (vocab, dim)
  const void* unembedding;   // (vocab, dim)
  const int64_t* start;      // (batch): position of a sequence's first new row
  const int64_t* tokens;     // (batch, rows), in [0, vocab); decode_heads: null
  float* trunk;              // (batch, rows, dim): the last layer's input, which the heads share
  const int64_t* trunk_row;  // decode_heads: (batch): which of trunk_rows of each sequence
  float* hidden;             // (batch, rows, dim): behind the final norm; or null
  float* logits;             // see below
  int64_t* drafts;           // decode_heads: (batch, heads), drafts_ld apart; or null
  int64_t n_layers, n_blocks, vocab, batch, rows;  // rows: new ones of each sequence
  int64_t capacity;                                // positions of a sequence
  int64_t trunk_rows, drafts_ld;
  Workspace* workspace;
  float norm_eps;
};

// Bytes of one block's packed weights: a layer's, or a drafting head's.
template <SimdLevel level>
int64_t decode_packed_bytes(const DecodeShape& shape, bool drafting);

// Bytes that hold the keys and values of `capacity` positions for one block and one sequence.
template <SimdLevel level>
int64_t decode_cache_bytes(const DecodeShape& shape, int64_t capacity);

// Packs the weights of `n` blocks, one block after the other: of layers as they are, of drafting
// heads in int8, with one scale for each output: half of bfloat16 to read. Head 0 judges what these
// draft, so that greedy output, or the distribution of what is sampled, remains what it is.
template <SimdLevel level>
void decode_pack(const DecodeShape& shape, const DecodeWeights* weights, int64_t n, bool drafting,
                 void* packed, int threads);

// Embeds the tokens and runs the layers, one after the other; writes `trunk`, the keys and values
// of the drafting heads, and `hidden` or the logits (batch, rows, vocab).
template <SimdLevel level>
void decode_layers_run(const DecodeParams& params, int threads);

// Runs each drafting head by itself on one row a sequence of `trunk`, whose keys and values are
// stored: logits (batch, heads, vocab), and in `drafts` where the largest of each are.
template <SimdLevel level>
void decode_heads_run(const DecodeParams& params, int threads);

inline int64_t decode_packed_bytes_cpu(const DecodeShape& shape, bool drafting) {
  int64_t bytes = 0;
  with_simd_level([&](auto level) { bytes = decode_packed_bytes<level.value>(shape, drafting); });
  return bytes;
}

inline int64_t decode_cache_bytes_cpu(const DecodeShape& shape, int64_t capacity) {
  int64_t bytes = 0;
  with_simd_level([&](auto level) { bytes = decode_cache_bytes<level.value>(shape, capacity); });
  return bytes;
}

inline void decode_pack_cpu(const DecodeShape& shape, const DecodeWeights* weights, int64_t n,
                            bool drafting, void* packed, int threads) {
  with_simd_level(
      [&](auto level) { decode_pack<level.value>(shape, weights, n, drafting, packed, threads); });
}

inline void decode_layers_cpu(const DecodeParams& params, int threads) {
  with_simd_level([&](auto level) { decode_layers_run<level.value>(params, threads); });
}

inline void decode_heads_cpu(const DecodeParams& params, int threads) {
  with_simd_level([&](auto level) { decode_heads_run<level.value>(params, threads); });
}

}  // namespace mtp
