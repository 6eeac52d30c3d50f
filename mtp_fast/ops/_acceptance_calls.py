"""The kernels of acceptance and sampling: checks of their arguments, and calls that are ready.

A call holds what the kernel's addresses point to, so that it can be made again for every step of a
generation, on what the tensors then hold.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_fast.ops import _common
from mtp_fast.ops._sampling_arguments import (
    SAMPLING_NAMES,
    Sampling,
    addresses,
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


def check_acceptance(
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


def check_draw(
    logits: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor | None,
    top_p: float | Tensor | None,
    min_p: float | Tensor | None,
    seed: int | Tensor,
    position: int | Tensor | None,
    index: int,
) -> tuple[Tensor, Sampling]:
    """The logits and the sampling arguments of `sample` as `Draw` takes them."""
    logits = _check_logits("logits", logits, 2, "(B, V)")
    sampling = check_sampling(logits, temperature, top_k, top_p, min_p, seed, position)
    if not 0 <= check_index("index", index) < 2**32:
        raise ValueError(f"index: expected an integer in [0, 2^32), got {index}")
    return logits, sampling


class Acceptance:
    """A call of the kernel whose arguments are checked, with the memory for its result.

    Attributes
    ----------
    target_logits : Tensor
        What is judged.
    result : AcceptResult
        Of the last call.
    kernel : BoundKernel
        The call itself; `check` takes what it returns.
    """

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
        self.result = AcceptResult(tokens, num_tokens, num_accepted, logprobs)
        self._sampling, self._num_draft = sampling, num_draft
        # What the addresses point to must live as long as they do.
        self.target_logits = target_logits
        self._owned = (draft_tokens, draft_logits, exchange)
        self.kernel = _common.bind_kernel(
            "speculative_accept",
            target_logits,
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
        self.check(self.kernel())
        return self.result

    def check(self, fault: tuple[str, int] | None) -> None:
        """Raise ValueError for what `kernel` found out of range."""
        if fault is not None and fault[0]:
            names, values = (*SAMPLING_NAMES, "num_draft"), (*self._sampling, self._num_draft)
            raise_fault(fault, names, values)


class Draw:
    """A call of the sampling kernel, `kernel`, whose arguments are checked."""

    def __init__(self, logits: Tensor, tokens: Tensor, sampling: Sampling, index: int) -> None:
        batch, vocab = logits.shape
        exchange = _exchange(logits, batch)
        self._sampling = sampling
        self._owned = (logits, tokens, exchange)
        self.kernel = _common.bind_kernel(
            "sample",
            logits,
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
        fault = self.kernel()
        if fault is not None and fault[0]:
            raise_fault(fault, SAMPLING_NAMES, self._sampling)


def _exchange(logits: Tensor, batch: int) -> Tensor | None:
    """Memory through which blocks on a GPU that share the one sequence of a batch exchange."""
    if batch != 1 or not _common.on_cuda(logits):
        return None
    size = _common.call_kernel("acceptance_exchange", logits, batch, logits.shape[-1])
    return torch.empty(size, dtype=torch.uint8, device=logits.device) if size else None
