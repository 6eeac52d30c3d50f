"""Self-speculative generation: the heads draft, head 0 judges, several tokens come per forward.

Each step runs one forward over the last token and its drafts. Head 0's logits there decide how
many drafts stand and which token follows them; the other heads, at the last row that stands, draft
the next block. Output with k heads equals output with head 0 alone (greedy), or has its
distribution (sampled).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtp_fast.decoding.incremental import IncrementalModel
from mtp_fast.models import MTPTransformer
from mtp_fast.ops.acceptance import sample, speculative_accept

PREFILL_CHUNK = 512
# On CUDA a stop is looked for once in so many steps, since looking waits for the device.
CUDA_STEPS_PER_CHECK = 16


@dataclass(frozen=True)
class GenerateStats:
    """What a generation cost and how its drafts fared.

    Attributes
    ----------
    forwards : list of int
        Forwards that each sequence took part in, the prompt's included.
    tokens_per_forward : float
        New tokens per forward, over all sequences.
    acceptance : list of float
        Share of steps in which the draft at position 0, 1, ... and all before it were accepted.
    seconds : float
        Wall-clock time, the prompt's included.
    """

    forwards: list[int]
    tokens_per_forward: float
    acceptance: list[float]
    seconds: float


@dataclass(frozen=True)
class GenerateResult:
    """New tokens and statistics of `generate`.

    Attributes
    ----------
    tokens : list of Tensor
        One 1-D int64 tensor a prompt, without the prompt; an end-of-sequence token is kept.
    drafted : list of Tensor
        Boolean, beside `tokens`: which of them were accepted drafts.
    stats : GenerateStats
        See there.
    """

    tokens: list[Tensor]
    drafted: list[Tensor]
    stats: GenerateStats


@torch.inference_mode()
def generate(
    model: MTPTransformer,
    prompts: Sequence[Tensor] | Tensor,
    max_new_tokens: int,
    *,
    n_heads: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    rule: str = "exact",
    seed: int = 0,
    eos_token_id: int | None = None,
) -> GenerateResult:
    """Continue `prompts` self-speculatively.

    Parameters
    ----------
    model : MTPTransformer
        The model, in evaluation mode; decoding runs in its parameters' dtype and device.
    prompts : sequence of Tensor, or Tensor
        1-D integer tensors of any lengths >= 1, or one (B, T) tensor.
    max_new_tokens : int
        Limit for each sequence.
    n_heads : int, optional
        Heads in use, head 0 included: ``n_heads - 1`` drafts a step. All by default.
    temperature, top_k, top_p, min_p, rule
        As in `mtp_fast.speculative_accept`.
    seed : int
        Sequence b draws from the stream ``seed + b``.
    eos_token_id : int, optional
        A sequence ends after this token.

    Returns
    -------
    GenerateResult
        New tokens and statistics.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of range, a prompt is empty, holds an unknown token, or does not fit
        into ``max_seq_len`` together with `max_new_tokens`.
    RuntimeError
        If the model's logits are not finite.
    """
    started = time.perf_counter()
    prompts = list(prompts)
    n_heads = len(model.heads) if n_heads is None else n_heads
    _check(model, prompts, max_new_tokens, n_heads)
    device = model.unembedding.weight.device
    decoder = _Decoder(
        model,
        [prompt.to(device, torch.int64) for prompt in prompts],
        max_new_tokens,
        n_heads,
        {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p},
        rule,
        seed,
        eos_token_id,
    )
    decoder.prefill()
    steps_per_check = CUDA_STEPS_PER_CHECK if device.type == "cuda" else 1
    while not decoder.finished():
        for _ in range(steps_per_check):
            decoder.step()
    return decoder.result(started)


def _check(model: MTPTransformer, prompts: list[Tensor], max_new_tokens: int, n_heads: int) -> None:
    if not prompts:
        raise ValueError("prompts is empty")
    if not 1 <= n_heads <= len(model.heads):
        raise ValueError(f"n_heads must be in [1, {len(model.heads)}], got {n_heads}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    vocab_size, max_seq_len = model.config.vocab_size, model.config.max_seq_len
    for b, prompt in enumerate(prompts):
        if prompt.ndim != 1 or len(prompt) == 0:
            raise ValueError(
                f"prompts[{b}] must be 1-D and not empty, got shape {tuple(prompt.shape)}"
            )
        if prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
            raise TypeError(f"prompts[{b}] must hold token ids, got {prompt.dtype}")
        if len(prompt) + max_new_tokens > max_seq_len:
            raise ValueError(
                f"prompts[{b}] has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} "
                f"it exceeds the model's context of {max_seq_len}"
            )
        if int(prompt.min()) < 0 or int(prompt.max()) >= vocab_size:
            raise ValueError(f"prompts[{b}] holds token ids outside [0, {vocab_size})")


class _Decoder:
    """The state of one generation; every field that changes by sequence is a device tensor."""

    def __init__(
        self,
        model: MTPTransformer,
        prompts: list[Tensor],
        max_new_tokens: int,
        n_heads: int,
        sampling: dict[str, Any],
        rule: str,
        seed: int,
        eos_token_id: int | None,
    ) -> None:
        device, batch = model.unembedding.weight.device, len(prompts)
        self.prompts, self.max_new_tokens, self.width = prompts, max_new_tokens, n_heads
        self.sampling, self.rule, self.eos_token_id = sampling, rule, eos_token_id
        self.greedy = sampling["temperature"] == 0
        # The last step may write its whole block beyond the limit.
        capacity = max(len(prompt) for prompt in prompts) + max_new_tokens + n_heads
        self.length = capacity  # slots that attention reads
        self.model = IncrementalModel(model, n_heads, batch, capacity)
        self.seed = seed + torch.arange(batch, device=device)
        self.prompt_length = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.produced = torch.zeros_like(self.prompt_length)
        self.live = torch.ones_like(self.prompt_length, dtype=torch.bool)
        self.stuck = torch.zeros_like(self.live)
        self.forwards = torch.zeros_like(self.prompt_length)
        self.accepted = torch.zeros(n_heads - 1, dtype=torch.int64, device=device)
        self.output = torch.zeros(batch, max_new_tokens + n_heads, dtype=torch.int64, device=device)
        self.drafted = torch.zeros_like(self.output, dtype=torch.bool)
        self.drafts = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        self.draft_logits: Tensor | None = None
        self.columns = torch.arange(n_heads, device=device)

    def prefill(self) -> None:
        """Run the prompts in chunks, then emit each sequence's first token and first drafts."""
        tokens = torch.nn.utils.rnn.pad_sequence(self.prompts, batch_first=True)
        last = self.prompt_length - 1
        picked: list[Tensor] = []
        for begin in range(0, tokens.shape[1], PREFILL_CHUNK):
            chunk = tokens[:, begin : begin + PREFILL_CHUNK]
            start = torch.full_like(last, begin)
            rows = self.model.rows(start, chunk.shape[1], begin + chunk.shape[1])
            outputs = self.model.forward(chunk, rows)
            row = last - begin
            here = ((row >= 0) & (row < chunk.shape[1]))[:, None]
            new = [_pick(x, row.clamp(0, chunk.shape[1] - 1)) for x in outputs]
            picked = [torch.where(here, a, b) for a, b in zip(new, picked or new, strict=True)]
        trunk, hidden = picked
        self.commit(hidden[:, None], trunk[:, None])

    def step(self) -> None:
        """One forward over the last token and its drafts, then `commit`."""
        last = self.output.gather(1, (self.produced - 1).clamp(min=0)[:, None])
        start = self.prompt_length + self.produced - 1
        rows = self.model.rows(start, self.width, self.length)
        trunk, hidden = self.model.forward(torch.cat([last, self.drafts], 1), rows)
        self.commit(hidden, trunk)

    def commit(self, hidden: Tensor, trunk: Tensor) -> None:
        """Judge the drafts by head 0's `hidden` (B, S, dim), emit tokens, draft the next block."""
        position = self.prompt_length + self.produced
        result = speculative_accept(
            self.model.logits(hidden),
            self.drafts,
            draft_logits=self.draft_logits,
            rule=self.rule,
            seed=self.seed,
            position=position,
            eos_token_id=self.eos_token_id,
            pad_token_id=0,  # a sequence that has ended goes on reading its output: keep it valid
            **self.sampling,
        )
        columns = self.columns[: hidden.shape[1]]
        from_draft = columns < result.num_accepted[:, None]
        # What lies beyond the emitted tokens is overwritten by the next step or never read.
        where = self.produced[:, None] + columns
        self.output.scatter_(1, where, result.tokens)
        self.drafted.scatter_(1, where, from_draft)
        self.forwards += self.live
        self.accepted += (from_draft & self.live[:, None]).sum(0)[: self.width - 1]

        count = torch.where(self.live, result.num_tokens, 0)
        self.stuck |= self.live & (count == 0)
        self.produced = (self.produced + count).clamp_(max=self.max_new_tokens)
        self.live = self.live & (count > 0) & (self.produced < self.max_new_tokens)
        if self.eos_token_id is not None:
            last = self.output.gather(1, (self.produced - 1).clamp(min=0)[:, None])
            self.live &= last[:, 0] != self.eos_token_id
        if self.width > 1:
            self.draft(_pick(trunk, (count - 1).clamp(min=0)))

    def draft(self, trunk: Tensor) -> None:
        """Draft the next block from the trunk's output `trunk` (B, dim) at the last row kept."""
        position = self.prompt_length + self.produced
        row = self.model.rows(position - 2, 1, self.length)
        logits = self.model.draft_logits(trunk, row)
        if self.greedy:
            self.drafts = logits.argmax(-1)
            return
        self.draft_logits = logits
        self.drafts = torch.stack(
            [
                sample(logits[:, i], seed=self.seed, position=position, index=i, **self.sampling)
                for i in range(self.width - 1)
            ],
            1,
        )

    def finished(self) -> bool:
        """Whether every sequence has ended. Waits for the device."""
        longest = torch.where(self.live, self.prompt_length + self.produced, 0).max().item()
        if self.output.device.type == "cpu":
            # Attention need not read slots that no live sequence has reached.
            self.length = int(longest) + self.width - 1
        return longest == 0

    def result(self, started: float) -> GenerateResult:
        """Cut the output to what each sequence produced."""
        if self.stuck.any():
            bad = self.stuck.nonzero().flatten().tolist()
            raise RuntimeError(f"the model's logits are not finite for prompts {bad}")
        produced, forwards = self.produced.tolist(), self.forwards.tolist()
        steps = max(1, sum(forwards) - len(forwards))  # the prompt's forward has no drafts
        stats = GenerateStats(
            forwards=forwards,
            tokens_per_forward=sum(produced) / sum(forwards),
            acceptance=[count / steps for count in self.accepted.tolist()],
            seconds=time.perf_counter() - started,
        )
        return GenerateResult(
            [row[:n].cpu() for row, n in zip(self.output, produced, strict=True)],
            [row[:n].cpu() for row, n in zip(self.drafted, produced, strict=True)],
            stats,
        )


def _pick(x: Tensor, row: Tensor) -> Tensor:
    """Take row ``row[b]`` of each sequence of `x` (B, S, dim): (B, dim)."""
    return x.gather(1, row[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]
