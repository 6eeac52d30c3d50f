"""Transformer blocks over new rows on a CPU, through one call of a kernel.

A decode step is a few rows through many layers. Done op by op it would spend most of its time
between the ops; csrc/decode_layers runs whole layers, from a copy of their weights in the order in
which it reads them. Prompts go the same way, in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtp_fast import _C
from mtp_fast.decoding.rows import Rows
from mtp_fast.models import Block, MTPConfig
from mtp_fast.ops._common import DTYPE_CODES, call_kernel

# Rows of one call, all sequences together: as many as the caches take beside the weights.
ROWS_PER_CALL = 64


def runs_on_cpu(blocks: Sequence[Block]) -> bool:
    """Whether `CPUBlocks` can run `blocks`: on a CPU, all weights in one dtype that it knows."""
    weights = [p for block in blocks for p in block.parameters() if p.ndim == 2]
    kinds = {(p.device.type, p.dtype) for p in weights}
    return len(kinds) == 1 and all(
        device == "cpu" and dtype in DTYPE_CODES for device, dtype in kinds
    )


class CPULayers:
    """Trunk and heads with their caches; parameters as of `TorchLayers`, the weights copied."""

    def __init__(
        self,
        config: MTPConfig,
        blocks: Sequence[Block],
        drafting: Sequence[Block],
        norm: nn.RMSNorm,
        batch: int,
        rope: Tensor,
    ) -> None:
        self._blocks = CPUBlocks(config, blocks, norm, batch, rope)
        self._drafting = CPUBlocks(config, drafting, norm, batch, rope) if drafting else None

    def forward(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `IncrementalModel.forward`, of `x` (B, S, dim)."""
        size = max(1, ROWS_PER_CALL // len(x))
        pieces = [
            self._piece(x[:, begin : begin + size], rows.start + begin)
            for begin in range(0, x.shape[1], size)
        ]
        if len(pieces) == 1:
            return pieces[0]
        trunk, hidden = zip(*pieces, strict=True)
        return torch.cat(trunk, 1), torch.cat(hidden, 1)

    def _piece(self, x: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        trunk, hidden = self._blocks.layers(x, start)
        if self._drafting is not None:
            self._drafting.store_keys_values(trunk, start)
        return trunk, hidden

    def draft(self, trunk: Tensor, row: Rows) -> Tensor:
        """Map one row a sequence `trunk` (B, dim) to the drafting heads' outputs (H, B, dim)."""
        if self._drafting is None:
            raise ValueError("no drafting heads: n_heads is 1")
        return self._drafting.heads(trunk, row.start)


class CPUBlocks:
    """Blocks with their caches.

    Parameters
    ----------
    config : MTPConfig
        The blocks' shape.
    blocks : sequence of Block
        N blocks for which `runs_on_cpu`; their weights are copied.
    norm : nn.RMSNorm
        The norm behind the blocks.
    batch : int
        Sequences.
    rope : Tensor
        (capacity, 2, 1, head_dim) float32: `rope_table`.
    """

    def __init__(
        self,
        config: MTPConfig,
        blocks: Sequence[Block],
        norm: nn.RMSNorm,
        batch: int,
        rope: Tensor,
    ) -> None:
        self._n_blocks = len(blocks)
        shape = (
            DTYPE_CODES[blocks[0].ffn.down.weight.dtype],
            config.dim,
            config.ffn_dim,
            config.n_attention_heads,
            config.n_kv_heads,
            config.head_dim,
        )
        capacity = len(rope)
        packed_size, cache_size = _C.decode_sizes(*shape, capacity)
        packed = _packed(blocks, shape, packed_size)
        cache = rope.new_empty(batch, len(blocks), cache_size)
        _C.advise_huge_pages(cache.data_ptr(), cache.nbytes)
        vectors = [_vectors(block) for block in blocks]
        table = _addresses(vectors)
        final_scale = norm.weight.detach().float().contiguous()
        # What the arguments point to must live as long as they do.
        self._owned = (packed, cache, vectors, table, final_scale, rope)
        self._arguments = (
            *shape,
            capacity,
            table.data_ptr(),
            packed.data_ptr(),
            cache.data_ptr(),
            len(blocks),
            config.norm_eps,
            final_scale.data_ptr(),
            rope.data_ptr(),
        )

    def layers(self, x: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Run the blocks one after the other on new rows, and store their keys and values.

        Parameters
        ----------
        x : Tensor
            (B, S, dim) float32.
        start : Tensor
            (B,) int64: the position of each sequence's first new row.

        Returns
        -------
        last_input, y : Tensor
            (B, S, dim) float32 each: what the last block was given, and its output after the norm.

        Raises
        ------
        IndexError
            If a row's position lies outside the cache.
        """
        y, last_input = x.clone(memory_format=torch.contiguous_format), torch.empty_like(x)
        self._call("decode_layers", start, x.shape[1], y, last_input)
        return last_input, y

    def store_keys_values(self, x: Tensor, start: Tensor) -> None:
        """Store each block's keys and values of the new rows `x` (B, S, dim)."""
        self._call("decode_keys_values", start, x.shape[1], x.contiguous(), x)

    def heads(self, x: Tensor, start: Tensor) -> Tensor:
        """Run each block by itself on one row a sequence, whose keys and values are stored.

        Parameters
        ----------
        x : Tensor
            (B, dim) float32.
        start : Tensor
            (B,) int64: the rows' positions.

        Returns
        -------
        Tensor
            (N, B, dim) float32, after the norm.
        """
        y = x.repeat(self._n_blocks, 1, 1)
        self._call("decode_heads", start, 1, y, y)
        return y

    def _call(self, name: str, start: Tensor, rows: int, x: Tensor, last_input: Tensor) -> None:
        start = start.contiguous()
        call_kernel(
            name,
            x,
            *self._arguments,
            len(start),
            rows,
            start.data_ptr(),
            x.data_ptr(),
            last_input.data_ptr(),
        )


def _addresses(tensors: Sequence[Sequence[Tensor | None]]) -> Tensor:
    return torch.tensor([[0 if t is None else t.data_ptr() for t in row] for row in tensors])


def _packed(blocks: Sequence[Block], shape: tuple[int, ...], size: int) -> Tensor:
    """The blocks' weights as csrc/decode_layers/packed.h lays them out, `size` elements each."""
    # Fields of `struct DecodeWeights`.
    weights = [
        [
            layer.weight.detach().contiguous()
            for layer in (
                block.attention.qkv, block.attention.out, block.ffn.gate_up, block.ffn.down
            )
        ]
        for block in blocks
    ]  # fmt: skip
    like = weights[0][0]
    packed = like.new_empty(len(blocks), size)
    _C.advise_huge_pages(packed.data_ptr(), packed.nbytes)
    table = _addresses(weights)
    call_kernel("decode_pack", like, *shape, table.data_ptr(), len(blocks), packed.data_ptr())
    return packed


def _vectors(block: Block) -> list[Tensor | None]:
    """Fields of `struct DecodeBlock`."""
    attention = block.attention
    query_norm, key_norm = attention.q_norm, attention.k_norm
    return [
        None if t is None else t.detach().float().contiguous()
        for t in (
            block.attention_norm.weight,
            attention.qkv.bias,
            None if query_norm is None else query_norm.weight,
            None if key_norm is None else key_norm.weight,
            block.ffn_norm.weight,
        )
    ]
