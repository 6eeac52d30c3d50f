"""Cross-entropy through a linear layer, for one or several heads, without all the logits at once.

The gradients are made in the forward pass, chunk by chunk (mtp_fast/ops/chunked_loss.py); the
backward pass only scales them. Two conventions keep 16-bit gradients in range and exact. The
gradient of a logit is stored without the reduction's denominator (p - onehot is of order 1; p / N
would underflow in float16); one factor, `scale`, is applied in the backward pass together with the
upstream gradient. And d(weight) is summed over the chunks in float32.
"""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from mtp_fast.ops import _common
from mtp_fast.ops._common import check_tensor
from mtp_fast.ops._loss_arguments import (
    Reduction,
    RowTerms,
    check_chunk_bytes,
    check_linear,
    check_num_items,
    check_reduction,
    check_target,
    check_target_range,
    check_terms,
    check_weight,
    mean_denominator,
    reciprocal,
)
from mtp_fast.ops.chunked_loss import Arguments, scaled, sweep
from mtp_fast.ops.cross_entropy import CrossEntropyStats, refuse_double_backward


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Any,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    return_stats: Literal[True],
    **options: Any,
) -> tuple[Tensor, CrossEntropyStats]: ...


def linear_cross_entropy(  # type: ignore[misc]  # overloads: every option goes with both
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    check_targets: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, CrossEntropyStats]:
    """Cross-entropy of ``input @ linear_weight.T + linear_bias``, a chunk of rows at a time.

    A drop-in for `torch.nn.functional.linear_cross_entropy` on the arguments they share. Under
    autocast the products run in its dtype; each gradient comes back in its own tensor's dtype.

    Parameters
    ----------
    input : Tensor
        (..., d), float32, bfloat16 or float16.
    linear_weight : Tensor
        (V, d), the dtype of `input` (any under autocast).
    target : Tensor
        (...), int64 or int32: class ids in [0, V), or `ignore_index`. On the CPU ignored rows cost
        no products.
    linear_bias : Tensor, optional
        (V,), the dtype of `linear_weight`. -inf masks a class.
    weight : Tensor, optional
        (V,), floating point: class weights a.
    reduction : {"mean", "sum", "none"}
        "mean" divides by the sum of token_weight * weight[target] over the rows that count.
        "none" keeps no gradients: its backward pass makes the logits once more.
    ignore_index : int, optional
        Rows with this target have loss 0 and gradient 0; None means -100.
    label_smoothing : float
        In [0, 1].
    token_weight : Tensor, optional
        (...), floating point: weight w of each row's loss.
    num_items : number or 0-d tensor, optional
        Replaces the denominator of "mean" (gradient accumulation, data parallel).
    z_loss : float
        Coefficient of lse ** 2.
    softcap : float, optional
        c > 0: the logits become c * tanh(logits / c).
    chunk_bytes : int, optional
        Budget for the buffer of logits, in bytes; at least one row is made at a time. The default
        is 256 MiB on the CPU; on CUDA max(4096, 2**22 / d) rows within 256 MiB and 2 GiB, halved
        until it is at most a quarter of the memory that is unused when the op runs (which is not
        asked for in the capture of a CUDA graph). d(weight) is summed chunk by chunk: set the
        budget where it must be the same to the bit on a device that may be nearly full.
    check_targets : bool
        Raise for targets out of range on CUDA too, which synchronises.
    return_stats : bool
        Return (loss, `CrossEntropyStats`).

    Returns
    -------
    Tensor or (Tensor, CrossEntropyStats)
        The loss, float32: 0-d, or (...) for "none". A mean over no rows is 0.

    Raises
    ------
    TypeError, ValueError
        An argument of the wrong type, dtype, shape, device or range.
    IndexError
        A target out of range, on the CPU. On CUDA the row's loss is NaN (see `check_targets`).
    RuntimeError
        ``backward(create_graph=True)``: the op is once differentiable.

    Notes
    -----
    For one row with logits z, target y, e = `label_smoothing` and lse = logsumexp(z) the loss is
    w * [(1 - e) * a_y * (lse - z_y) + e / V * sum_v a_v * (lse - z_v) + z_loss * lse ** 2].
    """
    check_tensor("input", input)
    if input.dim() < 1:
        raise ValueError(f"input: expected shape (..., d), got {tuple(input.shape)}")
    compute_dtype = check_linear("input", input, linear_weight, linear_bias)
    check_target("target", target, input.shape[:-1], "input.shape[:-1]", "input", input)
    check_reduction(reduction, num_items, ("mean", "sum", "none"))
    terms = check_terms(ignore_index, label_smoothing, z_loss, softcap)
    vocab = linear_weight.shape[0]
    class_weight = check_weight("weight", weight, (vocab,), "(V,)", "input", input)
    row_weight = check_weight(
        "token_weight", token_weight, target.shape, "target.shape", "input", input
    )
    out = run_linear_cross_entropy(
        [input.reshape(1, -1, input.shape[-1])],
        linear_weight,
        linear_bias,
        target.reshape(1, -1),
        class_weight=class_weight,
        token_weight=None if row_weight is None else row_weight.reshape(1, -1),
        num_items=check_num_items(num_items, 1, input.device),
        shift=0,
        reduction=reduction,
        terms=terms,
        compute_dtype=compute_dtype,
        chunk_bytes=check_chunk_bytes(chunk_bytes),
        check_targets=check_targets,
        want_stats=return_stats,
    )
    loss = out.loss.reshape(target.shape) if reduction == "none" else out.loss
    if not return_stats:
        return loss
    return loss, CrossEntropyStats(
        out.lse.reshape(target.shape), out.correct.reshape(target.shape), out.num_valid[0]
    )


