// What a block does with new rows, on the CPU:
//
//   1. norm, products with qkv, bias, norm and rotation of each attention head; keys and values go
//      to the cache
//   2. attention, an attention head of a sequence at a time
//   3. products with `out`, added to x
//   4. norm, products with gate_up, silu(gate) * up
//   5. products with `down`, added to x
//
// For a team of threads (common/rounds.h) these are five rounds. Several blocks that are
// independent (the drafting heads) take each round together. The norms are made anew by every
// thread that needs them: that is cheaper than another round.
//
// Two threads take a half each of the layers' attention heads and hidden units (common/halves.h):
// 1 to 3 are a round then, 4 and 5 another. Of what a thread makes only its sums, in 3 and 5, go to
// the other; each adds both to an x of its own. How x is summed does not depend on the threads.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/halves.h"
#include "common/rounds.h"
#include "common/scratch.h"
#include "decode_layers/attention.h"
#include "decode_layers/packed.h"
#include "decode_layers/params.h"
#include "decode_layers/rows.h"

namespace mtp {
namespace MTP_SIMD {

// T, X: see panels.h. A: what attention is made in.
template <class T, class X, class A>
class Step {
 public:
  // Of blocks from number `first` on, whose weights are `packed`. abreast: how many of them take
  // each round together.
  Step(const DecodeParams& params, int64_t first, const void* packed, int threads, int64_t abreast)
      : p_(params),
        first_(params.blocks + first),
        weights_(static_cast<const T*>(packed)),
        packed_(params),
        threads_(threads),
        abreast_(abreast),
        rows_(params.batch * params.rows),
        head_width_(packed_.head_panels * kPanel),
        attention_(params, threads, abreast, packed_.halves),
        hidden_(*params.workspace, packed_.halves, abreast * rows_, packed_.down_in),
        normalized_(*params.workspace, threads, rows_, params.dim),
        inputs_(*params.workspace, threads, std::is_same_v<X, A> ? 0 : rows_ * kSplit<X>,
                std::max({params.dim, params.ffn_dim, params.n_queries * params.head_dim})),
        factors_(*params.workspace, threads, kIntegers<X> ? abreast : 0, rows_),
        head_(*params.workspace, threads, rows_, head_width_),
        kept_(*params.workspace, threads, packed_.halves == 2 ? rows_ : 0,
              panels_of(params.dim) * kPanel),
        sent_(*params.workspace, 2, packed_.halves == 2 ? rows_ : 0,
              panels_of(params.dim) * kPanel) {}

  // Whether this worker and another take a half each.
  bool in_halves(const Worker& worker) const { return packed_.halves == 2 && worker.count() == 2; }

  // x (abreast, rows, dim), in place.
  void run(Worker& worker, const DecodeBlock* blocks, float* x) {
    project(worker, blocks, x, rows_ * p_.dim, all());
    finish(worker, blocks, x);
  }

  // All layers, in halves; `xs` (2; rows, dim) is the same x twice, one for each worker. Returns
  // what is behind the last layer, which `last` (rows, dim) is the input of.
  float* run_halves(Halves& halves, const Worker& worker, const Scratch<float>& xs, float* last) {
    const int me = worker.index();
    const int64_t size = sizeof(float) * rows_ * p_.dim, rounds = 2 * p_.n_layers;
    float* x = xs.row(me, 0);
    const auto half = [&](int64_t round, int h) {
      const DecodeBlock* block = p_.blocks + (round - 1) / 2;
      float* to[] = {sent(round, h), h == me ? kept_.row(me, 0) : sent(round, h)};
      const Alone share(me, h, 2);
      if (round % 2 == 1) {
        if (h == 0 && round + 1 == rounds) memcpy(last, x, size);
        project(share, block, x, 0, all());
        attend(share, block);
        half_products(me, h, attention_.attended(), packed_.out_in, block, packed_.out, to);
      } else {
        gate(share, block, x);
        half_products(me, h, hidden_, packed_.down_in, block, packed_.down, to);
      }
    };
    const auto join = [&](int64_t round) {
      const float *kept = kept_.row(me, 0), *received = sent(round, 1 - me);
      for (int64_t i = 0; i < rows_ * kept_.ld; i += kLanes) prefetch_to_write(received + i);
      for (int64_t r = 0; r < rows_; ++r, kept += kept_.ld, received += kept_.ld) {
        float* y = x + r * p_.dim;
        for (int64_t i = 0; i < p_.dim; i += kLanes) {
          const Vec sum = Vec::load(kept + i) + Vec::load(received + i);
          store_some(load_some(y + i, p_.dim - i) + sum, y + i, p_.dim - i);
        }
      }
    };
    const auto give = [&] { memcpy(xs.row(1 - me, 0), x, size); };
    return mtp::run_halves(halves, me, rounds, half, join, give) ? x : xs.row(1 - me, 0);
  }

