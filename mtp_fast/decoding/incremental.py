"""The model run incrementally: a few new rows a sequence against cached keys and values.

Trunk and head 0 run on all new rows, since head 0 judges the drafts. The other heads only draft:
they store keys and values of the new rows, and answer at one row a sequence. Being alike and
independent they run as one layer: their weights are stacked and their attention heads lie side by
side in one call. A small batch pays by the call and by the byte of weights read, so calls are few.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_fast.models import Block, KVCache, MTPTransformer, Trunk
from mtp_fast.models.transformer import apply_rope, rope_table


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` for few rows `x` (rows, in) and `weight` (out, in)."""
    if x.dtype == torch.float32 and 2 <= x.shape[0] <= 6 and x.device.type == "cpu":
        # MKL repacks the weight for every call unless the few rows are its right operand:
        # 4 rows through a 1024 x 192 weight take 50 us as F.linear does it and 30 us so.
        return torch.mm(weight, x.t()).t().contiguous()
    return F.linear(x, weight)


def add_linear(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``residual + x @ weight.T`` for few rows, see `linear`."""
    if x.dtype == torch.float32 and 2 <= x.shape[0] <= 6 and x.device.type == "cpu":
        return torch.mm(weight, x.t()).t().add(residual)
    return torch.addmm(residual, x, weight.t())


@dataclass(frozen=True)
class Rows:
    """Where the new rows of a forward stand; R = batch * rows a sequence.

    Attributes
    ----------
    slots : Tensor
        (R,) the cache slots that they are written to.
    rope : Tensor
        (R, 2, 1, head_dim) their rotations.
    mask : Tensor
        (B, 1, S, length): 0 where a row may look, -inf elsewhere. Attention reads `length` slots.
    """

    slots: Tensor
    rope: Tensor
    mask: Tensor


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
        heads = [head for head in model.heads if isinstance(head, Block)]
        self._layers = [*model.trunk.blocks, heads[0]]
        self._cache = KVCache(
            len(self._layers), batch, capacity, config.n_kv_heads, config.head_dim, weight
        )
        self._rope = rope_table(
            config.head_dim, capacity, config.rope_theta, config.rope_scaling
        ).to(weight)
        self._drafting = (
            _DraftHeads(model, heads[1:n_heads], batch, capacity) if n_heads > 1 else None
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
        device = start.device
        positions = start[:, None] + torch.arange(count, device=device)
        unseen = torch.arange(length, device=device) > positions[:, None, :, None]
        offsets = torch.arange(self._batch, device=device)[:, None] * self._capacity
        mask = self._rope.new_zeros(unseen.shape).masked_fill_(unseen, -torch.inf)
        return Rows((positions + offsets).flatten(), self._rope[positions.flatten()], mask)

    def forward(self, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Run trunk and head 0 on `tokens` (B, S); store the drafting heads' keys and values.

        Returns
        -------
        trunk, hidden : Tensor
            (B, S, dim) each: the heads' input, and head 0's output ready for the unembedding.
        """
        n_kv, n_q = self._config.n_kv_heads, self._config.n_attention_heads
        rope = _rope_for(rows.rope, n_q + n_kv, n_kv)
        x = trunk = self._model.embedding(tokens.flatten())
        for layer, block in enumerate(self._layers):
            trunk = x
            x = self._block(layer, block, x, rows, rope)
        if self._drafting is not None:
            self._drafting.write(trunk, rows)
        return trunk.view(*tokens.shape, -1), self._model.norm(x).view(*tokens.shape, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Unembed `hidden` (..., dim): (..., vocab_size)."""
        flat = linear(hidden.flatten(0, -2), self._model.unembedding.weight)
        return flat.view(*hidden.shape[:-1], -1)

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
        return self.logits(self._model.norm(self._drafting.read(trunk, row))).transpose(0, 1)

    def _block(self, layer: int, block: Block, x: Tensor, rows: Rows, rope: Tensor) -> Tensor:
        attention, n_q = block.attention, self._config.n_attention_heads
        qkv = linear(block.attention_norm(x), attention.qkv.weight)
        if self._config.qkv_bias:
            qkv = qkv + attention.qkv.bias
        qkv = attention.normalize(qkv.view(len(x), -1, self._config.head_dim))
        qkv = apply_rope(qkv, rope)
        self._cache.write(layer, rows.slots, qkv[:, n_q:])
        k, v = self._cache.read(layer, rows.mask.shape[-1])
        q = qkv[:, :n_q].reshape(self._batch, -1, n_q, self._config.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=rows.mask, enable_gqa=True)
        x = add_linear(x, y.transpose(1, 2).reshape(len(x), -1), attention.out.weight)
        gate, up = linear(block.ffn_norm(x), block.ffn.gate_up.weight).chunk(2, -1)
        return add_linear(x, F.silu(gate) * up, block.ffn.down.weight)


class _DraftHeads:
    """Heads 1..H as one layer: weights stacked, norms folded in, attention heads side by side."""

    def __init__(
        self, model: MTPTransformer, heads: list[Block], batch: int, capacity: int
    ) -> None:
        config = model.config
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
        self._out = torch.stack([h.attention.out.weight.t() for h in heads])
        self._gate_up = torch.stack([(h.ffn.gate_up.weight * h.ffn_norm.weight).t() for h in heads])
        self._down = torch.stack([h.ffn.down.weight.t() for h in heads])
        self._cache = KVCache(1, batch, capacity, self._n_kv, width, qkv)

    def write(self, trunk: Tensor, rows: Rows) -> None:
        """Store keys and values of the rows `trunk` (R, dim)."""
        kv = linear(self._normalize(trunk), self._kv)
        if self._kv_bias is not None:
            kv = kv + self._kv_bias
        kv = kv.view(len(trunk), -1, self._config.head_dim)
        if self._k_norm is not None:
            k, v = kv.chunk(2, 1)
            k = F.rms_norm(k, k.shape[-1:], None, self._config.norm_eps) * self._k_norm
            kv = torch.cat([k, v], 1)
        rope = _rope_for(rows.rope, self._n_kv, self._n_kv)
        self._cache.write(0, rows.slots, apply_rope(kv, rope))

    def read(self, trunk: Tensor, row: Rows) -> Tensor:
        """Map one row a sequence `trunk` (B, dim) to the heads' outputs (H, B, dim)."""
        q = linear(self._normalize(trunk), self._q)
        if self._q_bias is not None:
            q = q + self._q_bias
        q = q.view(len(trunk), -1, self._config.head_dim)
        if self._q_norm is not None:
            q = F.rms_norm(q, q.shape[-1:], None, self._config.norm_eps) * self._q_norm
        k, v = self._cache.read(0, row.mask.shape[-1])
        y = F.scaled_dot_product_attention(
            apply_rope(q, row.rope).unsqueeze(2), k, v, attn_mask=row.mask, enable_gqa=True
        )
        y = y.view(self._batch, len(self._out), -1).transpose(0, 1)
        x = torch.baddbmm(trunk, y, self._out)
        gate, up = torch.bmm(self._normalize(x), self._gate_up).chunk(2, -1)
        return torch.baddbmm(x, F.silu(gate) * up, self._down)

    def _normalize(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], None, self._config.norm_eps)


def _rope_for(rope: Tensor, n_rotated: int, n_plain: int) -> Tensor:
    """Widen `rope` (R, 2, 1, head_dim) to heads that are rotated, and then heads that are not.

    Values then take the same three calls as the queries and keys beside them.
    """
    plain = rope.new_tensor([1.0, 0.0]).view(1, 2, 1, 1)
    return torch.cat(
        [
            rope.expand(-1, -1, n_rotated, -1),
            plain.expand(rope.shape[0], -1, n_plain, rope.shape[-1]),
        ],
        2,
    )
