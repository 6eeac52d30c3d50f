"""The model run incrementally: a few new rows a sequence against cached keys and values.

Trunk and head 0 run on all new rows, since head 0 judges the drafts. The other heads only draft:
they store keys and values of the new rows, and answer at one row a sequence.

On a CPU a forward is one call of a kernel (`CPULayers`) and what lies between the products is
float32, whatever the weights are stored in; on a GPU it is torch's ops (`TorchLayers`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtp_fast.decoding.cpu_layers import CPULayers, PackedLayers, runs_on_cpu
from mtp_fast.decoding.rows import Rows
from mtp_fast.decoding.torch_layers import TorchLayers
from mtp_fast.models import Block, MTPTransformer, Trunk
from mtp_fast.models.transformer import rope_table
from mtp_fast.ops._common import BoundKernel


class PreparedModel:
    """A model as decoding reads it, to be prepared once for many calls of `generate`.

    On a CPU the layers' weights are copied into the order in which the kernel reads them, which
    takes as long as some ten to twenty steps of one sequence, and as much memory as the layers. The
    drafting heads' matrices are rounded to int8, with a scale for each output, and what they are
    multiplied with to 16 bits: drafts may differ from the heads' own, but not greedy output, nor
    the distribution of what is sampled by the exact and block rules. The copy is of what the
    weights are now: after more training, prepare the model again.

    Parameters
    ----------
    model : MTPTransformer
        The model, in evaluation mode.
    n_heads : int, optional
        Heads that may be used, head 0 included. All by default.

    Raises
    ------
    TypeError
        If the model's trunk is not our `Trunk`, whose cache decoding needs.
    ValueError
        If the model has not so many heads.
    """

    def __init__(self, model: MTPTransformer, n_heads: int | None = None) -> None:
        if not isinstance(model.trunk, Trunk):
            raise TypeError(
                f"incremental decoding needs a Trunk, the model has a {type(model.trunk).__name__}"
            )
        self._model = model
        weight = model.unembedding.weight
        self.config, self.device, self.dtype = model.config, weight.device, weight.dtype
        self.n_heads = check_n_heads(n_heads, len(model.heads))
        heads = [head for head in model.heads if isinstance(head, Block)]
        self._layers, self._drafting = [*model.trunk.blocks, heads[0]], heads[1 : self.n_heads]
        self._packed: PackedLayers | None = None
        if runs_on_cpu(model, [*self._layers, *self._drafting]):
            self._packed = PackedLayers(model, self._layers, self._drafting)

    def layers(self, n_heads: int, batch: int, rope: Tensor) -> CPULayers | TorchLayers:
        """The layers with empty caches for `batch` sequences of ``len(rope)`` positions."""
        if self._packed is not None:
            return CPULayers(self._packed, n_heads - 1, batch, rope)
        return TorchLayers(self._model, self._layers, self._drafting[: n_heads - 1], batch, rope)


def check_n_heads(n_heads: int | None, available: int) -> int:
    """Return `n_heads`, by default `available`, or raise ValueError if there are not so many."""
    n_heads = available if n_heads is None else n_heads
    if not 1 <= n_heads <= available:
        raise ValueError(f"n_heads must be in [1, {available}], got {n_heads}")
    return n_heads


class IncrementalModel:
    """Inference of an `MTPTransformer` with static KV caches for the trunk and the heads in use.

    Parameters
    ----------
    model : MTPTransformer or PreparedModel
        The model. A plain one is prepared for this use alone.
    n_heads : int
        Heads in use.
    batch : int
        Sequences.
    capacity : int
        Positions that a sequence may occupy.

    Raises
    ------
    TypeError, ValueError
        As `PreparedModel`.
    """

    def __init__(
        self, model: MTPTransformer | PreparedModel, n_heads: int, batch: int, capacity: int
    ) -> None:
        if not isinstance(model, PreparedModel):
            model = PreparedModel(model, n_heads)
        config = model.config
        self.dtype = torch.float32 if model.device.type == "cpu" else model.dtype
        self._rope = rope_table(
            config.head_dim, capacity, config.rope_theta, config.rope_scaling
        ).to(model.device, self.dtype)
        self._layers = model.layers(n_heads, batch, self._rope)

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
        return self._layers.forward(tokens, rows)

    def step(self, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Do as `forward` does, up to head 0's logits.

        Returns
        -------
        trunk, logits : Tensor
            (B, S, dim) and (B, S, vocab_size). On a CPU the next step may overwrite them.
        """
        return self._layers.step(tokens, rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """Unembed `hidden` (..., dim): (..., vocab_size)."""
        return self._layers.logits(hidden)

    def draft_logits(
        self,
        trunk: Tensor,
        at: Tensor,
        row: Rows,
        *,
        out: Tensor | None = None,
        drafts: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, n_heads - 1, vocab_size) of the drafting heads at one row a sequence.

        Parameters
        ----------
        trunk : Tensor
            (B, S, dim) the trunk's output.
        at : Tensor
            (B,) int64: which of the S rows it is.
        row : Rows
            The row's place, one a sequence, whose keys and values `forward` has stored.
        out : Tensor, optional
            Where they go: contiguous, in `dtype`. Else on a CPU the next call overwrites them.
        drafts : Tensor, optional
            (B, n_heads - 1) int64, contiguous rows: where the most likely tokens go.
        """
        return self._layers.draft_logits(trunk, at, row, out=out, drafts=drafts)

    def repeated(
        self, between: Sequence[BoundKernel], behind: Sequence[BoundKernel]
    ) -> BoundKernel | None:
        """Return one call of the last `step`, `between`, the last `draft_logits`, and `behind`.

        `draft_logits` is left out if it was never called. The call reads and writes the tensors
        that they had then, which must live as long, until the next call of another method. None
        where they are no calls of kernels: on a GPU, and on a CPU if the step's rows were too many
        for one, or if a `forward` came after it.
        """
        return self._layers.repeated(between, behind)
