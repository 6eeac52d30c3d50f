"""The head-by-head loss: each head's forward and backward ends before the next one starts.

One head's activations live at a time, so memory does not grow with the number of heads. All heads
are one node of the autograd graph: their gradients are computed with the loss, and handed out when
the backward pass reaches the node. Gradient accumulation, hooks and DDP see an ordinary backward.
Source: section 2 of arXiv 2404.19737.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtp_fast.models import MTPTransformer
from mtp_fast.ops.multi_token_cross_entropy import MultiTokenStats, multi_token_cross_entropy


def headwise_loss(
    model: MTPTransformer,
    trunk: Tensor,
    tokens: Tensor,
    head_weights: Sequence[float] | Tensor | None,
    document_ids: Tensor | None,
) -> tuple[Tensor, MultiTokenStats]:
    """Return the weighted sum of the heads' losses on the trunk's output, and its statistics.

    Parameters
    ----------
    model : MTPTransformer
        Gives heads, final norm and unembedding.
    trunk : Tensor
        (B, T, dim) the trunk's output for `tokens`.
    tokens : Tensor
        (B, T) int64.
    head_weights, document_ids
        As in `multi_token_loss`.
    """
    n = len(model.heads)
    weights = torch.ones(n) if head_weights is None else torch.as_tensor(head_weights)
    if weights.shape != (n,):
        raise ValueError(f"head_weights must be ({n},), got shape {tuple(weights.shape)}")
    shared = [model.unembedding.weight, *model.norm.parameters()]
    parameters = [*shared, *model.heads.parameters()]
    loss, *stats = _Headwise.apply(  # type: ignore[no-untyped-call]
        model, tokens, weights, document_ids, trunk, *parameters
    )
    return loss, MultiTokenStats(*stats)


class _Headwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        model: MTPTransformer,
        tokens: Tensor,
        weights: Tensor,
        document_ids: Tensor | None,
        trunk: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        inputs = [trunk.detach().requires_grad_(trunk.requires_grad), *parameters]
        wanted = [x for x in inputs if x.requires_grad]
        gradients: dict[int, Tensor] = {}
        total = torch.zeros((), device=trunk.device)
        stats = []
        for k in range(len(model.heads)):
            with torch.enable_grad():
                hidden = model.head(inputs[0], k)[:, : tokens.shape[1] - k]
                loss, head_stats = multi_token_cross_entropy(
                    [hidden],
                    model.unembedding.weight,
                    _labels(tokens, document_ids, k),
                    head_weights=weights[k : k + 1],
                    return_stats=True,
                )
            total += loss.detach()
            stats.append(head_stats)
            if not loss.requires_grad:
                continue
            # Not named here: a head's gradient of the unembedding must not live through the next's.
            _add(gradients, wanted, torch.autograd.grad(loss, wanted, allow_unused=True))
        # The order of `inputs`; what needs no gradient, or got none, has None.
        ctx.save_for_backward(*[gradients.get(id(x)) for x in inputs])
        columns = [torch.cat(column) for column in zip(*stats, strict=True)]
        ctx.mark_non_differentiable(*columns)
        return total, *columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors]
        return None, None, None, None, *scaled


def _add(
    gradients: dict[int, Tensor], inputs: Sequence[Tensor], new: Sequence[Tensor | None]
) -> None:
    for x, gradient in zip(inputs, new, strict=True):
        if gradient is not None:  # other heads' parameters have none
            known = gradients.get(id(x))
            gradients[id(x)] = gradient if known is None else known.add_(gradient)


def _labels(tokens: Tensor, document_ids: Tensor | None, k: int) -> Tensor:
    """Labels (B, T - k) that a head 0 would need to be scored as head `k` is."""
    labels = tokens[:, k:]
    if document_ids is None:
        return labels
    labels = labels.clone()
    crossing = document_ids[:, 1 + k :] != document_ids[:, : -1 - k]
    labels[:, 1:].masked_fill_(crossing, -100)
    return labels
