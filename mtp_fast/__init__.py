"""Multi-token prediction for PyTorch: fused losses and speculative acceptance."""

from mtp_fast._build_info import __version__, build_info
from mtp_fast.ops.acceptance import AcceptResult, sample, speculative_accept
from mtp_fast.ops.cross_entropy import CrossEntropyStats, cross_entropy
from mtp_fast.ops.linear_cross_entropy import linear_cross_entropy
from mtp_fast.ops.multi_token_cross_entropy import MultiTokenStats, multi_token_cross_entropy

__all__ = [
    "AcceptResult",
    "CrossEntropyStats",
    "MultiTokenStats",
    "__version__",
    "build_info",
    "cross_entropy",
    "linear_cross_entropy",
    "multi_token_cross_entropy",
    "sample",
    "speculative_accept",
]
