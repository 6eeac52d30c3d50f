"""The acceptance step of speculative decoding, and the sampler that shares its randomness.

Both take raw logits. In eager mode they validate, call the kernel and return; under torch.compile
they are the registered ops ``mtp_fast::speculative_accept`` and ``mtp_fast::sample``.
"""

import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp_fast.ops import _common
from mtp_fast.ops._sampling_arguments import (
    SAMPLING_NAMES,
    Sampling,
    addresses,
    as_tensors,
    check_index,
    check_per_sequence,
    check_sampling,
    raise_fault,
)

_RULES = {"exact": 0, "block": 1, "typical": 2}


class AcceptResult(NamedTuple):
    """What `speculative_accept` returns.

    Attributes
    ----------
    tokens : Tensor
        (B, K+1) int64: the tokens emitted, padded with `pad_token_id`.
    num_tokens : Tensor
        (B,) int32: how many tokens are emitted.
    num_accepted : Tensor
        (B,) int32: how many of them are accepted drafts, which is what a KV cache keeps. One less
        than `num_tokens`, or equal to it where the last accepted draft is the EOS token or the row
        after it has no finite logit.
    logprobs : Tensor or None
        (B, K+1) float32: log-softmax of the raw logits (temperature 1, no filters) at each emitted
        token, 0 where padded.
    """

    tokens: Tensor
    num_tokens: Tensor
    num_accepted: Tensor
    logprobs: Tensor | None


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
    checked = _checked(
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


def prepare_acceptance(
    target_logits: Tensor, draft_tokens: Tensor, **keywords: Any
) -> "Acceptance":
    """`speculative_accept` of tensors that stay where they are, to be called for every step.

    A decode step is short enough for the checks and the result's tensors to count. Parameters and
    errors are those of `speculative_accept`; what needs another dtype, or has no contiguous rows,
    is copied now and not looked at again.
    """
    bound = inspect.signature(speculative_accept).bind(target_logits, draft_tokens, **keywords)
    bound.apply_defaults()
    return Acceptance(*_checked(**bound.arguments))


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
    logits = _check_logits("logits", logits, 2, "(B, V)")
    sampling = check_sampling(logits, temperature, top_k, top_p, min_p, seed, position)
    if not 0 <= check_index("index", index) < 2**32:
        raise ValueError(f"index: expected an integer in [0, 2^32), got {index}")
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.mtp_fast.sample(
            logits.detach(), *as_tensors(sampling, logits), index
        )
        return result
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    Draw(logits, tokens, sampling, index)()
    return tokens


def prepare_sample(logits: Tensor, tokens: Tensor, index: int, **sampling: Any) -> "Draw":
    """`sample` of logits that stay where they are, to be called for every step.

    Parameters and errors are those of `sample`, all but `logits` given; the tokens go to the int64
    `tokens` (B,), of any stride.
    """
    logits = _check_logits("logits", logits, 2, "(B, V)")
    return Draw(logits, tokens, check_sampling(logits, **sampling), index)


def _check_logits(name: str, logits: Tensor, dims: int, meaning: str) -> Tensor:
    _common.check_tensor(name, logits)
    _common.check_float_dtype(name, logits)
    if logits.dim() != dims:
        raise ValueError(f"{name}: expected shape {meaning}, got {tuple(logits.shape)}")
    if logits.shape[-1] == 0:
        raise ValueError(f"{name}: expected V >= 1 in {meaning}, got {tuple(logits.shape)}")
    if logits.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: expected a CPU or CUDA tensor, got one on {logits.device}")
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _checked(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None,
    num_draft: Tensor | None,
    temperature: float | Tensor,
    top_k: int | Tensor | None,
    top_p: float | Tensor | None,
    min_p: float | Tensor | None,
    rule: str,
    typical_epsilon: float,
    typical_delta: float,
    seed: int | Tensor,
    position: int | Tensor | None,
    eos_token_id: int | None,
    pad_token_id: int,
    return_logprobs: bool,
) -> tuple[
    Tensor, Tensor, Tensor | None, Tensor | None, Sampling, str, float, float, int, int, bool
]:
    """The arguments of `speculative_accept` as `Acceptance` takes them."""
    target_logits = _check_logits("target_logits", target_logits, 3, "(B, K+1, V)")
    batch, rows, vocab = target_logits.shape
    if rows == 0:
        raise ValueError("target_logits: expected K+1 >= 1 rows in (B, K+1, V), got 0")
    width = rows - 1
    _common.check_tensor("draft_tokens", draft_tokens)
    _common.check_integer_dtype("draft_tokens", draft_tokens)
    _common.check_shape("draft_tokens", draft_tokens, (batch, width), "(B, K)")
    _common.check_device("draft_tokens", draft_tokens, "target_logits", target_logits)
    if draft_logits is not None:
        draft_logits = _check_logits("draft_logits", draft_logits, 3, "(B, K, V)")
        _common.check_shape("draft_logits", draft_logits, (batch, width, vocab), "(B, K, V)")
        _common.check_float_dtype("draft_logits", draft_logits, (target_logits.dtype,))
        _common.check_device("draft_logits", draft_logits, "target_logits", target_logits)
    if num_draft is not None:
        num_draft = check_per_sequence("num_draft", num_draft, target_logits, torch.int64)
    if rule not in _RULES:
        raise ValueError(f'rule: expected "exact", "block" or "typical", got {rule!r}')
    if not 0.0 <= typical_epsilon <= 1.0:
        raise ValueError(f"typical_epsilon: expected a number in [0, 1], got {typical_epsilon}")
    if not 0.0 <= typical_delta < math.inf:
        raise ValueError(f"typical_delta: expected a finite number >= 0, got {typical_delta}")
    sampling = check_sampling(target_logits, temperature, top_k, top_p, min_p, seed, position)
    eos = -1 if eos_token_id is None else check_index("eos_token_id", eos_token_id)
    check_index("pad_token_id", pad_token_id)
    return (
        target_logits,
        draft_tokens,
        draft_logits,
        num_draft,
        sampling,
        rule,
        typical_epsilon,
        typical_delta,
        eos,
        pad_token_id,
        return_logprobs,
    )


class Acceptance:
    """A call of the kernel whose arguments are checked, with the memory for its result."""

    def __init__(
        self,
        target_logits: Tensor,
        draft_tokens: Tensor,
        draft_logits: Tensor | None,
        num_draft: Tensor | None,
        sampling: Sampling,
        rule: str,
        typical_epsilon: float,
        typical_delta: float,
        eos_token_id: int,
        pad_token_id: int,
        return_logprobs: bool,
    ) -> None:
        batch, rows, vocab = target_logits.shape
        device = target_logits.device
        draft_tokens = draft_tokens.to(torch.int64)
        if draft_tokens.stride(1) != 1:
            draft_tokens = draft_tokens.contiguous()
        tokens = torch.empty((batch, rows), dtype=torch.int64, device=device)
        num_tokens = torch.empty(batch, dtype=torch.int32, device=device)
        num_accepted = torch.empty(batch, dtype=torch.int32, device=device)
        logprobs = (
            torch.empty((batch, rows), dtype=torch.float32, device=device)
            if return_logprobs
            else None
        )
        draft = (0, 0, 0)
        if draft_logits is not None:
            draft = (draft_logits.data_ptr(), draft_logits.stride(0), draft_logits.stride(1))
        exchange = _exchange(target_logits, batch)
        self._result = AcceptResult(tokens, num_tokens, num_accepted, logprobs)
        self._sampling, self._num_draft = sampling, num_draft
        # What the addresses point to must live as long as they do.
        self.target_logits = target_logits
        self._owned = (draft_tokens, draft_logits, exchange)
        self._arguments = (
            _common.DTYPE_CODES[target_logits.dtype],
            batch,
            rows - 1,
            vocab,
            target_logits.data_ptr(),
            target_logits.stride(0),
            target_logits.stride(1),
            *draft,
            draft_tokens.data_ptr(),
            draft_tokens.stride(0),
            0 if num_draft is None else num_draft.data_ptr(),
            *addresses(sampling),
            _RULES[rule],
            typical_epsilon,
            typical_delta,
            eos_token_id,
            pad_token_id,
            tokens.data_ptr(),
            num_tokens.data_ptr(),
            num_accepted.data_ptr(),
            0 if logprobs is None else logprobs.data_ptr(),
            0 if exchange is None else exchange.data_ptr(),
        )

    def __call__(self) -> AcceptResult:
        """Judge what the tensors hold now; the result is overwritten by the next call."""
        fault = _common.call_kernel("speculative_accept", self.target_logits, *self._arguments)
        if fault is not None and fault[0]:
            names, values = (*SAMPLING_NAMES, "num_draft"), (*self._sampling, self._num_draft)
            raise_fault(fault, names, values)
        return self._result


class Draw:
    """A call of the sampling kernel whose arguments are checked."""

    def __init__(self, logits: Tensor, tokens: Tensor, sampling: Sampling, index: int) -> None:
        batch, vocab = logits.shape
        exchange = _exchange(logits, batch)
        self._sampling = sampling
        self._owned = (logits, tokens, exchange)
        self._arguments = (
            _common.DTYPE_CODES[logits.dtype],
            batch,
            vocab,
            logits.data_ptr(),
            logits.stride(0),
            *addresses(sampling),
            index,
            tokens.data_ptr(),
            tokens.stride(0),
            0 if exchange is None else exchange.data_ptr(),
        )

    def __call__(self) -> None:
        """Write a token for each row of what the logits are now."""
        fault = _common.call_kernel("sample", self._owned[0], *self._arguments)
        if fault is not None and fault[0]:
            raise_fault(fault, SAMPLING_NAMES, self._sampling)


def _exchange(logits: Tensor, batch: int) -> Tensor | None:
    """Memory through which blocks on a GPU that share the one sequence of a batch exchange."""
    if batch != 1 or not _common.on_cuda(logits):
        return None
    size = _common.call_kernel("acceptance_exchange", logits, batch, logits.shape[-1])
    return torch.empty(size, dtype=torch.uint8, device=logits.device) if size else None


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
