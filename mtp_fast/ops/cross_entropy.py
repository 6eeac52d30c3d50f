"""Cross-entropy of logits that the caller owns: the row kernel alone.

Also the one place that calls the kernel, for `linear_cross_entropy` and
`multi_token_cross_entropy` too.
"""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from mtp_fast.ops import _common
from mtp_fast.ops._common import DTYPE_CODES, check_float_dtype, check_tensor
from mtp_fast.ops._loss_arguments import (
    Reduction,
    RowTerms,
    check_num_items,
    check_reduction,
    check_target,
    check_target_range,
    check_terms,
    check_weight,
    mean_denominator,
    reciprocal,
)


class CrossEntropyStats(NamedTuple):
    """What the loss kernel knows about every row; detached.

    Rows whose target is `ignore_index` hold 0 and False.
    """

    lse: Tensor
    """(...), float32: logsumexp of the row's logits, after bias and softcap."""
    correct: Tensor
    """(...), bool: argmax (the lowest id among equals) is the target."""
    num_valid: Tensor
    """0-d, int64: rows that were not ignored."""


@overload
def cross_entropy(
    logits: Tensor, target: Tensor, *, return_stats: Literal[False] = False, **options: Any
) -> Tensor: ...


@overload
def cross_entropy(
    logits: Tensor, target: Tensor, *, return_stats: Literal[True], **options: Any
) -> tuple[Tensor, CrossEntropyStats]: ...