class Output(NamedTuple):
    """What the op returns; n heads, B * T rows each."""

    loss: Tensor
    """float32: 0-d, or (n, B * T) for "none"."""
    head_loss: Tensor
    """(n,), float32: each head's own loss, before head weights; empty for "none"."""
    num_valid: Tensor
    """(n,), int64"""
    lse: Tensor
    """(n, B * T), float32; empty unless asked for, and so is `correct`."""
    correct: Tensor
    """(n, B * T), bool"""
    d_hidden: Tensor
    """(n, B, T, d), the products' dtype, without `scale`; empty where no gradient is due."""
    d_weight: Tensor
    """(V, d), float32, without `scale`; empty likewise."""
    d_bias: Tensor
    """(V,), float32, without `scale`; empty likewise."""
    scale: Tensor
    """0-d, float32: what all gradients are to be multiplied by."""


def run_linear_cross_entropy(
    hidden: list[Tensor],  # n tensors (B, T, d), or one (n, B, T, d)
    linear_weight: Tensor,  # (V, d)
    linear_bias: Tensor | None,  # (V,)
    labels: Tensor,  # (B, T); head k at t is scored on labels[:, t + shift + k]
    *,
    class_weight: Tensor | None,  # (V,), float32
    token_weight: Tensor | None,  # (B, T), float32, aligned with labels
    num_items: Tensor | None,  # (n,), float32
    shift: int,
    reduction: str,
    terms: RowTerms,
    compute_dtype: torch.dtype,
    chunk_bytes: int | None,
    check_targets: bool,
    want_stats: bool,
    document_ids: Tensor | None = None,  # (B, T)
    head_weights: Tensor | None = None,  # (n,), float32
) -> Output:
    """Call the op with checked arguments."""
    recording = torch.is_grad_enabled()
    needs_grad = [
        recording and any(h.requires_grad for h in hidden),
        recording and linear_weight.requires_grad,
        recording and linear_bias is not None and linear_bias.requires_grad,
    ]
    out = torch.ops.mtp_fast.linear_cross_entropy(
        hidden,
        linear_weight,
        linear_bias,
        labels,
        document_ids,
        class_weight,
        token_weight,
        head_weights,
        num_items,
        shift,
        reduction,
        *terms,
        compute_dtype,
        chunk_bytes,
        check_targets,
        want_stats,
        needs_grad,
    )
    return Output(*out)


