"""The training loss: the sum over heads of each head's mean cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor, nn

from mtp_fast.models import MTPTransformer
from mtp_fast.ops.multi_token_cross_entropy import MultiTokenStats, multi_token_cross_entropy
from mtp_fast.training.headwise import headwise_loss


@overload
def multi_token_loss(
    model: MTPTransformer,
    tokens: Tensor,
    *,
    route: str = "parallel",
    head_weights: Sequence[float] | Tensor | None = None,
    document_ids: Tensor | None = None,
    return_stats: Literal[False] = False,
) -> Tensor: ...


@overload
def multi_token_loss(
    model: MTPTransformer,
    tokens: Tensor,
    *,
    route: str = "parallel",
    head_weights: Sequence[float] | Tensor | None = None,
    document_ids: Tensor | None = None,
    return_stats: Literal[True],
) -> tuple[Tensor, MultiTokenStats]: ...


def multi_token_loss(
    model: MTPTransformer,
    tokens: Tensor,
    *,
    route: str = "parallel",
    head_weights: Sequence[float] | Tensor | None = None,
    document_ids: Tensor | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, MultiTokenStats]:
    """Score every head of `model` on `tokens`.

    Parameters
    ----------
    model : MTPTransformer
        The model.
    tokens : Tensor
        (B, T) int64: input and, unshifted, the labels.
    route : {"parallel", "headwise"}
        "parallel" runs all heads, then one backward. "headwise" ends each head's forward and
        backward before the next head's, so that one head's activations live at a time. Gradients
        are the same.
    head_weights : sequence of float or Tensor, optional
        (n,) weights of the heads' losses; all 1 by default.
    document_ids : Tensor, optional
        (B, T): a prediction across a document's end is not scored.
    return_stats : bool
        Also return the op's statistics: ``loss``, ``num_valid``, ``accuracy``, each (n,).

    Returns
    -------
    Tensor or (Tensor, stats)
        The weighted sum over heads, a float32 scalar in nats per token.
    """
    if route not in ("parallel", "headwise"):
        raise ValueError(f'route must be "parallel" or "headwise", got {route!r}')
    if route == "headwise" and torch.is_grad_enabled():
        trunk = model.trunk_output(tokens)
        loss, stats = headwise_loss(model, trunk, tokens, head_weights, document_ids)
    else:
        loss, stats = multi_token_cross_entropy(
            model(tokens),
            model.unembedding.weight,
            tokens,
            document_ids=document_ids,
            head_weights=head_weights,
            return_stats=True,
        )
    return (loss, stats) if return_stats else loss


class MultiTokenLoss(nn.Module):
    """`multi_token_loss` as a module, which is what DistributedDataParallel can wrap.

    DDP averages gradients in the backward pass of a module's forward; the loss runs parts of the
    model on its own, so it has to be inside that forward.

    Parameters
    ----------
    model : MTPTransformer
        The model.
    route : {"parallel", "headwise"}
        See `multi_token_loss`.
    """

    def __init__(self, model: MTPTransformer, route: str = "parallel") -> None:
        super().__init__()
        self.model, self.route = model, route

    def forward(
        self,
        tokens: Tensor,
        head_weights: Sequence[float] | Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> tuple[Tensor, MultiTokenStats]:
        """Return the loss of `tokens` (B, T) and its statistics."""
        return multi_token_loss(
            self.model,
            tokens,
            route=self.route,
            head_weights=head_weights,
            document_ids=document_ids,
            return_stats=True,
        )