def cross_entropy(  # type: ignore[misc]  # overloads: every option goes with both
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
    check_targets: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    """Cross-entropy of logits, with statistics, in one pass over them.

    Parameters
    ----------
    logits : Tensor
        (..., V), float32, bfloat16 or float16. The last dimension is contiguous, or is copied.
    target : Tensor
        (...), int64 or int32: class ids in [0, V), or `ignore_index`.
    weight : Tensor, optional
        (V,), floating point: class weights.
    reduction : {"mean", "sum", "none"}
        "mean" divides by the sum of token_weight * weight[target] over the rows that count.
    ignore_index : int, optional
        Rows with this target have loss 0 and gradient 0; None means -100.
    label_smoothing : float
        In [0, 1].
    token_weight : Tensor, optional
        (...), floating point: weight of each row's loss.
    num_items : number or 0-d tensor, optional
        Replaces the denominator of "mean" (gradient accumulation, data parallel).
    z_loss : float
        Coefficient of lse ** 2, added to each row's loss.
    softcap : float, optional
        c > 0: the logits become c * tanh(logits / c).
    inplace_backward : bool
        Write the gradient over the logits. They hold no logits any more after the backward pass,
        and a second backward pass raises.
    check_targets : bool
        Raise for targets out of range on CUDA too, which synchronises.
    return_stats : bool
        Return (loss, `CrossEntropyStats`).

    Returns
    -------
    Tensor or (Tensor, CrossEntropyStats)
        The loss, float32: 0-d, or (...) for "none".

    Raises
    ------
    TypeError, ValueError
        An argument of the wrong type, dtype, shape, device or range.
    IndexError
        A target out of range, on the CPU. On CUDA the row's loss is NaN (see `check_targets`).
    """
    check_tensor("logits", logits)
    check_float_dtype("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape (..., V) with V > 0, got {tuple(logits.shape)}")
    vocab = logits.shape[-1]
    terms = check_terms(ignore_index, label_smoothing, z_loss, softcap)
    check_reduction(reduction, num_items, ("mean", "sum", "none"))
    check_target("target", target, logits.shape[:-1], "logits.shape[:-1]", "logits", logits)
    class_weight = check_weight("weight", weight, (vocab,), "(V,)", "logits", logits)
    row_weight = check_weight(
        "token_weight", token_weight, target.shape, "target.shape", "logits", logits
    )
    items = check_num_items(num_items, 1, logits.device)

    rows = logits.reshape(-1, vocab)
    flat_target = target.reshape(-1).to(torch.int64)
    flat_weight = None if row_weight is None else row_weight.reshape(-1)
    loss: Tensor
    loss, lse, correct, _ = torch.ops.mtp_fast.cross_entropy(
        rows, flat_target, flat_weight, class_weight, *terms, inplace_backward, check_targets
    )
    if reduction == "none":
        loss = loss.reshape(target.shape)
    else:
        loss = loss.sum()
        if reduction == "mean":
            valid = flat_target != terms.ignore_index
            count = mean_denominator(flat_target, valid, flat_weight, class_weight)
            loss = loss * reciprocal(count if items is None else items[0])
    if not return_stats:
        return loss
    num_valid = (flat_target != terms.ignore_index).sum()
    return loss, CrossEntropyStats(
        lse.reshape(target.shape), correct.reshape(target.shape), num_valid
    )


def run_rows(
    logits: Tensor,  # (rows, V), last dimension contiguous
    target: Tensor,  # (rows), int64
    terms: RowTerms,
    *,
    row_weight: Tensor | None,  # (rows), float32
    class_weight: Tensor | None,  # (V,), float32
    class_weight_sum: Tensor | None,  # from sum_of_class_weights
    grad: Tensor | None = None,  # as logits, or logits itself
    grad_output: Tensor | None = None,  # (rows), float32
    saved: Tensor | None = None,  # (rows, 4): earlier `stats`; makes the gradient alone
    workspace: Tensor | None = None,  # from row_workspace, where grad is given and saved is not
    results: tuple[Tensor, Tensor, Tensor] | None = None,  # from allocate_rows
    argmax: Tensor | None = None,  # (rows), int64: lowest id of the largest logit
    stats: Tensor | None = None,  # from allocate_stats
) -> None:
    """Call the kernel (csrc/cross_entropy/params.h).

    Without `grad` it makes `results`, `argmax` and `stats`, as far as they are given, in one pass;
    with `grad` and `saved` it makes the gradient alone, also in one pass; with `grad` only it makes
    all of them. The statistics of a row are (max, sum of exp(logit - max), target logit, sum of
    class weight * logit): those of the parts of a vocabulary merge into those of the whole, with
    which each part's gradient can be made. A target outside [0, V) has the target logit NaN; only
    while that is so, the row's loss and gradient are NaN.
    """
    loss, lse, correct = (None, None, None) if results is None else results
    _common.call_kernel(
        "cross_entropy",
        logits,
        DTYPE_CODES[logits.dtype],
        logits.data_ptr(),
        logits.stride(0),
        _pointer(grad),
        grad.stride(0) if grad is not None else 0,
        logits.shape[0],
        logits.shape[1],
        target.data_ptr(),
        _pointer(row_weight),
        _pointer(class_weight),
        _pointer(class_weight_sum),
        _pointer(grad_output),
        _pointer(saved),
        _pointer(workspace),
        _pointer(loss),
        _pointer(lse),
        _pointer(correct),
        _pointer(argmax),
        _pointer(stats),
        terms.ignore_index,
        terms.label_smoothing,
        terms.z_loss,
        terms.softcap,
    )


def allocate_rows(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, lse and correct of logits (rows, V), for `run_rows` to fill."""
    loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return loss, torch.empty_like(loss), torch.empty_like(loss, dtype=torch.bool)


def allocate_stats(logits: Tensor) -> Tensor:
    """Statistics of the rows of logits (rows, V), (rows, 4) float32, for `run_rows` to fill."""
    return logits.new_empty((logits.shape[0], 4), dtype=torch.float32)


def row_workspace(logits: Tensor) -> Tensor | None:
    """What the kernel needs beside 16-bit logits to make loss and gradient at once."""
    if logits.dtype == torch.float32 or _common.on_cuda(logits):
        return None
    return torch.empty(torch.get_num_threads(), logits.shape[1], dtype=torch.float32)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def sum_of_class_weights(class_weight: Tensor | None) -> Tensor | None:
    """What label smoothing spreads over, 0-d float32; None, for V, without weights."""
    if class_weight is None:
        return None
    return class_weight.sum(dtype=torch.float64).to(torch.float32)


# Registration. The loss comes per row; reductions are torch's own, so a backward pass arrives as
# one upstream gradient a row whatever the reduction.

torch.library.define(
    "mtp_fast::cross_entropy",
    "(Tensor logits, Tensor target, Tensor? row_weight, Tensor? class_weight, int ignore_index, "
    "float label_smoothing, float z_loss, float softcap, bool inplace_backward, "
    "bool check_targets) -> (Tensor loss, Tensor lse, Tensor correct, Tensor stats)",
)
_BACKWARD_ARGUMENTS = (
    "Tensor stats, Tensor target, Tensor? row_weight, Tensor? class_weight, int ignore_index, "
    "float label_smoothing, float z_loss, float softcap"
)
torch.library.define(
    "mtp_fast::cross_entropy_backward",
    f"(Tensor grad_loss, Tensor logits, {_BACKWARD_ARGUMENTS}) -> Tensor",
)
torch.library.define(
    "mtp_fast::cross_entropy_backward_",
    f"(Tensor grad_loss, Tensor(a!) logits, {_BACKWARD_ARGUMENTS}) -> ()",
)


@torch.library.impl("mtp_fast::cross_entropy", ("CPU", "CUDA"))
def _forward(
    logits: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    inplace_backward: bool,
    check_targets: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if check_targets or not _common.on_cuda(logits):
        check_target_range("target", target, ignore_index, logits.shape[1])
    results, stats = allocate_rows(logits), allocate_stats(logits)
    run_rows(
        _contiguous_rows(logits),
        target.contiguous(),
        RowTerms(ignore_index, label_smoothing, z_loss, softcap),
        row_weight=row_weight,
        class_weight=class_weight,
        class_weight_sum=sum_of_class_weights(class_weight),
        results=results,
        stats=stats,
    )
    return *results, stats


def _run_backward(
    grad: Tensor,
    grad_loss: Tensor,
    logits: Tensor,
    stats: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    class_weight: Tensor | None,
    *terms: Any,
) -> Tensor:
    run_rows(
        logits,
        target.contiguous(),
        RowTerms(*terms),
        row_weight=row_weight,
        class_weight=class_weight,
        class_weight_sum=sum_of_class_weights(class_weight),
        grad=grad,
        grad_output=grad_loss.contiguous(),
        saved=stats.contiguous(),
    )
    return grad


@torch.library.impl("mtp_fast::cross_entropy_backward", ("CPU", "CUDA"))
def _backward(grad_loss: Tensor, logits: Tensor, *arguments: Any) -> Tensor:
    logits = _contiguous_rows(logits)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return _run_backward(grad, grad_loss, logits, *arguments)


@torch.library.impl("mtp_fast::cross_entropy_backward_", ("CPU", "CUDA"))
def _backward_(grad_loss: Tensor, logits: Tensor, *arguments: Any) -> None:
    rows = _contiguous_rows(logits)
    _run_backward(rows, grad_loss, rows, *arguments)
    if rows is not logits:
        logits.copy_(rows)


def _contiguous_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


@torch.library.register_fake("mtp_fast::cross_entropy")
def _forward_fake(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *allocate_rows(logits), allocate_stats(logits)


@torch.library.register_fake("mtp_fast::cross_entropy_backward")
def _backward_fake(grad_loss: Tensor, logits: Tensor, *arguments: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("mtp_fast::cross_entropy_backward_")
def _backward_fake_(grad_loss: Tensor, logits: Tensor, *arguments: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, row_weight, class_weight, *terms, inplace_backward, _ = inputs
    ctx.save_for_backward(logits, output[3], target, row_weight, class_weight)
    ctx.terms, ctx.inplace = terms, inplace_backward
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_loss: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    refuse_double_backward("cross_entropy")
    logits, *tensors = ctx.saved_tensors
    grad = None
    if grad_loss is not None and ctx.needs_input_grad[0]:
        arguments = (grad_loss, logits, *tensors, *ctx.terms)
        if ctx.inplace:
            torch.ops.mtp_fast.cross_entropy_backward_(*arguments)
            # So that a second backward pass finds out that the logits are gone.
            torch.autograd.graph.increment_version(logits)
            grad = logits.detach()
        else:
            grad = torch.ops.mtp_fast.cross_entropy_backward(*arguments)
    return grad, *[None] * 9


torch.library.register_autograd("mtp_fast::cross_entropy", _autograd, setup_context=_setup_context)


def refuse_double_backward(name: str) -> None:
    """Raise in a backward pass that records a graph: the gradient has no derivative here."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"mtp_fast.{name} is once differentiable: backward(create_graph=True) is not supported"
        )
