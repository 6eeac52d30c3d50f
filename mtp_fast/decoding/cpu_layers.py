"""A model over new rows on a CPU, from tokens to logits, through one call of a kernel.

A decode step is a few rows through many layers. Done op by op it would spend most of its time
between the ops; csrc/decode_layers goes from tokens to logits, from a copy of the layers' weights
in the order in which it reads them. Prompts go the same way, in pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtp_fast import _C
from mtp_fast.decoding.rows import Rows
from mtp_fast.models import Block, MTPTransformer
from mtp_fast.ops._common import DTYPE_CODES, call_kernel
from mtp_fast.ops.few_row_linear import few_row_linear

# Rows of one call, all sequences together: as many as the caches take beside the weights.
ROWS_PER_CALL = 64


def runs_on_cpu(model: MTPTransformer, blocks: Sequence[Block]) -> bool:
    """Whether `CPULayers` can run `blocks`: on a CPU, all matrices in one dtype that it knows."""
    matrices = [model.embedding.weight, model.unembedding.weight]
    matrices += [p for block in blocks for p in block.parameters() if p.ndim == 2]
    kinds = {(p.device.type, p.dtype) for p in matrices}
    return len(kinds) == 1 and all(
        device == "cpu" and dtype in DTYPE_CODES for device, dtype in kinds
    )


class CPULayers:
    """A model's trunk and heads with their caches, from tokens to logits.

    Parameters
    ----------
    model : MTPTransformer
        The model. The weights of `layers` and `drafting` are copied.
    layers : sequence of Block
        Trunk and head 0.
    drafting : sequence of Block
        The other heads in use; for all of them `runs_on_cpu`.
    batch : int
        Sequences.
    rope : Tensor
        (capacity, 2, 1, head_dim) float32: `rope_table`.
    """

    def __init__(
        self,
        model: MTPTransformer,
        layers: Sequence[Block],
        drafting: Sequence[Block],
        batch: int,
        rope: Tensor,
    ) -> None:
        config, blocks = model.config, [*layers, *drafting]
        self._n_drafting, self._vocab, self._dim = len(drafting), config.vocab_size, config.dim
        embedding = model.embedding.weight.detach().contiguous()
        unembedding = self._unembedding = model.unembedding.weight.detach().contiguous()
        shape = (
            DTYPE_CODES[unembedding.dtype],
            config.dim,
            config.ffn_dim,
            config.n_attention_heads,
            config.n_kv_heads,
            config.head_dim,
        )
        capacity = len(rope)
        packed_size, cache_bytes = _C.decode_sizes(*shape, capacity)
        packed = _packed(blocks, shape, packed_size)
        cache = torch.empty(batch, len(blocks), cache_bytes, dtype=torch.uint8)
        _C.advise_huge_pages(cache.data_ptr(), cache.nbytes)
        cache.zero_()
        vectors = [_vectors(block) for block in blocks]
        table = _addresses(vectors)
        final_scale = model.norm.weight.detach().float().contiguous()
        # What the arguments point to must live as long as they do.
        self._owned = (packed, cache, vectors, table, final_scale, rope, embedding)
        self._arguments = (
            *shape,
            capacity,
            table.data_ptr(),
            packed.data_ptr(),
            cache.data_ptr(),
            len(layers),
            len(blocks),
            config.norm_eps,
            final_scale.data_ptr(),
            rope.data_ptr(),
            config.vocab_size,
            embedding.data_ptr(),
            unembedding.data_ptr(),
        )

    def forward(self, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `IncrementalModel.forward`."""
        return self._in_pieces(tokens, rows.start, unembed=False)

    def step(self, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `IncrementalModel.step`."""
        return self._in_pieces(tokens, rows.start, unembed=True)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `IncrementalModel.logits`."""
        x = hidden.flatten(0, -2).to(self._unembedding.dtype)
        return few_row_linear(x, self._unembedding).view(*hidden.shape[:-1], -1)

    def draft_logits(self, trunk: Tensor, row: Rows) -> Tensor:
        """See `IncrementalModel.draft_logits`."""
        if self._n_drafting == 0:
            raise ValueError("no drafting heads: n_heads is 1")
        logits = trunk.new_empty(len(trunk), self._n_drafting, self._vocab)
        self._call("decode_heads", row.start, None, trunk.contiguous(), None, logits)
        return logits

    def _in_pieces(self, tokens: Tensor, start: Tensor, *, unembed: bool) -> tuple[Tensor, Tensor]:
        size = max(1, ROWS_PER_CALL // len(tokens))
        pieces = [
            self._piece(tokens[:, begin : begin + size], start + begin, unembed=unembed)
            for begin in range(0, tokens.shape[1], size)
        ]
        if len(pieces) == 1:
            return pieces[0]
        trunk, out = zip(*pieces, strict=True)
        return torch.cat(trunk, 1), torch.cat(out, 1)

    def _piece(self, tokens: Tensor, start: Tensor, *, unembed: bool) -> tuple[Tensor, Tensor]:
        trunk = torch.empty(*tokens.shape, self._dim)
        out = torch.empty(*tokens.shape, self._vocab) if unembed else torch.empty_like(trunk)
        hidden, logits = (None, out) if unembed else (out, None)
        self._call("decode_layers", start, tokens.contiguous(), trunk, hidden, logits)
        return trunk, out

    def _call(
        self,
        name: str,
        start: Tensor,
        tokens: Tensor | None,
        trunk: Tensor,
        hidden: Tensor | None,
        logits: Tensor | None,
    ) -> None:
        start = start.contiguous()
        call_kernel(
            name,
            trunk,
            *self._arguments,
            len(start),
            1 if tokens is None else tokens.shape[1],
            start.data_ptr(),
            *(0 if t is None else t.data_ptr() for t in (tokens, trunk, hidden, logits)),
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