  // x (rows, dim), the same for all: one round.
  void store_keys_values(Worker& worker, const DecodeBlock* blocks, const float* x) {
    const int64_t queries = packed_.group_queries;
    project(worker, blocks, x, 0, {queries, queries + 2});
  }

  // As run, where keys and values are stored.
  void read(Worker& worker, const DecodeBlock* blocks, float* x) {
    project(worker, blocks, x, rows_ * p_.dim, {0, packed_.group_queries});
    finish(worker, blocks, x);
  }

 private:
  using Made = std::conditional_t<kIntegers<X>, float, X>;  // rows, before they are whole numbers

  // Members [first, last) of every group of attention heads: its queries, key, value.
  struct Members {
    int64_t first, last;
  };
  Members all() const { return {0, packed_.group_queries + 2}; }

  // The weights of block b that is run.
  const T* weights(const DecodeBlock* blocks, int64_t b) const {
    return weights_ + (blocks - first_ + b) * packed_.size;
  }

  // Of `count` things a block, which cost `cost` products each, as many as make a piece: not too
  // few, and eight pieces a thread, for whoever has to help.
  int64_t grain(int64_t count, int64_t cost) const {
    constexpr int64_t kSmallest = 8192;
    return std::max(
        {count * abreast_ / (8 * threads_), kSmallest / std::max<int64_t>(cost, 1), int64_t{1}});
  }

  // One round of products: rows(b), `ld` apart, with every block's `count` things of `together`
  // panels, whose rows are `apart` from each other. A worker asks for rows when
  // he comes to a block, while its first weights load; find(panel) sets a panel's weights, and may
  // give the thing another number than its place.
  template <class P, class R, class W, class F>
  void products(P&& worker, int64_t count, int64_t together, int64_t apart, int64_t ld, int64_t in,
                const R& rows, const W& find, const F& take) {
    const int64_t size = together * panel_size<T, X>(in);
    worker.pieces(count * abreast_, grain(count, size), [&](const auto& piece) {
      int64_t at = 0, end = 0, part = 0, block = -1;  // things of all blocks; the last one's block
      const X* x = nullptr;
      const auto next = [&](Panel<T, X>& panel) {
        if (at == end && !piece(at, end)) return false;
        const int64_t b = at / count;
        const bool first = b != block;
        panel = {nullptr, nullptr, b, at % count, part, first, factors(worker.index(), b)};
        find(panel);
        if (first) {
          fetch(panel.weights, kAhead);
          x = multiplied(worker.index(), block = b, in, rows(b), ld);
        }
        panel.x = x + part * apart;
        if (++part == together) part = 0, ++at;
        return true;
      };
      constexpr bool kReady = std::is_convertible_v<decltype(rows(int64_t{0})), const X*>;
      panel_products<T, X>(rows_, kReady ? ld : inputs_.ld, in, next, take);
    });
  }

