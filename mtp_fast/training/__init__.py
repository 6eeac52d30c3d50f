"""Training of multi-token prediction models."""

from mtp_fast.training.loss import multi_token_loss

__all__ = ["multi_token_loss"]
