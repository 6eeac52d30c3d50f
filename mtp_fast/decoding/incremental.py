"""The model run incrementally: a few new rows a sequence against cached keys and values.

Trunk and head 0 run on all new rows, since head 0 judges the drafts. The other heads only draft:
they store keys and values of the new rows, and answer at one row a sequence. Being alike and
independent they run as one layer: their weights are stacked and their attention heads lie side by
side in one call. A small batch pays by the call and by the byte of weights read, so calls are few.

On a CPU everything between the products is float32, whatever the weights are stored in: torch's
attention and norms are slower in 16 bits there, and the products sum in float32 anyway. And there
a decode step, a few rows, goes through `FewRowBlocks`: the layers below are then for prompts.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_fast.decoding.few_rows import MAX_ROWS, FewRowBlocks, runs_few_rows
from mtp_fast.models import Block, KVCache, MTPConfig, MTPTransformer, Trunk
from mtp_fast.models.transformer import apply_rope, rope_table
from mtp_fast.ops.few_row_linear import few_row_linear


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` of `x` (rows, in) and `weight` (out, in), in x's dtype."""
    return F.linear(x.to(weight.dtype), weight).to(x.dtype)


def norm_scale(norm: nn.RMSNorm) -> Tensor:
    """The weight of `norm` as `normalize` takes it."""
    return norm.weight.float() * math.sqrt(norm.weight.numel())


def stacked_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`linear` of each of H pairs: `x` (H, rows, in) and `weight` (H, out, in)."""
    return torch.bmm(x.to(weight.dtype), weight.transpose(1, 2)).to(x.dtype)


def norm_floor(config: MTPConfig, like: Tensor) -> Tensor:
    """What `normalize` adds to the length of a vector: ``sqrt(dim * norm_eps)``, 0-d float32."""
    floor = math.sqrt(config.dim * config.norm_eps)
    return torch.full((), floor, dtype=torch.float32, device=like.device)


def normalize(x: Tensor, scale: Tensor | float, floor: Tensor) -> Tensor:
    """RMSNorm of `x` (..., dim), in four calls where torch's own takes eight on a CPU."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (x / torch.hypot(length, floor) * scale).to(x.dtype)


def norm_heads(x: Tensor, weight: Tensor, config: MTPConfig) -> Tensor:
    """RMSNorm of each attention head of `x` (rows, heads, head_dim), in x's dtype."""
    return F.rms_norm(x, x.shape[-1:], None, config.norm_eps) * weight