  // Rows x (in) of block b, `ld` apart, as they are multiplied: these, or this thread's copy.
  template <class R>
  const X* multiplied(int worker, int64_t b, int64_t in, const R* x, int64_t ld) {
    if constexpr (std::is_same_v<R, X>) {
      return x;
    } else {
      X* first = inputs_.row(worker, 0);
      for (int64_t r = 0; r < rows_; ++r, x += ld) {
        X* y = first + r * kSplit<X> * inputs_.ld;
        if constexpr (kSplit<X> == 2) {
          factors(worker, b)[r] = split(x, in, y, y + inputs_.ld);
        } else if constexpr (kIntegers<X>) {
          factors(worker, b)[r] = to_whole(x, in, y);
        } else {
          convert(x, in, y);
        }
      }
      return first;
    }
  }

  // Of rows of whole numbers; each block has its own, since the last one's are still in use.
  float* factors(int worker, int64_t b) const {
    return kIntegers<X> ? factors_.row(worker, b) : nullptr;
  }

  // Rows x, normalised by this thread.
  const Made* normalized(int worker, const float* x, const float* scale) {
    Made* y = normalized_.row(worker, 0);
    normalize(x, p_.dim, rows_, scale, p_.dim, p_.norm_eps, y, normalized_.ld);
    return y;
  }

  // Queries, keys and values of each block's x.
  template <class P>
  void project(P&& worker, const DecodeBlock* blocks, const float* x, int64_t block_stride,
               Members members) {
    const int64_t taken = members.last - members.first;  // of each group of attention heads
    const int64_t panels = packed_.head_panels;
    const auto place = [&](int64_t i) {
      return i / taken * all().last + members.first + i % taken;
    };
    products(
        worker, p_.n_keys * taken, panels, 0, normalized_.ld, p_.dim,
        [&](int64_t b) {
          return normalized(worker.index(), x + b * block_stride, blocks[b].attention_scale);
        },
        [&](Panel<T, X>& panel) {
          const int64_t head = place(panel.index);
          panel.weights = weights(blocks, panel.block) + packed_.qkv_at(head) +
                          panel.part * panel_size<T, X>(p_.dim);
          panel.index = packed_.head_at(p_, head);
          if (panel.part == 0) attention_.prepare(blocks[panel.block], panel.index);
        },
        [&](const Panel<T, X>& panel, int64_t r, Sums sums) {
          float* head = head_.row(worker.index(), r);
          sums.first.store(head + panel.part * kPanel);
          sums.second.store(head + panel.part * kPanel + kLanes);
          if (panel.part + 1 < panels) return;
          attention_.take(worker.index(), blocks[panel.block], panel.block, panel.index, r, head);
        });
  }

  void finish(Worker& worker, const DecodeBlock* blocks, float* x) {
    attend(worker, blocks);
    add_products(worker, attention_.attended(), packed_.out_in, blocks, packed_.out, x);
    gate(worker, blocks, x);
    add_products(worker, hidden_, packed_.down_in, blocks, packed_.down, x);
  }

  template <class P>
  void attend(P&& worker, const DecodeBlock* blocks) {
    const int64_t of_block = p_.batch * attention_.groups();
    worker.round(of_block * abreast_, grain(of_block, attention_.products_of_a_group()),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t b = i / of_block, group = i % of_block / p_.batch;
                     attention_.attend(worker.index(), blocks[b], b, i % p_.batch, group);
                   }
                 });
  }

  // The hidden units of each block's x.
  template <class P>
  void gate(P&& worker, const DecodeBlock* blocks, const float* x) {
    const int64_t units = packed_.ffn_panels / packed_.halves;
    products(
        worker, packed_.ffn_panels, 1, 0, normalized_.ld, p_.dim,
        [&](int64_t b) {
          return normalized(worker.index(), x + b * rows_ * p_.dim, blocks[b].ffn_scale);
        },
        [&](Panel<T, X>& panel) {
          const int64_t b = panel.block, i = panel.index;
          for (int64_t r = 0; r < rows_; ++r) {
            prefetch_to_write(hidden_.row(i / units, b * rows_ + r) + i % units * kLanes);
          }
          panel.weights = weights(blocks, b) + packed_.gate_up_at(p_, i);
        },
        [&](const Panel<T, X>& panel, int64_t r, Sums sums) {
          const int64_t h = panel.index / units, unit = panel.index % units * kLanes;
          store_some(gated(sums), hidden_.row(h, panel.block * rows_ + r) + unit,
                     packed_.down_in - unit);
        });
  }

