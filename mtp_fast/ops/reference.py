"""The ops in plain PyTorch: what they mean, without the kernels' speed or memory.

Generic in the dtype: with float64 arguments the result is the truth that tests and benches compare
with. 16-bit logits are taken to float32 first, as the kernels do.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits: Tensor,  # (..., V)
    target: Tensor,  # (...)
    *,
    weight: Tensor | None = None,  # (V,)
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,  # (...)
    num_items: float | Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Reference of `mtp_fast.cross_entropy`."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    valid = target != ignore_index
    y = torch.where(valid, target, 0).long()
    # Whole rows are put out before anything is computed of them: NaN in an ignored row is no NaN.
    z = torch.where(valid[..., None], z, torch.zeros_like(z))
    a = z.new_ones(z.shape[-1]) if weight is None else weight.to(z.dtype)
    w = valid.to(z.dtype) if token_weight is None else torch.where(valid, token_weight, 0.0)

    lse = torch.logsumexp(z, -1)
    nll = lse - z.gather(-1, y[..., None])[..., 0]
    loss = (1 - label_smoothing) * a[y] * nll
    if label_smoothing:
        loss = loss + label_smoothing / z.shape[-1] * (a * (lse[..., None] - z)).sum(-1)
    loss = w.to(z.dtype) * (loss + z_loss * lse**2)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    count = (w * a[y] * valid).sum() if num_items is None else torch.as_tensor(num_items)
    return total * torch.where(count == 0, 0.0, 1.0 / count).to(z.dtype)


def linear_cross_entropy(
    input: Tensor,  # (..., d)
    linear_weight: Tensor,  # (V, d)
    target: Tensor,  # (...)
    *,
    linear_bias: Tensor | None = None,  # (V,)
    **options: Any,
) -> Tensor:
    """Reference of `mtp_fast.linear_cross_entropy`."""
    return cross_entropy(F.linear(input, linear_weight, linear_bias), target, **options)


def multi_token_cross_entropy(
    hidden: Tensor | Sequence[Tensor],  # n of (B, T, d)
    linear_weight: Tensor,  # (V, d)
    labels: Tensor,  # (B, T)
    *,
    document_ids: Tensor | None = None,  # (B, T)
    head_weights: Sequence[float] | Tensor | None = None,  # (n,)
    token_weight: Tensor | None = None,  # (B, T)
    num_items: float | Tensor | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    """Reference of `mtp_fast.multi_token_cross_entropy`: the loop over heads."""
    total = hidden[0].new_zeros(())
    for k, head in enumerate(hidden):
        shift = 1 + k
        kept = max(labels.shape[1] - shift, 0)
        target = labels[:, shift:]
        if document_ids is not None:
            crosses = document_ids[:, shift:] != document_ids[:, :kept]
            target = target.masked_fill(crosses, ignore_index)
        items = num_items
        if isinstance(num_items, Tensor) and num_items.dim() == 1:
            items = num_items[k]
        loss = linear_cross_entropy(
            head[:, :kept],
            linear_weight,
            target,
            token_weight=None if token_weight is None else token_weight[:, shift:],
            num_items=items,
            ignore_index=ignore_index,
            **options,
        )
        total = total + (1.0 if head_weights is None else head_weights[k]) * loss
    return total