class Rows:
    """Where the new rows of a forward stand, and what the layers need to know of it.

    Parameters
    ----------
    start : Tensor
        (B,) int64: the position of each sequence's first new row.
    count : int
        S, rows a sequence.
    length : int
        Slots that attention reads; at least ``start.max() + count``.
    rope : Tensor
        (capacity, 2, 1, head_dim) rotations; `capacity` slots a sequence.
    """

    def __init__(self, start: Tensor, count: int, length: int, rope: Tensor) -> None:
        self.start, self.count, self.length = start, count, length
        self._rope = rope

    @cached_property
    def _positions(self) -> Tensor:
        return self.start[:, None] + torch.arange(self.count, device=self.start.device)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """(B * S,) each: the sequence and the position of every row."""
        sequences = torch.arange(len(self.start), device=self.start.device)
        return sequences.repeat_interleave(self.count), self._positions.flatten()

    @cached_property
    def rope(self) -> Tensor:
        """(B * S, 2, 1, head_dim): their rotations."""
        return self._rope[self.places[1]]

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, S, length): 0 where a row may look, -inf elsewhere."""
        slots = torch.arange(self.length, device=self.start.device)
        unseen = slots > self._positions[:, None, :, None]
        return self._rope.new_zeros(unseen.shape).masked_fill_(unseen, -torch.inf)


class IncrementalModel:
    """Inference of an `MTPTransformer` with static KV caches for the trunk and the heads in use.

    Parameters
    ----------
    model : MTPTransformer
        The model; the drafting heads' parameters are copied once, the others read in place.
    n_heads : int
        Heads in use.
    batch : int
        Sequences.
    capacity : int
        Positions that a sequence may occupy.

    Raises
    ------
    TypeError
        If the model's trunk is not our `Trunk`, whose cache this is.
    """

    def __init__(self, model: MTPTransformer, n_heads: int, batch: int, capacity: int) -> None:
        if not isinstance(model.trunk, Trunk):
            raise TypeError(
                f"incremental decoding needs a Trunk, the model has a {type(model.trunk).__name__}"
            )
        config, weight = model.config, model.unembedding.weight
        self._model, self._config = model, config
        self._batch, self._capacity = batch, capacity
        self.dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
        like = weight.new_empty(0, dtype=self.dtype)
        heads = [head for head in model.heads if isinstance(head, Block)]
        self._layers = [*model.trunk.blocks, heads[0]]
        self._cache = KVCache(
            len(self._layers), batch, capacity, config.n_kv_heads, config.head_dim, like
        )
        self._rope = rope_table(
            config.head_dim, capacity, config.rope_theta, config.rope_scaling
        ).to(like)
        self._scales = [
            (norm_scale(block.attention_norm), norm_scale(block.ffn_norm)) for block in self._layers
        ]
        self._final_scale = norm_scale(model.norm)
        self._floor = norm_floor(config, like)
        self._drafting = (
            _DraftHeads(config, heads[1:n_heads], batch, capacity, like) if n_heads > 1 else None
        )
        self._few_rows = self._few_drafting = None
        if runs_few_rows(heads[:n_heads] + self._layers):
            final = model.norm.weight
            places = [(layer, 0) for layer in range(len(self._layers))]
            self._few_rows = FewRowBlocks(
                config, self._layers, self._cache, places, self._rope, final
            )
            if self._drafting is not None:
                places = [(0, head * config.n_kv_heads) for head in range(n_heads - 1)]
                self._few_drafting = FewRowBlocks(
                    config, heads[1:n_heads], self._drafting.cache, places, self._rope, final
                )

    def rows(self, start: Tensor, count: int, length: int) -> Rows:
        """Lay out `count` new rows a sequence, the first at position ``start[b]``.

        Parameters
        ----------
        start : Tensor
            (B,) int64.
        count : int
            S, rows a sequence.
        length : int
            Slots that attention reads; at least ``start.max() + count``.
        """
        return Rows(start, count, length, self._rope)

    def forward(self, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Run trunk and head 0 on `tokens` (B, S); store the drafting heads' keys and values.

        Returns
        -------
        trunk, hidden : Tensor
            (B, S, dim) each: the heads' input, and head 0's output ready for the unembedding.
        """
        x = self._model.embedding(tokens).to(self.dtype)
        if self._few_rows is not None and tokens.numel() <= MAX_ROWS:
            trunk, hidden = self._few_rows.layers(x, rows.start)
            if self._few_drafting is not None:
                self._few_drafting.store_keys_values(trunk, rows.start)
            return trunk, hidden
        n_kv, n_q = self._config.n_kv_heads, self._config.n_attention_heads
        rope = _rope_for(rows.rope, n_q + n_kv, n_kv)
        x = trunk = x.flatten(0, 1)
        for layer, block in enumerate(self._layers):
            trunk = x
            x = self._block(layer, block, x, rows, rope)
        if self._drafting is not None:
            self._drafting.write(trunk, rows)
        return trunk.view(*tokens.shape, -1), self._normalize(x).view(*tokens.shape, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Unembed `hidden` (..., dim): (..., vocab_size)."""
        flat, weight = hidden.flatten(0, -2), self._model.unembedding.weight
        if self._few_rows is not None and len(flat) <= MAX_ROWS:
            logits = few_row_linear(flat.to(weight.dtype), weight)
        else:
            logits = linear(flat, weight)
        return logits.view(*hidden.shape[:-1], -1)

    def draft_logits(self, trunk: Tensor, row: Rows) -> Tensor:
        """Logits (B, n_heads - 1, vocab_size) of the drafting heads at one row a sequence.

        Parameters
        ----------
        trunk : Tensor
            (B, dim) the trunk's output there.
        row : Rows
            The row, one a sequence, whose keys and values `forward` has stored.
        """
        if self._drafting is None:
            raise ValueError("no drafting heads: n_heads is 1")
        if self._few_drafting is not None and len(trunk) <= MAX_ROWS:
            hidden = self._few_drafting.heads(trunk, row.start)
        else:
            hidden = self._normalize(self._drafting.read(trunk, row))
        return self.logits(hidden).transpose(0, 1)

    def _normalize(self, x: Tensor) -> Tensor:
        return normalize(x, self._final_scale, self._floor)

    def _block(self, layer: int, block: Block, x: Tensor, rows: Rows, rope: Tensor) -> Tensor:
        attention, n_q = block.attention, self._config.n_attention_heads
        attention_scale, ffn_scale = self._scales[layer]
        qkv = linear(normalize(x, attention_scale, self._floor), attention.qkv.weight)
        if self._config.qkv_bias:
            qkv = qkv + attention.qkv.bias
        qkv = qkv.view(len(x), -1, self._config.head_dim)
        if attention.q_norm is not None and attention.k_norm is not None:
            q, k, v = qkv.tensor_split([n_q, n_q + self._config.n_kv_heads], 1)
            q = norm_heads(q, attention.q_norm.weight, self._config)
            qkv = torch.cat([q, norm_heads(k, attention.k_norm.weight, self._config), v], 1)
        qkv = apply_rope(qkv, rope)
        self._cache.write(layer, *rows.places, qkv[:, n_q:])
        k, v = self._cache.read(layer, rows.mask.shape[-1])
        q = qkv[:, :n_q].reshape(self._batch, -1, n_q, self._config.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=rows.mask, enable_gqa=True)
        x = x + linear(y.transpose(1, 2).reshape(len(x), -1), attention.out.weight)
        h = normalize(x, ffn_scale, self._floor)
        gate, up = linear(h, block.ffn.gate_up.weight).chunk(2, -1)
        return x + linear(F.silu(gate) * up, block.ffn.down.weight)


class _DraftHeads:
    """Heads 1..H as one layer: weights stacked, norms folded in, attention heads side by side."""

    def __init__(
        self, config: MTPConfig, heads: list[Block], batch: int, capacity: int, like: Tensor
    ) -> None:
        self._config, self._batch = config, batch
        self._n_kv = len(heads) * config.n_kv_heads
        n_q, n_kv, width = config.n_attention_heads, config.n_kv_heads, config.head_dim
        qkv = torch.stack([h.attention.qkv.weight * h.attention_norm.weight for h in heads])
        q, k, v = qkv.tensor_split([n_q * width, (n_q + n_kv) * width], 1)
        self._q = q.flatten(0, 1)
        self._kv = torch.cat([k, v]).flatten(0, 1)
        self._q_bias = self._kv_bias = self._q_norm = self._k_norm = None
        if config.qkv_bias:
            bias = torch.stack([h.attention.qkv.bias for h in heads])
            q, k, v = bias.tensor_split([n_q * width, (n_q + n_kv) * width], 1)
            self._q_bias, self._kv_bias = q.flatten(), torch.cat([k, v]).flatten()
        if config.qk_norm:  # a weight a row, in the order of the rows
            q, k = (
                torch.stack([getattr(h.attention, name).weight for h in heads])
                for name in ("q_norm", "k_norm")
            )
            self._q_norm, self._k_norm = q.repeat_interleave(n_q, 0), k.repeat_interleave(n_kv, 0)
        self._out = torch.stack([h.attention.out.weight for h in heads])
        self._gate_up = torch.stack([h.ffn.gate_up.weight * h.ffn_norm.weight for h in heads])
        self._down = torch.stack([h.ffn.down.weight for h in heads])
        self.cache = KVCache(1, batch, capacity, self._n_kv, width, like)
        self._floor = norm_floor(config, like)

    def write(self, trunk: Tensor, rows: Rows) -> None:
        """Store keys and values of the rows `trunk` (R, dim)."""
        kv = linear(self._normalize(trunk), self._kv)
        if self._kv_bias is not None:
            kv = kv + self._kv_bias
        kv = kv.view(len(trunk), -1, self._config.head_dim)
        if self._k_norm is not None:
            k, v = kv.chunk(2, 1)
            kv = torch.cat([norm_heads(k, self._k_norm, self._config), v], 1)
        rope = _rope_for(rows.rope, self._n_kv, self._n_kv)
        self.cache.write(0, *rows.places, apply_rope(kv, rope))

    def read(self, trunk: Tensor, row: Rows) -> Tensor:
        """Map one row a sequence `trunk` (B, dim) to the heads' outputs (H, B, dim)."""
        q = linear(self._normalize(trunk), self._q)
        if self._q_bias is not None:
            q = q + self._q_bias
        q = q.view(len(trunk), -1, self._config.head_dim)
        if self._q_norm is not None:
            q = norm_heads(q, self._q_norm, self._config)
        k, v = self.cache.read(0, row.mask.shape[-1])
        y = F.scaled_dot_product_attention(
            apply_rope(q, row.rope).unsqueeze(2), k, v, attn_mask=row.mask, enable_gqa=True
        )
        y = y.view(self._batch, len(self._out), -1).transpose(0, 1)
        x = trunk + stacked_linear(y, self._out)
        gate, up = stacked_linear(self._normalize(x), self._gate_up).chunk(2, -1)
        return x + stacked_linear(F.silu(gate) * up, self._down)

    def _normalize(self, x: Tensor) -> Tensor:
        return normalize(x, math.sqrt(x.shape[-1]), self._floor)


def _rope_for(rope: Tensor, n_rotated: int, n_plain: int) -> Tensor:
    """Widen `rope` (R, 2, 1, head_dim) to heads that are rotated, and then heads that are not.

    Values then take the same three calls as the queries and keys beside them.
    """
    plain = rope.new_zeros(1, 2, 1, 1)
    plain[:, 0] = 1
    return torch.cat(
        [
            rope.expand(-1, -1, n_rotated, -1),
            plain.expand(rope.shape[0], -1, n_plain, rope.shape[-1]),
        ],
        2,
    )
