"""Arguments that the acceptance step and the sampler share: checks, and the kernel's view of them.

Each is a number or a (B,) tensor. Numbers are checked here; the values of tensors are checked
beside the kernel, which returns the name and the place of the first that is out of range.
"""

import math
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from mtp_fast.ops import _common

# The range of each argument that may be a number or one value per sequence.
_EXPECTED = {
    "temperature": "a finite number >= 0",
    "top_k": "an integer >= 0 (0: off)",
    "top_p": "0 < top_p <= 1",
    "min_p": "0 <= min_p < 1",
    "seed": "an integer of 64 bits",
    "position": "an integer of 64 bits",
    "num_draft": "0 <= num_draft <= K",
}
_IN_RANGE: dict[str, Callable[[float], bool]] = {
    "temperature": lambda value: 0.0 <= value < math.inf,
    "top_p": lambda value: 0.0 < value <= 1.0,
    "min_p": lambda value: 0.0 <= value < 1.0,
}

SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p", "seed", "position")

# The sampling arguments after their check: each a number, or a contiguous (B,) tensor of float32
# or int64.
Sampling = tuple[
    float | Tensor,
    int | Tensor,
    float | Tensor,
    float | Tensor,
    int | Tensor,
    int | Tensor,
]


def check_per_sequence(name: str, value: Tensor, logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The (B,) tensor `value` as contiguous `dtype`; its values are checked beside the kernel."""
    _common.check_tensor(name, value)
    if dtype.is_floating_point != value.dtype.is_floating_point or value.dtype == torch.bool:
        kind = "a floating dtype" if dtype.is_floating_point else "an integer dtype"
        raise TypeError(f"{name}: expected {kind}, got {value.dtype}")
    _common.check_shape(name, value, logits.shape[:1], "(B,)")
    _common.check_device(name, value, "the logits", logits)
    return value.to(dtype).contiguous()


def _check_real(name: str, value: float | Tensor, logits: Tensor) -> float | Tensor:
    if isinstance(value, Tensor):
        return check_per_sequence(name, value, logits, torch.float32)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number or a (B,) tensor, got {type(value).__name__}")
    if not _IN_RANGE[name](value):
        raise ValueError(f"{name}: expected {_EXPECTED[name]}, got {value}")
    return float(value)


def _check_integer(name: str, value: int | Tensor, logits: Tensor) -> int | Tensor:
    if isinstance(value, Tensor):
        return check_per_sequence(name, value, logits, torch.int64)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer or a (B,) tensor, got {type(value).__name__}")
    if not (0 if name == "top_k" else -(2**63)) <= value < 2**63:
        raise ValueError(f"{name}: expected {_EXPECTED[name]}, got {value}")
    return value


def check_index(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    return value


def check_sampling(
    logits: Tensor,
    temperature: float | Tensor,
    top_k: int | Tensor | None,
    top_p: float | Tensor | None,
    min_p: float | Tensor | None,
    seed: int | Tensor,
    position: int | Tensor | None,
) -> Sampling:
    return (
        _check_real("temperature", temperature, logits),
        0 if top_k is None else _check_integer("top_k", top_k, logits),
        1.0 if top_p is None else _check_real("top_p", top_p, logits),
        0.0 if min_p is None else _check_real("min_p", min_p, logits),
        _check_integer("seed", seed, logits),
        0 if position is None else _check_integer("position", position, logits),
    )


def addresses(sampling: Sampling) -> list[float]:
    """The kernel's view of the sampling arguments: (address or 0, number) pairs, flat."""
    flat: list[float] = []
    for value in sampling:
        if isinstance(value, Tensor):
            flat += (value.data_ptr(), 0)
        else:
            flat += (0, value)
    return flat


def as_tensors(sampling: Sampling, logits: Tensor) -> list[Tensor]:
    """The sampling arguments as (B,) tensors, which is how the registered ops take them."""
    dtypes = (torch.float32, torch.int64, torch.float32, torch.float32, torch.int64, torch.int64)
    return [
        value
        if isinstance(value, Tensor)
        else torch.full(logits.shape[:1], value, dtype=dtype, device=logits.device)
        for value, dtype in zip(sampling, dtypes, strict=True)
    ]


def raise_fault(
    fault: tuple[str, int], names: tuple[str, ...], values: tuple[Tensor | float | None, ...]
) -> NoReturn:
    """Raise for the value that the kernel's check found out of range."""
    name, sequence = fault
    value = values[names.index(name)]
    got = value[sequence].item() if isinstance(value, Tensor) else value
    raise ValueError(f"{name}[{sequence}]: expected {_EXPECTED[name]}, got {got}")
