"""Self-speculative decoding."""

from mtp_fast.decoding.generate import GenerateResult, GenerateStats, generate

__all__ = ["GenerateResult", "GenerateStats", "generate"]