# The op.

_INPUTS = (
    "Tensor[] hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? document_ids, "
    "Tensor? class_weight, Tensor? token_weight, Tensor? head_weights, Tensor? num_items, "
    "int shift, str reduction, int ignore_index, float label_smoothing, float z_loss, "
    "float softcap, ScalarType compute_dtype, int? chunk_bytes"
)
torch.library.define(
    "mtp_fast::linear_cross_entropy",
    f"({_INPUTS}, bool check_targets, bool want_stats, bool[] needs_grad) -> (Tensor loss, "
    "Tensor head_loss, Tensor num_valid, Tensor lse, Tensor correct, Tensor d_hidden, "
    "Tensor d_weight, Tensor d_bias, Tensor scale)",
)
torch.library.define(
    "mtp_fast::linear_cross_entropy_backward",
    f"(Tensor grad_loss, {_INPUTS}, bool[] needs_grad) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "mtp_fast::scale_gradient", "(Tensor gradient, Tensor factor, ScalarType dtype) -> Tensor"
)


@torch.library.impl("mtp_fast::linear_cross_entropy", ("CPU", "CUDA"))
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, check_targets, want_stats, needs_grad = arguments
    a = Arguments(*inputs)
    name = "labels" if a.shift else "target"
    if check_targets or not _common.on_cuda(a.weight):
        check_target_range(name, a.labels[:, a.shift :], a.ignore_index, a.weight.shape[0])
    num_valid, denominators = [], []
    for head in range(a.n):
        target = a.targets(head)
        valid = target != a.ignore_index
        num_valid.append(valid.sum())
        denominators.append(mean_denominator(target, valid, a.row_weights(head), a.class_weight))
    counts = _counts(a, num_valid)

    rows = a.weight.new_zeros((a.n, a.labels.numel()), dtype=torch.float32)
    loss = rows
    lse, correct = (
        (torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool))
        if want_stats
        else (rows.new_empty(0), rows.new_empty(0, dtype=torch.bool))
    )
    outputs = (loss, lse, correct) if want_stats else (loss,)
    if a.reduction == "none":
        gradients = sweep(a, counts, [False] * 3, None, outputs)
        head_loss, scale = rows.new_empty(0), rows.new_ones(())
    else:
        to_head_loss = rows.new_ones(a.n)
        if a.reduction == "mean":
            to_head_loss = reciprocal(
                torch.stack(denominators) if a.num_items is None else a.num_items
            )
        to_loss = to_head_loss if a.head_weights is None else to_head_loss * a.head_weights
        scale, row_grad = _factor_out(to_loss[:, None].expand_as(rows))
        gradients = sweep(a, counts, needs_grad, row_grad, outputs)
        head_loss = loss.sum(1)
        loss = (head_loss * to_loss).sum()
        head_loss = head_loss * to_head_loss
    return loss, head_loss, torch.stack(num_valid), lse, correct, *gradients, scale


def _counts(a: Arguments, num_valid: list[Tensor]) -> list[int]:
    """How many rows of each head to sweep over.

    On the CPU those that are not ignored. On CUDA all of them: counting would wait for the device.
    """
    if _common.on_cuda(a.weight):
        return [a.labels.numel()] * a.n
    return [int(count) for count in num_valid]


