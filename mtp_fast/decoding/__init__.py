"""Self-speculative decoding."""

from mtp_fast.decoding.incremental import PreparedModel
from mtp_fast.decoding.speculative import GenerateResult, GenerateStats, generate

__all__ = ["GenerateResult", "GenerateStats", "PreparedModel", "generate"]
