"""How to train: a run's configuration, and the schedules in it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Parameters
    ----------
    steps : int, optional
        Optimizer steps of the whole run.
    minutes : float, optional
        Or its wall-clock budget, which the schedule then follows. One of the two must be given.
    batch_size, context : int
        Windows of a micro-batch, and tokens of a window.
    accumulation : int
        Micro-batches of an optimizer step in each process.
    learning_rate, final_learning_rate : float
        Peak after the warm-up, and the cosine's end.
    warmup : float
        Share of the run in which the rate rises linearly.
    head_weights : tuple of float, optional
        (n,) weight of each head's loss; default all 1.
    head_weights_warmup : float
        Share of the run in which the weights of heads 1.. rise linearly from 0.
    head_dropout : tuple of float, optional
        (n,) dropout in each head; default the model's.
    dropout_warmup : float
        Share of the run in which all dropout rises linearly from 0.
    weight_decay, beta1, beta2 : float
        Of AdamW; matrices decay, norms do not.
    grad_clip : float
        Largest gradient norm.
    precision : {"bfloat16", "float32"}
        "bfloat16" runs the model under autocast; parameters stay float32.
    route : {"parallel", "headwise"}
        See `multi_token_loss`.
    compile : bool
        Whether trunk and heads go through torch.compile.
    freeze_next_token_model : bool
        Train heads 1, 2, ... only, see `MTPTransformer.freeze_next_token_model`.
    eval_every, eval_batches : int
        Steps between validations, and batches of one.
    checkpoint_every : int
        Steps between checkpoints.
    separator : int, optional
        The token that closes a document. Predictions across it are not scored, in training and in
        validation: each head's loss is the mean over those that stay within a document. Attention
        still crosses documents. By default all predictions are scored.
    seed : int
        Of batches and dropout.

    Raises
    ------
    ValueError
        If a field is out of range, or both or none of `steps` and `minutes` are given.
    """

    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 8
    context: int = 256
    accumulation: int = 1
    learning_rate: float = 3e-3
    final_learning_rate: float = 1e-4
    warmup: float = 0.05
    head_weights: tuple[float, ...] | None = None
    head_weights_warmup: float = 0.0
    head_dropout: tuple[float, ...] | None = None
    dropout_warmup: float = 0.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    precision: str = "float32"
    route: str = "parallel"
    compile: bool = False
    freeze_next_token_model: bool = False
    eval_every: int = 100
    eval_batches: int = 8
    checkpoint_every: int = 500
    separator: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give one of steps and minutes")
        positive = ("steps", "minutes", "batch_size", "context", "accumulation", "learning_rate")
        intervals = ("grad_clip", "eval_every", "eval_batches", "checkpoint_every")
        for name in positive + intervals:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.precision not in ("bfloat16", "float32"):
            raise ValueError(f'precision must be "bfloat16" or "float32", got {self.precision!r}')
        if self.route not in ("parallel", "headwise"):
            raise ValueError(f'route must be "parallel" or "headwise", got {self.route!r}')
        if not 0 <= self.final_learning_rate <= self.learning_rate:
            raise ValueError(
                f"final_learning_rate must be in [0, learning_rate={self.learning_rate}], "
                f"got {self.final_learning_rate}"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")
        for name in ("head_weights_warmup", "dropout_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        weights = self.head_weights
        if weights is not None and not all(0 <= w < math.inf for w in weights):
            raise ValueError(f"head_weights must be finite and not negative, got {weights}")
        if self.separator is not None and self.separator < 0:
            raise ValueError(f"separator must be a token id, got {self.separator}")
        if self.compile and self.dropout_warmup:
            raise ValueError("compile goes with constant dropout: dropout_warmup must be 0")
        if self.head_dropout is not None and not all(0 <= p < 1 for p in self.head_dropout):
            raise ValueError(f"head_dropout must be in [0, 1), got {self.head_dropout}")

    def learning_rate_at(self, progress: float) -> float:
        """Return the rate at `progress` in [0, 1] of the run."""
        if progress < self.warmup:
            return self.learning_rate * warm_in(progress, self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))
        low = self.final_learning_rate
        return low + (self.learning_rate - low) * cosine

    def head_weights_at(self, progress: float, n: int) -> list[float]:
        """Return the weights of `n` heads' losses at `progress` in [0, 1] of the run."""
        first, *later = self.head_weights or [1.0] * n
        factor = warm_in(progress, self.head_weights_warmup)
        return [first, *[factor * weight for weight in later]]


def warm_in(progress: float, share: float) -> float:
    """Factor that rises linearly from 0 to 1 over the first `share` of a run."""
    return min(1.0, progress / share) if share else 1.0


def default_precision(device: torch.device) -> str:
    """Return "bfloat16" where the device multiplies it faster than float32, else "float32"."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"