def _factor_out(row_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Split upstream gradients into one factor and the rest, of order 1."""
    scale = row_grad.abs().amax() if row_grad.numel() else row_grad.new_zeros(())
    return scale, row_grad * reciprocal(scale)


@torch.library.impl("mtp_fast::linear_cross_entropy_backward", ("CPU", "CUDA"))
def _backward_of_none(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, needs_grad = arguments
    a = Arguments(*inputs)
    counts = _counts(a, [(a.targets(head) != a.ignore_index).sum() for head in range(a.n)])
    scale, row_grad = _factor_out(grad_loss)
    d_hidden, d_weight, d_bias = sweep(a, counts, needs_grad, row_grad)
    return (
        scaled(d_hidden, scale, a.hidden[0].dtype),
        scaled(d_weight, scale, a.weight.dtype),
        scaled(d_bias, scale, a.weight.dtype),
    )


torch.library.impl("mtp_fast::scale_gradient", ("CPU", "CUDA"))(scaled)


def _gradient_shapes(a: Arguments, needs_grad: list[bool]) -> list[tuple[int, ...]]:
    vocab, dim = a.weight.shape
    shapes = ((a.n, *a.labels.shape, dim), (vocab, dim), (vocab,))
    return [shape if due else (0,) for shape, due in zip(shapes, needs_grad, strict=True)]


@torch.library.register_fake("mtp_fast::linear_cross_entropy")
def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, _, want_stats, needs_grad = arguments
    a = Arguments(*inputs)
    none = a.reduction == "none"
    rows = (a.n, a.labels.numel())
    stats = rows if want_stats else (0,)
    d_hidden, d_weight, d_bias = _gradient_shapes(a, [False] * 3 if none else needs_grad)
    empty = a.weight.new_empty
    return (
        empty(rows if none else (), dtype=torch.float32),
        empty((0,) if none else (a.n,), dtype=torch.float32),
        empty((a.n,), dtype=torch.int64),
        empty(stats, dtype=torch.float32),
        empty(stats, dtype=torch.bool),
        empty(d_hidden, dtype=a.compute_dtype),
        empty(d_weight, dtype=torch.float32),
        empty(d_bias, dtype=torch.float32),
        empty((), dtype=torch.float32),
    )


@torch.library.register_fake("mtp_fast::linear_cross_entropy_backward")
def _backward_fake(grad_loss: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, needs_grad = arguments
    a = Arguments(*inputs)
    d_hidden, d_weight, d_bias = _gradient_shapes(a, needs_grad)
    of_weight = a.weight.new_empty
    return a.hidden[0].new_empty(d_hidden), of_weight(d_weight), of_weight(d_bias)


@torch.library.register_fake("mtp_fast::scale_gradient")
def _scale_gradient_fake(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *op_inputs, _, _, needs_grad = inputs
    a = Arguments(*op_inputs)
    ctx.heads, ctx.stacked = len(a.hidden), a.stacked
    ctx.needs_grad, ctx.reduction = needs_grad, a.reduction
    ctx.dtypes = (a.hidden[0].dtype, a.weight.dtype, a.weight.dtype)
    if a.reduction == "none":
        first_option = Arguments._fields.index("shift")
        ctx.options = a[first_option:]
        ctx.save_for_backward(*a.hidden, *a[1:first_option])
    else:
        ctx.save_for_backward(*output[-4:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, grad_loss: Tensor | None, *unused: None) -> tuple[Any, ...]:
    refuse_double_backward("linear_cross_entropy")
    if grad_loss is None:
        return [None] * ctx.heads, *[None] * 19
    if ctx.reduction == "none":
        hidden, tensors = ctx.saved_tensors[: ctx.heads], ctx.saved_tensors[ctx.heads :]
        gradients = torch.ops.mtp_fast.linear_cross_entropy_backward(
            grad_loss, list(hidden), *tensors, *ctx.options, ctx.needs_grad
        )
    else:
        *unscaled, scale = ctx.saved_tensors
        gradients = tuple(
            torch.ops.mtp_fast.scale_gradient(gradient, grad_loss * scale, dtype)
            for gradient, dtype in zip(unscaled, ctx.dtypes, strict=True)
        )
    d_hidden, d_weight, d_bias = (
        gradient if due else None for gradient, due in zip(gradients, ctx.needs_grad, strict=True)
    )
    # One gradient a tensor of the list `hidden`.
    if d_hidden is None:
        of_hidden: list[Tensor | None] = [None] * ctx.heads
    else:
        of_hidden = [d_hidden] if ctx.stacked else list(d_hidden.unbind())
    return of_hidden, d_weight, d_bias, *[None] * 17


torch.library.register_autograd(
    "mtp_fast::linear_cross_entropy", _autograd, setup_context=_setup_context
)
