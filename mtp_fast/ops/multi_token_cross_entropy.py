"""The loss of multi-token prediction: n heads, one unembedding, labels shifted inside the op."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from mtp_fast.ops._common import check_device, check_integer_dtype, check_shape, check_tensor
from mtp_fast.ops._loss_arguments import (
    check_chunk_bytes,
    check_linear,
    check_num_items,
    check_reduction,
    check_target,
    check_terms,
    check_weight,
)
from mtp_fast.ops.linear_cross_entropy import run_linear_cross_entropy


class MultiTokenStats(NamedTuple):
    """What the loss knows about every head; detached."""

    loss: Tensor
    """(n,), float32: each head's own loss (mean or sum), before head weights."""
    num_valid: Tensor
    """(n,), int64: predictions that counted."""
    accuracy: Tensor
    """(n,), float32: share of them whose argmax was the label; 0 where nothing counted."""


@overload
def multi_token_cross_entropy(
    hidden: Tensor | Sequence[Tensor],
    linear_weight: Tensor,
    labels: Tensor,
    *,
    return_stats: Literal[False] = False,
    **options: Any,
) -> Tensor: ...


@overload
def multi_token_cross_entropy(
    hidden: Tensor | Sequence[Tensor],
    linear_weight: Tensor,
    labels: Tensor,
    *,
    return_stats: Literal[True],
    **options: Any,
) -> tuple[Tensor, MultiTokenStats]: ...


def multi_token_cross_entropy(  # type: ignore[misc]  # overloads: every option goes with both
    hidden: Tensor | Sequence[Tensor],
    linear_weight: Tensor,
    labels: Tensor,
    *,
    document_ids: Tensor | None = None,
    head_weights: Sequence[float] | Tensor | None = None,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    check_targets: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, MultiTokenStats]:
    """Weighted sum over heads k of the cross-entropy of ``labels[:, t + 1 + k]`` at position t.

    The heads share one unembedding and one d(weight) buffer; the logits exist a chunk at a time
    (see `linear_cross_entropy`, whose semantics hold for every head). Source: Gloeckle et al.,
    "Better & Faster Large Language Models via Multi-token Prediction", arXiv 2404.19737.

    Parameters
    ----------
    hidden : sequence of Tensor, or Tensor
        n tensors (B, T, d), or one (n, B, T, d): head k's output; float32, bfloat16 or float16.
    linear_weight : Tensor
        (V, d): the shared unembedding, the dtype of `hidden` (any under autocast).
    labels : Tensor
        (B, T), int64 or int32: UNSHIFTED token ids, `ignore_index` where masked.
    document_ids : Tensor, optional
        (B, T), int64 or int32, non-decreasing in a row: a prediction whose label lies in another
        document than its position is ignored.
    head_weights : sequence of float or Tensor, optional
        (n,): default all 1, the paper's sum.
    linear_bias, weight, ignore_index, label_smoothing, z_loss, softcap, check_targets
        As in `linear_cross_entropy`.
    chunk_bytes : int, optional
        Budget for the buffer of logits, which all heads share. The default is that of
        `linear_cross_entropy`: 256 MiB on the CPU; on CUDA max(4096, 2**22 / d) rows within 256 MiB
        and 2 GiB, halved until it is at most a quarter of the memory that is unused.
    reduction : {"mean", "sum"}
        Each head's mean over its valid predictions, then the weighted sum; or the weighted sum of
        all. A head with no valid prediction contributes 0.
    token_weight : Tensor, optional
        (B, T), aligned with `labels`: weight of the token that is predicted.
    num_items : number or Tensor, optional
        0-d or (n,): replaces the denominators of "mean".
    return_stats : bool
        Return (loss, `MultiTokenStats`).

    Returns
    -------
    Tensor or (Tensor, MultiTokenStats)
        The loss, 0-d, float32.

    Raises
    ------
    TypeError, ValueError, IndexError, RuntimeError
        As `linear_cross_entropy`.
    """
    heads = _check_hidden(hidden)
    stacked = heads[0].dim() == 4
    n = heads[0].shape[0] if stacked else len(heads)
    batch_shape = heads[0].shape[-3:-1]
    compute_dtype = check_linear("hidden", heads[0], linear_weight, linear_bias)
    check_target("labels", labels, batch_shape, "(B, T)", "hidden", heads[0])
    if document_ids is not None:
        check_tensor("document_ids", document_ids)
        check_integer_dtype("document_ids", document_ids)
        check_shape("document_ids", document_ids, batch_shape, "(B, T)")
        check_device("document_ids", document_ids, "hidden", heads[0])
    check_reduction(reduction, num_items, ("mean", "sum"))
    device = labels.device
    out = run_linear_cross_entropy(
        heads,
        linear_weight,
        linear_bias,
        labels,
        document_ids=document_ids,
        class_weight=check_weight(
            "weight", weight, (linear_weight.shape[0],), "(V,)", "hidden", heads[0]
        ),
        token_weight=check_weight(
            "token_weight", token_weight, batch_shape, "(B, T)", "hidden", heads[0]
        ),
        head_weights=_check_head_weights(head_weights, n, device),
        num_items=check_num_items(num_items, n, device),
        shift=1,
        reduction=reduction,
        terms=check_terms(ignore_index, label_smoothing, z_loss, softcap),
        compute_dtype=compute_dtype,
        chunk_bytes=check_chunk_bytes(chunk_bytes),
        check_targets=check_targets,
        want_stats=return_stats,
    )
    if not return_stats:
        return out.loss
    accuracy = out.correct.sum(1) / out.num_valid.clamp(min=1)
    return out.loss, MultiTokenStats(out.head_loss, out.num_valid, accuracy)


def _check_hidden(hidden: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """n tensors of one shape (B, T, d), or one (n, B, T, d), in a list."""
    if isinstance(hidden, Tensor):
        if hidden.dim() != 4 or hidden.shape[0] == 0:
            raise ValueError(
                f"hidden: expected shape (n, B, T, d) with n > 0, or a sequence of n tensors "
                f"(B, T, d), got {tuple(hidden.shape)}"
            )
        return [hidden]
    heads = list(hidden)
    if not heads:
        raise ValueError("hidden: expected at least one head, got none")
    for k, head in enumerate(heads):
        check_tensor(f"hidden[{k}]", head)
        if head.dim() != 3:
            raise ValueError(f"hidden[{k}]: expected shape (B, T, d), got {tuple(head.shape)}")
        check_shape(f"hidden[{k}]", head, heads[0].shape, "hidden[0].shape")
        check_device(f"hidden[{k}]", head, "hidden[0]", heads[0])
        if head.dtype != heads[0].dtype:
            raise TypeError(
                f"hidden[{k}]: expected {heads[0].dtype} (hidden[0]'s dtype), got {head.dtype}"
            )
    return heads


def _check_head_weights(
    head_weights: Sequence[float] | Tensor | None, n: int, device: torch.device
) -> Tensor | None:
    if head_weights is None:
        return None
    if isinstance(head_weights, Tensor):
        if head_weights.requires_grad:
            raise ValueError(
                "head_weights: has no gradient here, got a tensor that requires grad (detach it)"
            )
        weights = head_weights.to(device, torch.float32)
    else:
        weights = torch.tensor([float(w) for w in head_weights], device=device)
    check_shape("head_weights", weights, (n,), "(n,)")
    return weights
