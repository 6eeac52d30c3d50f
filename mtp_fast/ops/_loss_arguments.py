"""What the three losses share: checks, each naming its argument, and denominators."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mtp_fast.ops._common import (
    DTYPE_CODES,
    check_device,
    check_float_dtype,
    check_integer_dtype,
    check_shape,
    check_tensor,
)

Reduction = Literal["mean", "sum", "none"]


class RowTerms(NamedTuple):
    """The scalars of the loss of one row (csrc/cross_entropy/math.h)."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    """0: off."""


def check_terms(
    ignore_index: int | None, label_smoothing: float, z_loss: float, softcap: float | None
) -> RowTerms:
    """Check the scalars of the loss of one row."""
    if ignore_index is not None and (
        isinstance(ignore_index, bool) or not isinstance(ignore_index, int)
    ):
        raise TypeError(f"ignore_index: expected an int or None, got {ignore_index!r}")
    for name, value in (("label_smoothing", label_smoothing), ("z_loss", z_loss)):
        if not isinstance(value, int | float):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {label_smoothing}")
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss: expected a finite number >= 0, got {z_loss}")
    if softcap is not None:
        if not isinstance(softcap, int | float):
            raise TypeError(f"softcap: expected a number or None, got {type(softcap).__name__}")
        if not 0.0 < softcap < float("inf"):
            raise ValueError(f"softcap: expected a finite number > 0 or None, got {softcap}")
    return RowTerms(
        -100 if ignore_index is None else ignore_index,
        float(label_smoothing),
        float(z_loss),
        0.0 if softcap is None else float(softcap),
    )


def check_reduction(reduction: str, num_items: object, allowed: tuple[str, ...]) -> None:
    """Check `reduction`, and that `num_items` comes with "mean" only."""
    if reduction not in allowed:
        raise ValueError(f"reduction: expected one of {allowed}, got {reduction!r}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f'num_items: goes with reduction="mean" only, got reduction={reduction!r}')


def check_target(
    name: str, target: Tensor, shape: torch.Size, meaning: str, like_name: str, like: Tensor
) -> None:
    """Check a tensor of class ids."""
    check_tensor(name, target)
    check_integer_dtype(name, target)
    check_shape(name, target, shape, meaning)
    check_device(name, target, like_name, like)


def check_weight(
    name: str,
    weight: Tensor | None,
    shape: tuple[int, ...],
    meaning: str,
    like_name: str,
    like: Tensor,
) -> Tensor | None:
    """Check a tensor of weights and return it in float32."""
    if weight is None:
        return None
    check_tensor(name, weight)
    if not weight.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {weight.dtype}")
    check_shape(name, weight, shape, meaning)
    check_device(name, weight, like_name, like)
    if weight.requires_grad:
        raise ValueError(
            f"{name}: has no gradient here, got a tensor that requires grad (detach it)"
        )
    return weight.detach().to(torch.float32).contiguous()


def check_num_items(num_items: object, heads: int, device: torch.device) -> Tensor | None:
    """Check `num_items` and return it as (heads,) float32."""
    if num_items is None:
        return None
    if isinstance(num_items, Tensor):
        if num_items.dim() > 1 or (num_items.dim() == 1 and num_items.shape[0] != heads):
            expected = "a 0-d tensor" if heads == 1 else f"a 0-d or ({heads},) tensor"
            raise ValueError(f"num_items: expected {expected}, got {tuple(num_items.shape)}")
        if num_items.requires_grad:
            raise ValueError("num_items: has no gradient here, got a tensor that requires grad")
        return num_items.to(device, torch.float32).expand(heads)
    if isinstance(num_items, bool) or not isinstance(num_items, int | float):
        raise TypeError(f"num_items: expected a number or a tensor, got {num_items!r}")
    if not 0 <= num_items < float("inf"):
        raise ValueError(f"num_items: expected a finite number >= 0, got {num_items}")
    return torch.full((heads,), float(num_items), device=device)


def check_linear(
    name: str, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None
) -> torch.dtype:
    """Check the linear layer against its input (..., d); return the dtype of the products."""
    check_tensor("linear_weight", linear_weight)
    check_float_dtype(name, input)
    if linear_weight.dim() != 2 or linear_weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight: expected shape (V, d) with d = {input.shape[-1]} (the last size of "
            f"{name}), got {tuple(linear_weight.shape)}"
        )
    if linear_weight.shape[0] == 0:
        raise ValueError("linear_weight: expected shape (V, d) with V > 0, got V = 0")
    check_device("linear_weight", linear_weight, name, input)
    device_type = input.device.type
    autocast = torch.is_autocast_enabled(device_type)
    allowed = tuple(DTYPE_CODES) if autocast else (input.dtype,)
    check_float_dtype("linear_weight", linear_weight, allowed)
    if linear_bias is not None:
        check_tensor("linear_bias", linear_bias)
        check_shape("linear_bias", linear_bias, linear_weight.shape[:1], "(V,)")
        check_device("linear_bias", linear_bias, name, input)
        check_float_dtype("linear_bias", linear_bias, allowed)
    return torch.get_autocast_dtype(device_type) if autocast else input.dtype


def check_chunk_bytes(chunk_bytes: int | None) -> int | None:
    """Check the budget for the logits. None stays None: the op chooses when it runs."""
    if chunk_bytes is None:
        return None
    if isinstance(chunk_bytes, bool) or not isinstance(chunk_bytes, int):
        raise TypeError(f"chunk_bytes: expected an int or None, got {chunk_bytes!r}")
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes: expected a number of bytes > 0, got {chunk_bytes}")
    return chunk_bytes


def check_target_range(name: str, target: Tensor, ignore_index: int, vocab: int) -> None:
    """Raise IndexError for the first target that is neither in [0, vocab) nor ignored."""
    bad = ((target < 0) | (target >= vocab)) & (target != ignore_index)
    if not bool(bad.any()):
        return
    position = tuple(bad.nonzero()[0].tolist())
    raise IndexError(
        f"{name}: expected ids in [0, {vocab}) or ignore_index = {ignore_index}, "
        f"got {int(target[position])} at {list(position)}"
    )


def mean_denominator(
    target: Tensor, valid: Tensor, row_weight: Tensor | None, class_weight: Tensor | None
) -> Tensor:
    """Sum of row weight * class weight of the target over the valid rows; 0-d, float32."""
    total = valid.to(torch.float32)
    if row_weight is not None:
        total = torch.where(valid, row_weight, total)
    if class_weight is not None:
        # Targets out of range have raised on the CPU; on CUDA their loss is NaN in any case.
        total = total * class_weight[torch.where(valid, target, 0).clamp(0, len(class_weight) - 1)]
    return total.sum()


def reciprocal(count: Tensor) -> Tensor:
    """1 / count, and 0 for 0: a mean over nothing is 0, and so is its gradient."""
    return torch.where(count == 0, 0.0, 1.0 / count)
