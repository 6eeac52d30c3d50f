"""Training of multi-token prediction models: loss, data, loop."""

from mtp_fast.training.config import TrainConfig, default_precision
from mtp_fast.training.data import BYTE_VOCAB_SIZE, SEPARATOR, Corpus, Windows
from mtp_fast.training.loop import Trainer
from mtp_fast.training.loss import MultiTokenLoss, multi_token_loss
from mtp_fast.training.metrics import StepMetrics, read_metrics
from mtp_fast.training.prepared import PreparedCorpus, load_corpus, prepare

__all__ = [
    "BYTE_VOCAB_SIZE",
    "SEPARATOR",
    "Corpus",
    "MultiTokenLoss",
    "PreparedCorpus",
    "StepMetrics",
    "TrainConfig",
    "Trainer",
    "Windows",
    "default_precision",
    "load_corpus",
    "multi_token_loss",
    "prepare",
    "read_metrics",
]
