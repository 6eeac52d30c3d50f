"""Self-speculative generation: the heads draft, head 0 judges, several tokens come per forward.

Each step runs one forward over the last token and its drafts. Head 0's logits there decide how
many drafts stand and which token follows them; the other heads, at the last row that stands, draft
the next block. Output with k heads equals output with head 0 alone (greedy), or has its
distribution (sampled).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtp_fast.decoding.incremental import IncrementalModel, PreparedModel, check_n_heads
from mtp_fast.decoding.progress import Progress
from mtp_fast.decoding.rows import pick
from mtp_fast.models import MTPConfig, MTPTransformer
from mtp_fast.ops._acceptance_calls import Acceptance, Draw
from mtp_fast.ops._common import BoundKernel
from mtp_fast.ops.acceptance import prepare_acceptance, prepare_sample

PREFILL_CHUNK = 512
# New tokens and ends are looked for once in so many steps: on CUDA looking waits for the device.
STEPS_PER_CHECK = {"cpu": 1, "cuda": 16}


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
        Share of steps in which head 0 agreed with the draft at position 0, 1, ... and with all
        before it, whether or not an end or a limit cut them off afterwards.
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
    model: MTPTransformer | PreparedModel,
    prompts: Sequence[Tensor] | Tensor,
    max_new_tokens: int | Sequence[int] | Tensor,
    *,
    n_heads: int | None = None,
    temperature: float | Tensor = 0.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    rule: str = "exact",
    seed: int | Sequence[int] | Tensor = 0,
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    on_tokens: Callable[[int, Tensor], object] | None = None,
) -> GenerateResult:
    """Continue `prompts` self-speculatively.

    Parameters
    ----------
    model : MTPTransformer or PreparedModel
        The model, in evaluation mode; decoding runs in its parameters' dtype and device. For many
        calls, prepare it once.
    prompts : sequence of Tensor, or Tensor
        1-D integer tensors of any lengths >= 1, or one (B, T) tensor.
    max_new_tokens : int, sequence of int, or Tensor
        Limit for every sequence, or (B,) one for each.
    n_heads : int, optional
        Heads in use, head 0 included: ``n_heads - 1`` drafts a step. By default all that the model
        has, or was prepared with.
    temperature, top_k, top_p, min_p, rule
        As in `mtp_fast.speculative_accept`: numbers, or (B,) tensors of one value a sequence.
    seed : int, sequence of int, or Tensor
        Sequence b draws from the stream ``seed + b``, or from ``seed[b]`` of (B,) seeds.
    eos_token_id : int, sequence of int, or Tensor, optional
        A sequence ends after this token, or after any of several. A (B, E) tensor gives each
        sequence its own, -1 standing for none.
    on_tokens : callable, optional
        Called as ``on_tokens(b, tokens)`` with the new tokens of sequence b, a 1-D int64 CPU
        tensor, as they are committed: after every step on a CPU, after every 16th on CUDA, where
        each look waits for the device.

    Returns
    -------
    GenerateResult
        New tokens and statistics.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of range, a prompt is empty, holds an unknown token, or does not fit
        into ``max_seq_len`` together with its limit.
    RuntimeError
        If the model's logits are not finite.
    """
    started = time.perf_counter()
    prompts = list(prompts)
    if not isinstance(model, PreparedModel):
        model = PreparedModel(model, n_heads)
    n_heads = check_n_heads(n_heads, model.n_heads)
    device = model.device
    limits = _integers("max_new_tokens", max_new_tokens, len(prompts))
    _check(model.config, prompts, limits.tolist())
    seeds = _integers("seed", seed, len(prompts))
    if isinstance(seed, int):
        seeds = seeds + torch.arange(len(prompts))
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    decoder = _Decoder(
        model,
        [prompt.to(device, torch.int64) for prompt in prompts],
        limits,
        n_heads,
        {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in sampling.items()
        },
        rule,
        seeds,
        None if eos_token_id is None else _end_tokens(eos_token_id, len(prompts)),
    )
    decoder.prefill()
    while decoder.check(on_tokens):
        for _ in range(decoder.steps_per_check):
            decoder.step()
    return decoder.result(started)


def _check(config: MTPConfig, prompts: list[Tensor], limits: list[int]) -> None:
    if not prompts:
        raise ValueError("prompts is empty")
    if min(limits) < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {min(limits)}")
    vocab_size, max_seq_len = config.vocab_size, config.max_seq_len
    for b, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if prompt.ndim != 1 or len(prompt) == 0:
            raise ValueError(
                f"prompts[{b}] must be 1-D and not empty, got shape {tuple(prompt.shape)}"
            )
        if prompt.is_floating_point() or prompt.is_complex() or prompt.dtype == torch.bool:
            raise TypeError(f"prompts[{b}] must hold token ids, got {prompt.dtype}")
        if len(prompt) + limit > max_seq_len:
            raise ValueError(
                f"prompts[{b}] has {len(prompt)} tokens; with max_new_tokens={limit} "
                f"it exceeds the model's context of {max_seq_len}"
            )
        if int(prompt.min()) < 0 or int(prompt.max()) >= vocab_size:
            raise ValueError(f"prompts[{b}] holds token ids outside [0, {vocab_size})")


def _as_integers(name: str, value: int | Sequence[int] | Tensor) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{name} must hold 64-bit integers, got {value!r}") from error
    if tensor.numel() and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise TypeError(f"{name} must hold integers, got {tensor.dtype}")
    return tensor.to(torch.int64)


def _integers(name: str, value: int | Sequence[int] | Tensor, batch: int) -> Tensor:
    """One integer, or one a sequence, as a (B,) CPU tensor."""
    tensor = _as_integers(name, value).cpu()
    if tensor.ndim and tensor.shape != (batch,):
        raise ValueError(
            f"{name} must be one integer or one for each of {batch} prompts, "
            f"got shape {tuple(tensor.shape)}"
        )
    return tensor.expand(batch)


def _end_tokens(value: int | Sequence[int] | Tensor, batch: int) -> Tensor:
    """Tokens that end a sequence as (1 or B, E)."""
    tensor = _as_integers("eos_token_id", value)
    if tensor.ndim > 2 or (tensor.ndim == 2 and len(tensor) != batch):
        raise ValueError(
            f"eos_token_id must be an integer, several, or (B, E) for {batch} prompts, "
            f"got shape {tuple(tensor.shape)}"
        )
    return tensor if tensor.ndim == 2 else tensor.view(1, -1)


class _Decoder:
    """One generation: the model, the sampling arguments and the sequences' progress."""

    def __init__(
        self,
        model: PreparedModel,
        prompts: list[Tensor],
        limits: Tensor,
        n_heads: int,
        sampling: dict[str, Any],
        rule: str,
        seeds: Tensor,
        end_tokens: Tensor | None,
    ) -> None:
        batch, device = len(prompts), model.device
        self.prompts, self.width = prompts, n_heads
        self.sampling, self.rule, self.seed = sampling, rule, seeds.to(device)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        # The last step may write its whole block beyond the limit.
        capacity = int((lengths + limits).max()) + n_heads
        self.capacity = self.length = capacity  # length: slots that attention reads
        self.steps_per_check, self.on_cpu = STEPS_PER_CHECK[device.type], device.type == "cpu"
        self.model = IncrementalModel(model, n_heads, batch, capacity)
        self.progress = Progress(
            lengths.to(device),
            limits.to(device),
            n_heads,
            None if end_tokens is None else end_tokens.to(device),
        )
        self.drafts = self.progress.block[:, 1:]
        self.output = self.progress.output.unbind()
        self.reported = [0] * batch
        # What judges a step's rows, and what appends its result.
        self.judge: tuple[Acceptance, BoundKernel] | None = None
        # All that a step calls, where that is kernels alone.
        self.whole_step: BoundKernel | None = None
        self.draft_logits: Tensor | None = None
        self.draws: list[Draw] = []
        if n_heads > 1 and torch.as_tensor(sampling["temperature"]).any():
            shape = (batch, n_heads - 1, model.config.vocab_size)
            self.draft_logits = torch.zeros(shape, dtype=self.model.dtype, device=device)
            self.draws = [
                prepare_sample(
                    self.draft_logits[:, i],
                    self.drafts[:, i],
                    i,
                    seed=self.seed,
                    position=self.progress.position,
                    **sampling,
                )
                for i in range(n_heads - 1)
            ]

    def prefill(self) -> None:
        """Run the prompts in chunks, then emit each sequence's first token and first drafts."""
        tokens = torch.nn.utils.rnn.pad_sequence(self.prompts, batch_first=True)
        last = self.progress.prompt_length - 1
        picked: list[Tensor] = []
        for begin in range(0, tokens.shape[1], PREFILL_CHUNK):
            chunk = tokens[:, begin : begin + PREFILL_CHUNK]
            start = torch.full_like(last, begin)
            rows = self.model.rows(start, chunk.shape[1], begin + chunk.shape[1])
            outputs = self.model.forward(chunk, rows)
            row = last - begin
            here = ((row >= 0) & (row < chunk.shape[1]))[:, None]
            new = [pick(x, row.clamp(0, chunk.shape[1] - 1)) for x in outputs]
            picked = [torch.where(here, a, b) for a, b in zip(new, picked or new, strict=True)]
        trunk, hidden = picked
        self.commit(self.model.logits(hidden[:, None]), trunk[:, None])

    def step(self) -> None:
        """One forward over the last token and its drafts, then `commit`."""
        if self.judge and self.whole_step:
            # A fault is in the sampling arguments, which are the draws' too.
            self.judge[0].check(self.whole_step())
            return
        rows = self.model.rows(self.progress.start, self.width, self.length)
        trunk, logits = self.model.step(self.progress.block, rows)
        accept, append = self.commit(logits, trunk)
        draws = [draw.kernel for draw in self.draws]
        self.whole_step = self.model.repeated([accept.kernel, append], draws)

    def commit(self, logits: Tensor, trunk: Tensor) -> tuple[Acceptance, BoundKernel]:
        """Judge the drafts by head 0's `logits` (B, S, V), emit tokens, draft the next block.

        Returns what judged and what appended.
        """
        if self.judge is None or self.judge[0].target_logits is not logits:
            judged = logits.shape[1] - 1
            accept = prepare_acceptance(
                logits,
                self.drafts[:, :judged],
                draft_logits=None if self.draft_logits is None else self.draft_logits[:, :judged],
                rule=self.rule,
                seed=self.seed,
                position=self.progress.position,
                **self.sampling,
            )
            self.judge = (accept, self.progress.bind_commit(accept.result))
        accept, append = self.judge
        accept()
        append()
        if self.width > 1:
            self.draft(trunk)
        return self.judge

    def draft(self, trunk: Tensor) -> None:
        """Draft the next block from the trunk's output `trunk` (B, S, dim) at the last row kept."""
        progress = self.progress
        row = self.model.rows(progress.draft_start, 1, self.length)
        if self.draft_logits is None:
            self.model.draft_logits(trunk, progress.row, row, drafts=self.drafts)
            return
        self.model.draft_logits(trunk, progress.row, row, out=self.draft_logits)
        for draw in self.draws:
            draw()

    def check(self, on_tokens: Callable[[int, Tensor], object] | None) -> bool:
        """Report new tokens; whether any sequence goes on. Waits for the device."""
        produced, position, live = self.progress.read()
        if on_tokens is not None:
            for b, (begin, end) in enumerate(zip(self.reported, produced, strict=True)):
                if end > begin:
                    self.reported[b] = end
                    tokens = self.output[b][begin:end]
                    on_tokens(b, tokens if self.on_cpu else tokens.cpu())
        longest = max((p for p, goes_on in zip(position, live, strict=True) if goes_on), default=0)
        if self.on_cpu:
            # Attention need not read slots that no live sequence will have reached.
            reach = longest + self.width * self.steps_per_check - 1
            self.length = min(reach, self.capacity)
        return longest > 0

    def result(self, started: float) -> GenerateResult:
        """Cut the output to what each sequence produced."""
        progress = self.progress
        if progress.stuck.any():
            bad = progress.stuck.nonzero().flatten().tolist()
            raise RuntimeError(f"the model's logits are not finite for prompts {bad}")
        produced, forwards = progress.read()[0], progress.forwards.tolist()
        steps = max(1, sum(forwards) - len(forwards))  # the prompt's forward has no drafts
        stats = GenerateStats(
            forwards=forwards,
            tokens_per_forward=sum(produced) / sum(forwards),
            acceptance=[count / steps for count in progress.accepted.tolist()],
            seconds=time.perf_counter() - started,
        )
        return GenerateResult(
            [row[:n].cpu() for row, n in zip(progress.output, produced, strict=True)],
            [row[:n].cpu() for row, n in zip(progress.drafted, produced, strict=True)],
            stats,
        )
