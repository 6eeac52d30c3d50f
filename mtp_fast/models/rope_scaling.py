"""Scaling of rotary frequencies: how a model was stretched to a longer context.

The fields are those of `rope_scaling` in a Hugging Face `config.json`. Sources: "linear", position
interpolation (arXiv 2306.15595); "llama3", Llama 3.1 (arXiv 2407.21783); "yarn", arXiv 2309.00071.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# For each kind: the fields that it needs, and those that it may have.
_FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, set()),
    "llama3": (
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        set(),
    ),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "truncate"},
    ),
}


def check_rope_scaling(scaling: Mapping[str, Any]) -> None:
    """Raise `ValueError` or `TypeError`, naming the field, unless `scaling` is one we know."""
    if not isinstance(scaling, Mapping):
        raise TypeError(f"rope_scaling must be a mapping or None, got {scaling!r}")
    kind = scaling.get("rope_type")
    if kind not in _FIELDS:
        raise ValueError(f"rope_scaling: rope_type must be one of {[*_FIELDS]}, got {kind!r}")
    required, optional = _FIELDS[kind]
    given = scaling.keys() - {"rope_type"}
    if missing := sorted(required - given):
        raise ValueError(f"rope_scaling of type {kind!r} lacks {', '.join(missing)}")
    if unknown := sorted(given - required - optional):
        raise ValueError(f"rope_scaling of type {kind!r} has unknown fields {', '.join(unknown)}")
    for name in sorted(given - {"truncate"}):
        value = scaling[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"rope_scaling: {name} must be a number, got {value!r}")
        if not value > 0:
            raise ValueError(f"rope_scaling: {name} must be positive, got {value}")
    if not isinstance(scaling.get("truncate", True), bool):
        raise TypeError(f"rope_scaling: truncate must be a bool, got {scaling['truncate']!r}")
    if kind == "llama3" and not scaling["high_freq_factor"] > scaling["low_freq_factor"]:
        raise ValueError(
            "rope_scaling: high_freq_factor must exceed low_freq_factor, "
            f"got {scaling['high_freq_factor']} and {scaling['low_freq_factor']}"
        )


def scale_frequencies(
    frequencies: Tensor, theta: float, scaling: Mapping[str, Any]
) -> tuple[Tensor, float]:
    """Return scaled frequencies and the factor of the cosines and sines.

    Parameters
    ----------
    frequencies : Tensor
        (head_dim / 2,) float64, radians per position, ``theta ** -(2 i / head_dim)``.
    theta : float
        Their base.
    scaling : mapping
        What `check_rope_scaling` accepts.
    """
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequencies / factor, 1.0
    if scaling["rope_type"] == "llama3":
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        kept = 1 - _yarn_ramp(2 * len(frequencies), theta, scaling)
    # Fast frequencies are kept, slow ones interpolated, those between mixed.
    mixed = kept * frequencies + (1 - kept) * frequencies / factor
    if scaling["rope_type"] == "llama3":
        return mixed, 1.0
    default = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    return mixed, scaling.get("attention_factor", default)


def _yarn_ramp(head_dim: int, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    """Return (head_dim / 2,) shares of interpolation, rising from 0 to 1 with the wavelength."""

    def index_of(turns: float) -> float:
        """The frequency that makes so many turns within the original context."""
        length = scaling["original_max_position_embeddings"]
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index_of(scaling.get("beta_fast", 32)), index_of(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    index = torch.arange(head_dim // 2, dtype=torch.float64)
    return ((index - first) / max(last - first, 0.001)).clamp(0, 1)
