"""Where the new rows of a forward stand."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


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


def pick(x: Tensor, row: Tensor) -> Tensor:
    """Take row ``row[b]`` of each sequence of `x` (B, S, dim): (B, dim)."""
    return x.gather(1, row[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]
