"""How far the sequences of a generation have come."""

from __future__ import annotations

import torch
from torch import Tensor

from mtp_fast.ops._common import BoundKernel, bind_kernel
from mtp_fast.ops.acceptance import AcceptResult


class Progress:
    """What a decode loop keeps of B sequences; a call of `bind_commit` takes it a step further.

    Every field is a device tensor that is written in place, so that a step may be captured in a
    CUDA graph.

    Parameters
    ----------
    prompt_length, limit : Tensor
        (B,) int64: tokens of each prompt, and how many may follow.
    width : int
        K + 1, tokens of a step's block.
    end_tokens : Tensor, optional
        (B, E) or (1, E) int64: tokens that end a sequence.

    Attributes
    ----------
    produced : Tensor
        (B,) int64: new tokens.
    output, drafted : Tensor
        (B, L) int64 and bool: the new tokens, and which of them were accepted drafts.
    live, stuck : Tensor
        (B,) bool: whether a sequence goes on, and whether it ended because its logits were not
        finite.
    forwards : Tensor
        (B,) int64: forwards that a sequence took part in.
    accepted : Tensor
        (K,) int64: in how many of them the draft at each place was accepted, over all sequences.
    block, start : Tensor
        (B, K+1) and (B,) int64: the next step's tokens, the last one and its drafts, and where they
        begin.
    position : Tensor
        (B,) int64: prompt and new tokens of each sequence.
    row, draft_start : Tensor
        (B,) int64: from which row of the step just judged the next block is drafted, and that row's
        position.
    """

    def __init__(
        self, prompt_length: Tensor, limit: Tensor, width: int, end_tokens: Tensor | None
    ) -> None:
        self.prompt_length, self.limit = prompt_length.contiguous(), limit.contiguous()
        batch = len(prompt_length)
        zeros = self.prompt_length.new_zeros
        self.produced, self.forwards, self.row = zeros(batch), zeros(batch), zeros(batch)
        self.position = self.prompt_length.clone()
        self.start = self.position - 1
        self.draft_start = zeros(batch)
        self.stuck = zeros(batch, dtype=torch.bool)
        self.live = ~self.stuck
        self.accepted = zeros(width - 1)
        self.output = zeros(batch, int(limit.max()))
        self.drafted = zeros(self.output.shape, dtype=torch.bool)
        self.block = zeros(batch, width)
        fields = (self.produced, self.position, self.live)
        # Read once in a step: on a CPU without going through torch.
        self._readable = [f.numpy() if f.device.type == "cpu" else f for f in fields]
        ends = (0, 0, 0)
        if end_tokens is not None:
            self._end_tokens = end_tokens = end_tokens.contiguous()
            ends = (end_tokens.data_ptr(), *_extent(end_tokens))
        self._arguments = (
            *ends,
            *(
                field.data_ptr()
                for field in (
                    *(self.prompt_length, self.limit, self.produced, self.forwards, self.live),
                    *(self.stuck, self.accepted, self.output, self.drafted, self.block),
                    *(self.start, self.position, self.row, self.draft_start),
                )
            ),
            batch,
            self.output.shape[1],
            width,
        )

    def read(self) -> tuple[list[int], list[int], list[bool]]:
        """Return `produced`, `position` and `live` as lists. Waits for the device."""
        produced, position, live = (field.tolist() for field in self._readable)
        return produced, position, live

    def bind_commit(self, result: AcceptResult) -> BoundKernel:
        """Return a call that appends what `result` then holds, and lays out the next block.

        `result` is what `speculative_accept` found in the current block. All but the next block's
        drafts is written: they go to ``block[:, 1:]``. It may be called until the next is made.
        """
        self._result = result  # lives as long as the call has its addresses
        return bind_kernel(
            "commit",
            self.output,
            *self._arguments,
            result.tokens.shape[1] - 1,
            result.tokens.data_ptr(),
            result.num_tokens.data_ptr(),
            result.num_accepted.data_ptr(),
        )


def _extent(end_tokens: Tensor) -> tuple[int, int]:
    """How many end tokens a sequence has, and how far from one's to the next's."""
    rows, count = end_tokens.shape
    return count, 0 if rows == 1 else count
