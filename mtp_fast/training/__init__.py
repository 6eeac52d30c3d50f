"""Training of multi-token prediction models: loss, data, loop."""

from mtp_fast.training.data import BYTE_VOCAB_SIZE, SEPARATOR, Corpus, Windows
from mtp_fast.training.loop import (
    StepMetrics,
    TrainConfig,
    Trainer,
    default_precision,
    read_metrics,
)
from mtp_fast.training.loss import MultiTokenLoss, multi_token_loss

__all__ = [
    "BYTE_VOCAB_SIZE",
    "SEPARATOR",
    "Corpus",
    "MultiTokenLoss",
    "StepMetrics",
    "TrainConfig",
    "Trainer",
    "Windows",
    "default_precision",
    "multi_token_loss",
    "read_metrics",
]
