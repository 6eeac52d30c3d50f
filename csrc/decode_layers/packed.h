// How the decode kernel keeps a block's weights, keys and values: in panels (panels.h).
#pragma once

#include <algorithm>
#include <cstdint>

#include "decode_layers/panels.h"
#include "decode_layers/params.h"
#include "decode_layers/rows.h"

namespace mtp {
namespace MTP_SIMD {

// Calls f(T{}, X{}) with the weights' type and the rows' (panels.h).
template <class F>
void with_types(DType dtype, const F& f) {
  dispatch_dtype(dtype, [&](auto storage) { f(storage, Factor<decltype(storage)>{}); });
}

// Calls f(T{}, X{}, A{}): T and the rows A likewise, X the rows of the drafting heads' products.
template <class F>
void with_drafting_types(const DecodeShape& s, const F& f) {
  with_types(s.dtype, [&](auto storage, auto row) {
#if defined(__AVX512BF16__)
    constexpr int64_t kMost = INT32_MAX / (128 * 127);  // so many products fit into an int32
    const bool fits = std::max({s.dim, s.ffn_dim, s.n_queries * s.head_dim}) <= kMost;
    if (has_amx() && fits) return f(storage, int8_t{}, row);
#endif
    f(storage, int16_t{}, row);
  });
}

// Calls f(S{}, T{}, X{}): what weights are stored in, what they are packed in, the rows.
template <class F>
void with_packed_types(const DecodeShape& s, bool drafting, const F& f) {
  with_drafting_types(s, [&](auto storage, auto factor, auto row) {
    drafting ? f(storage, int8_t{}, factor) : f(storage, storage, row);
  });
}

// Whether a block is divided into halves, each with half of the attention heads and hidden units:
// where these are whole panels. Not in int8, whose scales are those of whole outputs.
template <class T, class X>
bool has_halves(const DecodeShape& s) {
  const int64_t half = s.n_keys / 2 * (s.n_queries / s.n_keys) * s.head_dim;
  return !std::is_same_v<T, int8_t> && s.n_keys % 2 == 0 && half % kPanel == 0 &&
         s.ffn_dim % (2 * kPanel) == 0;
}

// A block's matrices in T, in elements from the beginning. Rows of qkv are ordered by groups of
// attention heads that share keys and values: the group's queries, its key, its value. All that
// belongs to a half lies together: of `out` and `down` the columns of its inputs.
template <class T, class X>
struct PackedBlock {
  const int64_t halves;  // 2, or 1
  const int64_t group_queries;
  const int64_t head_panels;         // each attention head of qkv begins a panel
  const int64_t ffn_panels;          // of gate_up: kLanes gates and the ups beside them
  const int64_t out_in, down_in;     // inputs, of a half
  const int64_t half_heads;          // attention heads of a half's qkv
  const int64_t head;                // elements of one
  const int64_t out, gate_up, down;  // in a half, which begins with qkv
  const int64_t half, size;

  explicit PackedBlock(const DecodeShape& s)
      : halves(has_halves<T, X>(s) ? 2 : 1),
        group_queries(s.n_queries / s.n_keys),
        head_panels(panels_of(s.head_dim)),
        ffn_panels(panels_of(2 * s.ffn_dim)),
        out_in(s.n_queries * s.head_dim / halves),
        down_in(s.ffn_dim / halves),
        half_heads((s.n_queries + 2 * s.n_keys) / halves),
        head(head_panels * panel_size<T, X>(s.dim)),
        out(half_heads * head),
        gate_up(out + panels_of(s.dim) * panel_size<T, X>(out_in)),
        down(gate_up + ffn_panels / halves * panel_size<T, X>(s.dim)),
        half(down + panels_of(s.dim) * panel_size<T, X>(down_in)),
        size(halves * half) {}

  // Where attention head i of qkv lies, and panel `panel` of gate_up.
  int64_t qkv_at(int64_t i) const { return i / half_heads * half + i % half_heads * head; }
  int64_t gate_up_at(const DecodeShape& s, int64_t panel) const {
    const int64_t panels = ffn_panels / halves;
    return panel / panels * half + gate_up + panel % panels * panel_size<T, X>(s.dim);
  }