  // x += in (halves; abreast, rows, n) @ weight.T: both halves' sums, added up. A half of the
  // weight (dim, n) is at `offset` of each half of a block.
  template <class R>
  void add_products(Worker& worker, const Scratch<R>& in, int64_t n, const DecodeBlock* blocks,
                    int64_t offset, float* x) {
    const auto add = [](Vec sum, float* y, int64_t count) {
      if (count >= kLanes) {
        (Vec::load(y) + sum).store(y);
      } else if (count > 0) {
        (Vec::load(y, count, sum) + sum).store(y, count);
      }
    };
    products(
        worker, panels_of(p_.dim), packed_.halves, in.step, in.ld, n,
        [&](int64_t b) { return in.row(0, b * rows_); },
        [&](Panel<T, X>& panel) {
          const int64_t b = panel.block, i = panel.index;
          for (int64_t r = 0; r < rows_; ++r) {
            const float* y = x + (b * rows_ + r) * p_.dim + i * kPanel;
            prefetch_to_write(y);
            prefetch_to_write(y + kLanes);
          }
          panel.weights =
              weights(blocks, b) + panel.part * packed_.half + offset + i * panel_size<T, X>(n);
        },
        [&](const Panel<T, X>& panel, int64_t r, Sums sums) {
          const int64_t o = panel.index * kPanel;
          float* y = x + (panel.block * rows_ + r) * p_.dim + o;
          if (packed_.halves == 2) {
            float* kept = kept_.row(worker.index(), r);
            if (panel.part == 0) {
              sums.first.store(kept);
              sums.second.store(kept + kLanes);
              return;
            }
            sums = {sums.first + Vec::load(kept), sums.second + Vec::load(kept + kLanes)};
          }
          add(sums.first, y, p_.dim - o);
          add(sums.second, y + kLanes, p_.dim - o - kLanes);
        });
  }

  // Where half h leaves its sums in a round: where the other half's were in the last one. Its
  // thread took over those lines when it read them; to take back its own would be one more way.
  float* sent(int64_t round, int h) const { return sent_.row((round + h) % 2, 0); }

  // Half h of the same, of one block, by a worker alone: to both of `to`, not to x.
  template <class R>
  void half_products(int worker, int h, const Scratch<R>& in, int64_t n, const DecodeBlock* block,
                     int64_t offset, float* const (&to)[2]) {
    products(
        Alone(worker, 0, 1), panels_of(p_.dim), 1, 0, in.ld, n,
        [&](int64_t) { return in.row(h, 0); },
        [&](Panel<T, X>& panel) {
          panel.weights =
              weights(block, 0) + h * packed_.half + offset + panel.index * panel_size<T, X>(n);
        },
        [&](const Panel<T, X>& panel, int64_t r, Sums sums) {
          for (float* y : to) {
            y += r * kept_.ld + panel.index * kPanel;
            sums.first.store(y);
            sums.second.store(y + kLanes);
          }
        });
  }

  const DecodeParams& p_;
  const DecodeBlock* const first_;
  const T* const weights_;
  const PackedBlock<T, X> packed_;
  const int threads_;
  const int64_t abreast_, rows_, head_width_;
  Attention<A> attention_;
  const Scratch<Made> hidden_;      // (halves; abreast, rows) of ffn_dim / halves
  const Scratch<Made> normalized_;  // (threads; rows) of dim
  const Scratch<X> inputs_;         // (threads; rows): copies of rows
  const Scratch<float> factors_;    // (threads; abreast) of rows
  const Scratch<float> head_;       // (threads; rows) of head_width
  const Scratch<float> kept_;       // (threads; rows) of dim, in whole panels: a half's sums
  const Scratch<float> sent_;       // (2; rows) likewise
};

}  // namespace MTP_SIMD
}  // namespace mtp
