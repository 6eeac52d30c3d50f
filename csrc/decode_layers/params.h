// Transformer blocks over new rows of each sequence, against cached keys and values: all the layers
// of a decode step in one call. Between the products everything is float32; the products take the
// weights as the model stores them and their inputs rounded to the same dtype.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/simd_level.h"

namespace mtp {

// One block: x += out(attention(norm(x))); x += down(silu(gate(norm(x))) * up(norm(x))).
// mtp_fast/decoding/cpu_blocks.py fills tables of these, field by field.
struct DecodeBlock {
  const float* attention_scale;  // (dim): the norm's weight
  const void* qkv;               // ((n_queries + 2 n_keys) * head_dim, dim)
  const float* qkv_bias;         // as long as qkv, or null
  const float* query_scale;      // (head_dim): weight of the queries' norm, or null
  const float* key_scale;        // (head_dim), or null
  const void* out;               // (dim, n_queries * head_dim)
  const float* ffn_scale;        // (dim)
  const void* gate_up;           // (2 * ffn_dim, dim)
  const void* down;              // (dim, ffn_dim)
  float* keys;                   // (n_keys, capacity, head_dim) of sequence 0; the next sequence
  float* values;                 // is sequence_stride on. Values likewise
};

struct DecodeParams {
  const DecodeBlock* blocks;
  const float* rope;         // (capacity, 2, head_dim): cosines, signed sines (apply_rope)
  const float* final_scale;  // (dim): weight of the norm behind the last block
  const int64_t* start;      // (batch): position of a sequence's first new row
  float* x;                  // see below
  float* last_input;  // (batch * rows, dim): decode_layers writes the last block's input here
  int64_t n_blocks, batch, rows;  // rows: new ones of each sequence
  int64_t dim, ffn_dim, n_queries, n_keys, head_dim;
  int64_t capacity, sequence_stride;  // of the cache: positions, floats from sequence to sequence
  float norm_eps;
  DType dtype;  // of the weights
};

// The blocks one after the other, then the final norm: x (batch * rows, dim), in place.
template <SimdLevel level>
void decode_layers_run(const DecodeParams& params, int threads);

// Each block's keys and values of x (batch * rows, dim), which stays as it is.
template <SimdLevel level>
void decode_keys_values_run(const DecodeParams& params, int threads);

// Each block by itself, then the final norm, over one row a sequence whose keys and values are
// stored: x (n_blocks, batch, dim), in place.
template <SimdLevel level>
void decode_heads_run(const DecodeParams& params, int threads);

inline void decode_layers_cpu(const DecodeParams& params, int threads) {
  with_simd_level([&](auto level) { decode_layers_run<level.value>(params, threads); });
}

inline void decode_keys_values_cpu(const DecodeParams& params, int threads) {
  with_simd_level([&](auto level) { decode_keys_values_run<level.value>(params, threads); });
}

inline void decode_heads_cpu(const DecodeParams& params, int threads) {
  with_simd_level([&](auto level) { decode_heads_run<level.value>(params, threads); });
}

}  // namespace mtp