  // S: what the model's weights are stored in.
  template <class S>
  void pack(const DecodeShape& s, const DecodeWeights& weights, T* to) const {
    const S* qkv = static_cast<const S*>(weights.qkv);
    for (int64_t i = 0; i < s.n_queries + 2 * s.n_keys; ++i) {
      const int64_t h = head_at(s, i);
      pack_matrix(qkv + h * s.head_dim * s.dim, s.head_dim, s.dim, s.dim, to + qkv_at(i));
    }
    for (int64_t h = 0; h < halves; ++h) {
      const S* first = static_cast<const S*>(weights.out) + h * out_in;
      pack_matrix(first, s.dim, out_in, halves * out_in, to + h * half + out);
    }
    const S* gate = static_cast<const S*>(weights.gate_up);
    for (int64_t o = 0; o < s.ffn_dim; o += kLanes) {
      const S* rows = gate + o * s.dim;
      T* panel = to + gate_up_at(s, o / kLanes);
      pack_panel(rows, s.ffn_dim - o, rows + s.ffn_dim * s.dim, s.ffn_dim - o, s.dim, s.dim, panel);
    }
    for (int64_t h = 0; h < halves; ++h) {
      const S* first = static_cast<const S*>(weights.down) + h * down_in;
      pack_matrix(first, s.dim, down_in, s.ffn_dim, to + h * half + down);
    }
  }

  // Which attention head of the model's qkv (queries, keys, values) is number i here.
  int64_t head_at(const DecodeShape& s, int64_t i) const {
    const int64_t group = i / (group_queries + 2), member = i % (group_queries + 2);
    if (member < group_queries) return group * group_queries + member;
    return s.n_queries + (member - group_queries) * s.n_keys + group;
  }

 private:
  template <class S>
  static void pack_matrix(const S* weight, int64_t rows, int64_t in, int64_t ld, T* to) {
    for (int64_t o = 0; o < rows; o += kPanel, to += panel_size<T, X>(in)) {
      const S* first = weight + o * ld;
      pack_panel(first, rows - o, first + kLanes * ld, rows - o - kLanes, in, ld, to);
    }
  }

  // A panel whose halves are the first rows of two weights that have so many.
  template <class S>
  static void pack_panel(const S* first, int64_t firsts, const S* second, int64_t seconds,
                         int64_t in, int64_t ld, T* panel) {
    float* scales = reinterpret_cast<float*>(panel);
    T* weights = panel + kScales<T>;
    pack_half<X>(first, firsts, in, ld, weights, scales);
    pack_half<X>(second, seconds, in, ld, weights + PanelOrder<T, X>::kSecond, scales + kLanes);
  }
};

// Where element `input` of an output lies in panels that are `step` apart.
template <class X>
inline int64_t place_in_panels(int64_t output, int64_t input, int64_t step) {
  return output / kPanel * step + input / kDepth<X> * kPanel * kDepth<X> +
         output % kPanel * kDepth<X> + input % kDepth<X>;
}

// Stores v as one input of kLanes outputs that lie side by side.
template <class X>
inline void store_input(Vec v, X* y) {
#if defined(__AVX512BF16__)
  if constexpr (kDepth<X> == 2) {
    const unsigned odd = reinterpret_cast<uintptr_t>(y) / sizeof(X) % 2;
    const __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v.v));
    return _mm512_mask_storeu_epi16(y - odd, 0x55555555u << odd, _mm512_slli_epi32(wide, 16 * odd));
  }
#endif
  v.store(y);
}

// Keys and values of one block and sequence, in elements. A head's keys are panels whose outputs
// are the positions and whose inputs are its dimensions; its values are panels the other way round.
template <class X>
struct CacheLayout {
  const int64_t key_step, value_step, values, head, size;

  CacheLayout(const DecodeShape& s, int64_t capacity)
      : key_step(panel_size<X, X>(s.head_dim)),
        value_step(panel_size<X, X>(capacity)),
        values(panels_of(capacity) * key_step),
        head(values + panels_of(s.head_dim) * value_step),
        size(s.n_keys * head) {}
};

}  // namespace MTP_SIMD
}  // namespace mtp
