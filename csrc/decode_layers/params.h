// Transformer blocks over new rows of each sequence, against cached keys and values: all the layers
// of a decode step in one call. Everything is float32 but the weights, which stay in the dtype that
// the model stores them in, and the rows that go into bfloat16 products where the processor has
// them.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/simd_level.h"

namespace mtp {

struct DecodeShape {
  int64_t dim, ffn_dim, n_queries, n_keys, head_dim;
  DType dtype;  // of the weights
};

// One block: x += out(attention(norm(x))); x += down(silu(gate(norm(x))) * up(norm(x))). These are
// a model's weights, contiguous; decode_pack copies them into the order in which they are read
// (packed.h). mtp_fast/decoding/cpu_blocks.py fills tables of both structs, field by field.
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
  const DecodeBlock* blocks;
  const void* packed;        // the blocks' weights, by decode_pack at the same SIMD level
  float* cache;              // (batch, n_blocks, decode_cache_size): keys and values
  const float* rope;         // (capacity, 2, head_dim): cosines, signed sines (apply_rope)
  const float* final_scale;  // (dim): weight of the norm behind the last block
  const int64_t* start;      // (batch): position of a sequence's first new row
  float* x;                  // see below
  float* last_input;  // (batch * rows, dim): decode_layers writes the last block's input here
  int64_t n_blocks, batch, rows;  // rows: new ones of each sequence
  int64_t capacity;               // positions of a sequence
  float norm_eps;
};

// Elements of one block's packed weights.
template <SimdLevel level>
int64_t decode_packed_size(const DecodeShape& shape);

// Floats that hold the keys and values of `capacity` positions for one block and one sequence.
template <SimdLevel level>
int64_t decode_cache_size(const DecodeShape& shape, int64_t capacity);

// Packs the weights of `n` blocks, one block after the other.
template <SimdLevel level>
void decode_pack(const DecodeShape& shape, const DecodeWeights* weights, int64_t n, void* packed,
                 int threads);

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

inline int64_t decode_packed_size_cpu(const DecodeShape& shape) {
  int64_t size = 0;
  with_simd_level([&](auto level) { size = decode_packed_size<level.value>(shape); });
  return size;
}

inline int64_t decode_cache_size_cpu(const DecodeShape& shape, int64_t capacity) {
  int64_t size = 0;
  with_simd_level([&](auto level) { size = decode_cache_size<level.value>(shape, capacity); });
  return size;
}

inline void decode_pack_cpu(const DecodeShape& shape, const DecodeWeights* weights, int64_t n,
                            void* packed, int threads) {
  with_simd_level(
      [&](auto level) { decode_pack<level.value>(shape, weights, n, packed, threads); });
}

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
