"""Trunk and heads over new rows, op by op in torch: what decoding runs on a GPU.

The heads that draft are alike and independent, so they run as one layer: their weights are stacked
and their attention heads lie side by side in one call. A small batch pays by the call and by the
byte of weights read, so calls are few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_fast.decoding.rows import Rows, pick
from mtp_fast.models import Block, KVCache, MTPConfig, MTPTransformer
from mtp_fast.models.transformer import apply_rope
from mtp_fast.ops._common import BoundKernel


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` of `x` (..., in) and `weight` (out, in), in x's dtype."""
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


class TorchLayers:
    """A model's trunk and heads with their caches, from tokens to logits.

    Parameters
    ----------
    model : MTPTransformer
        The model.
    layers : sequence of Block
        Trunk and head 0.
    drafting : sequence of Block
        The other heads in use; their parameters are copied.
    batch : int
        Sequences.
    rope : Tensor
        (capacity, 2, 1, head_dim): `rope_table`, in the dtype of hidden states and caches.
    """

    def __init__(
        self,
        model: MTPTransformer,
        layers: Sequence[Block],
        drafting: Sequence[Block],
        batch: int,
        rope: Tensor,
    ) -> None:
        config = self._config = model.config
        self._batch, self._layers, self._dtype = batch, layers, rope.dtype
        self._embedding, self._unembedding = model.embedding, model.unembedding.weight
        self._cache = KVCache(
            len(layers), batch, len(rope), config.n_kv_heads, config.head_dim, rope
        )
        self._scales = [
            (norm_scale(block.attention_norm), norm_scale(block.ffn_norm)) for block in layers
        ]
        self._final_scale = norm_scale(model.norm)
        self._floor = norm_floor(config, rope)
        self._drafting = _DraftHeads(config, drafting, batch, rope) if drafting else None

    def forward(self, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `IncrementalModel.forward`."""
        x = self._embedding(tokens).to(self._dtype)
        shape = x.shape
        n_kv, n_q = self._config.n_kv_heads, self._config.n_attention_heads
        rope = _rope_for(rows.rope, n_q + n_kv, n_kv)
        x = trunk = x.flatten(0, 1)
        for layer, block in enumerate(self._layers):
            trunk = x
            x = self._block(layer, block, x, rows, rope)
        if self._drafting is not None:
            self._drafting.write(trunk, rows)
        return trunk.view(shape), self._normalize(x).view(shape)

    def step(self, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `IncrementalModel.step`."""
        trunk, hidden = self.forward(tokens, rows)
        return trunk, self.logits(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `IncrementalModel.logits`."""
        return linear(hidden, self._unembedding)

    def draft_logits(
        self,
        trunk: Tensor,
        at: Tensor,
        row: Rows,
        *,
        out: Tensor | None = None,
        drafts: Tensor | None = None,
    ) -> Tensor:
        """See `IncrementalModel.draft_logits`."""
        if self._drafting is None:
            raise ValueError("no drafting heads: n_heads is 1")
        hidden = self._normalize(self._drafting.read(pick(trunk, at), row))
        logits = self.logits(hidden).transpose(0, 1)
        if drafts is not None:
            torch.argmax(logits, -1, out=drafts)
        return logits if out is None else out.copy_(logits)

    def repeated(
        self, between: Sequence[BoundKernel], behind: Sequence[BoundKernel]
    ) -> BoundKernel | None:
        """See `IncrementalModel.repeated`."""
        return None

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

    def __init__(self, config: MTPConfig, heads: Sequence[Block], batch: int, rope: Tensor) -> None:
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
        self._cache = KVCache(1, batch, len(rope), self._n_kv, width, rope)
        self._floor = norm_floor(config, rope)

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
        self._cache.write(0, *rows.places, apply_rope(kv, rope))

    def read(self, trunk: Tensor, row: Rows) -> Tensor:
        """Map one row a sequence `trunk` (B, dim) to the heads' outputs (H, B, dim)."""
        q = linear(self._normalize(trunk), self._q)
        if self._q_bias is not None:
            q = q + self._q_bias
        q = q.view(len(trunk), -1, self._config.head_dim)
        if self._q_norm is not None:
            q = norm_heads(q, self._q_norm, self._config)
        k, v = self._cache.read(0, row.mask.shape[-1])
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
