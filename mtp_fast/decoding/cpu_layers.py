"""A model over new rows on a CPU, from tokens to logits, through one call of a kernel.

A decode step is a few rows through many layers. Done op by op it would spend most of its time
between the ops; csrc/decode_layers goes from tokens to logits, from a copy of the layers' weights
in the order in which it reads them, the drafting heads' in int8. Prompts go the same way, in
pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtp_fast import _C
from mtp_fast.decoding.rows import Rows
from mtp_fast.models import Block, MTPTransformer
from mtp_fast.ops._common import DTYPE_CODES, BoundKernel, bind_kernel, call_kernel
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


class PackedLayers:
    """A model's weights as the kernel reads them: the layers' in copies, the others in place.

    Parameters
    ----------
    model : MTPTransformer
        The model.
    layers : sequence of Block
        Trunk and head 0.
    drafting : sequence of Block
        The other heads in use; for all of them `runs_on_cpu`.
    """

    def __init__(
        self, model: MTPTransformer, layers: Sequence[Block], drafting: Sequence[Block]
    ) -> None:
        config, blocks = model.config, [*layers, *drafting]
        self.config, self.n_layers = config, len(layers)
        self.embedding = model.embedding.weight.detach().contiguous()
        self.unembedding = model.unembedding.weight.detach().contiguous()
        self.shape = (
            DTYPE_CODES[self.unembedding.dtype],
            config.dim,
            config.ffn_dim,
            config.n_attention_heads,
            config.n_kv_heads,
            config.head_dim,
        )
        self.packed = _packed(layers, self.shape)
        self.packed_drafting = _packed(drafting, self.shape, drafting=True)
        self.vectors = [_vectors(block) for block in blocks]
        self.table = _addresses(self.vectors)
        self.final_scale = model.norm.weight.detach().float().contiguous()


class CPULayers:
    """A model's trunk and heads with their caches, from tokens to logits.

    Parameters
    ----------
    weights : PackedLayers
        The model.
    n_drafting : int
        Drafting heads in use, the first of those packed.
    batch : int
        Sequences.
    rope : Tensor
        (capacity, 2, 1, head_dim) float32: `rope_table`.
    """

    def __init__(self, weights: PackedLayers, n_drafting: int, batch: int, rope: Tensor) -> None:
        config, n_blocks = weights.config, weights.n_layers + n_drafting
        self._vocab, self._dim = config.vocab_size, config.dim
        self._unembedding = weights.unembedding
        self._outputs: tuple[Tensor, Tensor] | None = None  # of the last step
        self._draft_logits = torch.empty(batch, n_drafting, config.vocab_size)
        capacity = len(rope)
        *_, cache_bytes = _C.decode_sizes(*weights.shape, capacity)
        cache = torch.empty(batch, n_blocks, cache_bytes, dtype=torch.uint8)
        _C.advise_huge_pages(cache.data_ptr(), cache.nbytes)
        cache.zero_()
        self._workspace = _C.Workspace()
        # What the arguments point to must live as long as they do.
        self._owned = (weights, cache, rope)
        self._arguments = (
            *weights.shape,
            capacity,
            weights.table.data_ptr(),
            weights.packed.data_ptr(),
            weights.packed_drafting.data_ptr(),
            cache.data_ptr(),
            weights.n_layers,
            n_blocks,
            config.norm_eps,
            weights.final_scale.data_ptr(),
            rope.data_ptr(),
            config.vocab_size,
            weights.embedding.data_ptr(),
            weights.unembedding.data_ptr(),
        )
        self._calls: dict[str, tuple[tuple[Tensor | None, ...], BoundKernel]] = {}

    def forward(self, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `IncrementalModel.forward`."""
        self._outputs = None
        outputs = self._in_pieces(tokens, rows.start, unembed=False)
        # A prompt's rows take far more memory than a step's.
        self._calls.clear()
        self._workspace = _C.Workspace()
        return outputs

    def step(self, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """See `IncrementalModel.step`."""
        if tokens.numel() > ROWS_PER_CALL:
            self._outputs = None
            return self._in_pieces(tokens, rows.start, unembed=True)
        if self._outputs is None or self._outputs[0].shape[:2] != tokens.shape:
            self._outputs = self._memory(tokens, unembed=True)
        return self._piece(tokens, rows.start, *self._outputs, unembed=True)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `IncrementalModel.logits`."""
        x = hidden.flatten(0, -2).to(self._unembedding.dtype)
        return few_row_linear(x, self._unembedding).view(*hidden.shape[:-1], -1)

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
        if self._draft_logits.shape[1] == 0:
            raise ValueError("no drafting heads: n_heads is 1")
        logits = self._draft_logits if out is None else out
        _check_memory("out", logits, self._draft_logits.shape, torch.float32)
        if drafts is not None:
            _check_memory("drafts", drafts, logits.shape[:2], torch.int64, rows_only=True)
        self._call("decode_heads", row.start, None, trunk, None, logits, at, drafts)
        return logits

    def repeated(
        self, between: Sequence[BoundKernel], behind: Sequence[BoundKernel]
    ) -> BoundKernel | None:
        """See `IncrementalModel.repeated`."""
        if self._outputs is None:
            return None
        layers, heads = (
            [self._calls[name][1]] if name in self._calls else []
            for name in ("decode_layers", "decode_heads")
        )
        return _C.in_sequence([*layers, *between, *heads, *behind])

    def _in_pieces(self, tokens: Tensor, start: Tensor, *, unembed: bool) -> tuple[Tensor, Tensor]:
        size = max(1, ROWS_PER_CALL // len(tokens))
        pieces = []
        for begin in range(0, tokens.shape[1], size):
            piece = tokens[:, begin : begin + size]
            memory = self._memory(piece, unembed)
            pieces.append(self._piece(piece, start + begin, *memory, unembed=unembed))
        if len(pieces) == 1:
            return pieces[0]
        trunk, out = zip(*pieces, strict=True)
        return torch.cat(trunk, 1), torch.cat(out, 1)

    def _memory(self, tokens: Tensor, unembed: bool) -> tuple[Tensor, Tensor]:
        widths = (self._dim, self._vocab if unembed else self._dim)
        trunk, out = (torch.empty(*tokens.shape, width) for width in widths)
        return trunk, out

    def _piece(
        self, tokens: Tensor, start: Tensor, trunk: Tensor, out: Tensor, *, unembed: bool
    ) -> tuple[Tensor, Tensor]:
        hidden, logits = (None, out) if unembed else (out, None)
        self._call("decode_layers", start, tokens, trunk, hidden, logits)
        return trunk, out

    def _call(
        self,
        name: str,
        start: Tensor,
        tokens: Tensor | None,
        trunk: Tensor,
        hidden: Tensor | None,
        logits: Tensor | None,
        trunk_row: Tensor | None = None,
        drafts: Tensor | None = None,
    ) -> None:
        """Call a kernel. What it was called with the last time is not taken apart again."""
        tensors = (start, tokens, trunk, hidden, logits, trunk_row, drafts)
        call = self._calls.get(name)
        if call is None or any(a is not b for a, b in zip(tensors, call[0], strict=True)):
            whole = [None if t is None else t.contiguous() for t in tensors[:-1]]
            kernel = bind_kernel(
                name,
                trunk,
                *self._arguments,
                len(start),
                1 if tokens is None else tokens.shape[1],
                *(0 if t is None else t.data_ptr() for t in whole),
                trunk.shape[1],
                *((0, 0) if drafts is None else (drafts.data_ptr(), drafts.stride(0))),
                self._workspace,
            )
            call = self._calls[name] = ((*whole, drafts), kernel)
        call[1]()


def _check_memory(
    name: str, x: Tensor, shape: torch.Size, dtype: torch.dtype, *, rows_only: bool = False
) -> None:
    """Raise ValueError unless a kernel can write `x`; with `rows_only` its rows may lie apart."""
    whole = x.stride(-1) == 1 if rows_only else x.is_contiguous()
    if x.shape != shape or x.dtype != dtype or not whole:
        raise ValueError(
            f"{name}: expected {tuple(shape)} of {dtype}, contiguous, got {tuple(x.shape)} of "
            f"{x.dtype} with strides {x.stride()}"
        )


def _addresses(tensors: Sequence[Sequence[Tensor | None]]) -> Tensor:
    return torch.tensor([[0 if t is None else t.data_ptr() for t in row] for row in tensors])


def _packed(
    blocks: Sequence[Block],
    shape: tuple[int, int, int, int, int, int],
    *,
    drafting: bool = False,
) -> Tensor:
    """The blocks' weights as csrc/decode_layers/packed.h lays them out; drafting heads' in int8."""
    size = _C.decode_sizes(*shape, 1)[drafting]
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
    packed = torch.empty(len(blocks), size, dtype=torch.uint8)
    _C.advise_huge_pages(packed.data_ptr(), packed.nbytes)
    table = _addresses(weights)
    call_kernel(
        "decode_pack",
        packed,
        *shape,
        table.data_ptr(),
        len(blocks),
        drafting,
        packed.data_ptr(),
    )
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
