"""The acceptance step of speculative decoding, and the sampler that shares its randomness.

Both take raw logits. In eager mode they validate, call the kernel and return; under torch.compile
they are the registered ops ``mtp_fast::speculative_accept`` and ``mtp_fast::sample``.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from mtp_fast.ops._acceptance_calls import (
    Acceptance,
    AcceptResult,
    Draw,
    check_acceptance,
    check_draw,
)
from mtp_fast.ops._sampling_arguments import SAMPLING_NAMES, as_tensors

__all__ = [
    "AcceptResult",
    "prepare_acceptance",
    "prepare_sample",
    "sample",
    "speculative_accept",
]


def speculative_accept(
    target_logits: Tensor,
    draft_tokens: Tensor,
    *,
    draft_logits: Tensor | None = None,
    num_draft: Tensor | None = None,
    temperature: float | Tensor = 0.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    rule: str = "exact",
    typical_epsilon: float = 0.3,
    typical_delta: float = 0.09,
    seed: int | Tensor = 0,
    position: int | Tensor | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int = -1,
    return_logprobs: bool = False,
) -> AcceptResult:
    """Judge drafted tokens by the target's logits and emit what is accepted plus one more token.

    Rules "exact" and "block" leave the target's distribution unchanged, whatever the drafts are.
    The result for a sequence depends on its own arguments, seed and position alone: not on its
    place in the batch, nor on the number of threads.

    Parameters
    ----------
    target_logits : Tensor
        (B, K+1, V) float32, bfloat16 or float16: the target's raw logits. Row i judges draft i;
        the row after the last draft is the bonus row. NaN counts as -inf, +inf as the largest
        finite number. Emission stops before a row without a finite logit.
    draft_tokens : Tensor
        (B, K) int64 or int32. An id outside [0, V) ends its sequence's drafts there.
    draft_logits : Tensor, optional
        (B, K, V), dtype of `target_logits`: the raw logits that the drafts were sampled from, with
        the same temperature and filters. None means deterministic drafts (say, greedy ones).
    num_draft : Tensor, optional
        (B,) int64 or int32 in [0, K]: the number of drafts of each sequence. Default: K.
    temperature : float or Tensor
        Number or (B,). 0 is greedy, whatever the rule.
    top_k, top_p, min_p : number or Tensor, optional
        Numbers or (B,), applied to target and draft in this order after the temperature, each to
        the renormalised result of the one before. top_k 0 is off; top_p keeps the smallest prefix
        whose mass reaches it; min_p is relative to the largest probability. Ties are kept on the
        lowest ids.
    rule : {"exact", "block", "typical"}
        Token-wise rejection sampling (Leviathan et al. 2023, Chen et al. 2023), block verification
        (Sun et al. 2024, arXiv 2403.10444: never accepts fewer tokens), or typical acceptance
        (Cai et al. 2024, arXiv 2401.10774: a draft is accepted if
        p(draft) > min(epsilon, delta * exp(-entropy(p))); changes the distribution).
    typical_epsilon, typical_delta : float
        Of the rule "typical".
    seed : int or Tensor
        Number or (B,) int64: key of the random draws.
    position : int or Tensor, optional
        Number or (B,) int64: tokens committed before this call; it must differ from call to call
        for a given seed. Default: 0.
    eos_token_id : int, optional
        Nothing is emitted after this token.
    pad_token_id : int
        Fills `tokens` after the emitted ones.
    return_logprobs : bool
        Whether to compute `logprobs`; reads each emitted token's row once more.

    Returns
    -------
    AcceptResult
        tokens (B, K+1), num_tokens (B,), num_accepted (B,) and logprobs (B, K+1) or None.

    Raises
    ------
    TypeError
        An argument has the wrong type or dtype.
    ValueError
        A shape, device or value is not as described; the message names the argument.
    RuntimeError
        The logits are on a GPU and the build has no CUDA kernels, or CUDA refused the launch.

    Notes
    -----
    On CUDA nothing waits for the device, so values of (B,) tensors are not known to be in range: a
    sequence that has one out of it emits nothing.

    Draws come from Philox 4x32-10, keyed by (seed, position, index within the block, purpose).
    """
    checked = check_acceptance(
        target_logits,
        draft_tokens,
        draft_logits,
        num_draft,
        temperature,
        top_k,
        top_p,
        min_p,
        rule,
        typical_epsilon,
        typical_delta,
        seed,
        position,
        eos_token_id,
        pad_token_id,
        return_logprobs,
    )
    if torch.compiler.is_compiling():
        target_logits, draft_tokens, draft_logits, num_draft, sampling, *rest = checked
        tokens, num_tokens, num_accepted, logprobs = torch.ops.mtp_fast.speculative_accept(
            target_logits.detach(),
            draft_tokens,
            None if draft_logits is None else draft_logits.detach(),
            num_draft,
            *as_tensors(sampling, target_logits),
            *rest,
        )
        return AcceptResult(tokens, num_tokens, num_accepted, logprobs if return_logprobs else None)
    return Acceptance(*checked)()


def prepare_acceptance(target_logits: Tensor, draft_tokens: Tensor, **keywords: Any) -> Acceptance:
    """`speculative_accept` of tensors that stay where they are, to be called for every step.

    A decode step is short enough for the checks and the result's tensors to count. Parameters and
    errors are those of `speculative_accept`; what needs another dtype, or has no contiguous rows,
    is copied now and not looked at again.
    """
    bound = inspect.signature(speculative_accept).bind(target_logits, draft_tokens, **keywords)
    bound.apply_defaults()
    return Acceptance(*check_acceptance(**bound.arguments))


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 0.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    seed: int | Tensor = 0,
    position: int | Tensor | None = None,
    index: int = 0,
) -> Tensor:
    """Sample one token from each row of logits, with draws that `speculative_accept` never uses.

    Parameters
    ----------
    logits : Tensor
        (B, V) float32, bfloat16 or float16: raw logits.
    temperature, top_k, top_p, min_p, seed, position
        As in `speculative_accept`.
    index : int
        The token's place in the block that is being drafted.

    Returns
    -------
    Tensor
        (B,) int64; -1, which `speculative_accept` takes for the end of the drafts, where a row has
        no finite logit.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `speculative_accept`.
    """
    logits, sampling = check_draw(logits, temperature, top_k, top_p, min_p, seed, position, index)
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.mtp_fast.sample(
            logits.detach(), *as_tensors(sampling, logits), index
        )
        return result
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    Draw(logits, tokens, sampling, index)()
    return tokens


def prepare_sample(logits: Tensor, tokens: Tensor, index: int, **sampling: Any) -> Draw:
    """`sample` of logits that stay where they are, to be called for every step.

    Parameters and errors are those of `sample`, all but `logits` given; the tokens go to the int64
    `tokens` (B,), of any stride.
    """
    logits, checked = check_draw(logits, index=index, **sampling)
    return Draw(logits, tokens, checked, index)


# ---- torch.library: the same ops with every per-sequence argument a (B,) tensor ----

_SAMPLING_SCHEMA = (
    "Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, Tensor position"
)
torch.library.define(
    "mtp_fast::speculative_accept",
    "(Tensor target_logits, Tensor draft_tokens, Tensor? draft_logits, Tensor? num_draft, "
    f"{_SAMPLING_SCHEMA}, str rule, float typical_epsilon, float typical_delta, "
    "int eos_token_id, int pad_token_id, bool return_logprobs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "mtp_fast::sample", f"(Tensor logits, {_SAMPLING_SCHEMA}, int index) -> Tensor"
)


@torch.library.impl("mtp_fast::speculative_accept", ("CPU", "CUDA"))
def _accept_op(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    num_draft: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    names = (
        *SAMPLING_NAMES,
        *("rule", "typical_epsilon", "typical_delta"),
        *("eos_token_id", "pad_token_id", "return_logprobs"),
    )
    result = speculative_accept(
        target_logits,
        draft_tokens,
        draft_logits=draft_logits,
        num_draft=num_draft,
        **dict(zip(names, rest, strict=True)),
    )
    logprobs = result.logprobs
    if logprobs is None:
        logprobs = torch.empty(0, dtype=torch.float32, device=target_logits.device)
    return result.tokens, result.num_tokens, result.num_accepted, logprobs


@torch.library.register_fake("mtp_fast::speculative_accept")
def _accept_fake(target_logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, rows, _ = target_logits.shape
    return_logprobs = rest[-1]
    return (
        target_logits.new_empty((batch, rows), dtype=torch.int64),
        target_logits.new_empty(batch, dtype=torch.int32),
        target_logits.new_empty(batch, dtype=torch.int32),
        target_logits.new_empty((batch, rows) if return_logprobs else 0, dtype=torch.float32),
    )


@torch.library.impl("mtp_fast::sample", ("CPU", "CUDA"))
def _sample_op(logits: Tensor, *rest: Any) -> Tensor:
    return sample(logits, **dict(zip((*SAMPLING_NAMES, "index"), rest, strict=True)))


@torch.library.register_fake("mtp_fast::sample")
def _sample_fake(logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)
