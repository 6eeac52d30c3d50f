"""The model run incrementally: a few new rows a sequence against cached keys and values.

Trunk and head 0 run on all new rows, since head 0 judges the drafts. The other heads only draft:
they store keys and values of the new rows, and answer at one row a sequence.

On a CPU a forward is one call of a kernel (`CPULayers`) and what lies between the products is
float32, whatever the weights are stored in; on a GPU it is torch's ops (`TorchLayers`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_fast.decoding.cpu_layers import CPULayers, runs_on_cpu
from mtp_fast.decoding.rows import Rows
from mtp_fast.decoding.torch_layers import TorchLayers
from mtp_fast.models import Block, MTPTransformer, Trunk
from mtp_fast.models.transformer import rope_table


class IncrementalModel:
    """Inference of an `MTPTransformer` with static KV caches for the trunk and the heads in use.

    Parameters
    ----------
    model : MTPTransformer
        The model. On a CPU the layers' weights are copied, on a GPU the drafting heads'; all other
        parameters are read in place.
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
        heads = [head for head in model.heads if isinstance(head, Block)]
        layers, drafting = [*model.trunk.blocks, heads[0]], heads[1:n_heads]
        on_cpu = weight.device.type == "cpu"
        self.dtype = torch.float32 if on_cpu else weight.dtype
        self._rope = rope_table(
            config.head_dim, capacity, config.rope_theta, config.rope_scaling
        ).to(weight.device, self.dtype)
        implementation = CPULayers if runs_on_cpu(model, [*layers, *drafting]) else TorchLayers
        self._layers = implementation(model, layers, drafting, batch, self._rope)

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
            (B, S, dim) and (B, S, vocab_size).
        """
        return self._layers.step(tokens, rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """Unembed `hidden` (..., dim): (..., vocab_size)."""
        return self._layers.logits(hidden)

    def draft_logits(self, trunk: Tensor, row: Rows) -> Tensor:
        """Logits (B, n_heads - 1, vocab_size) of the drafting heads at one row a sequence.

        Parameters
        ----------
        trunk : Tensor
            (B, dim) the trunk's output there.
        row : Rows
            The row, one a sequence, whose keys and values `forward` has stored.
        """
        return self._layers.draft_logits(trunk, row)
