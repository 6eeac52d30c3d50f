"""Products of a few rows with a large weight on a CPU: the unembedding of a decode step.

Internal to decoding: no gradient, no registration with `torch.library`.
"""

import torch
from torch import Tensor

from mtp_fast.ops import _common


def few_row_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``, summed in float32.

    A row's result is the same bits whatever the number of rows.

    Parameters
    ----------
    x : Tensor
        (rows, in), on the CPU, in the weight's dtype.
    weight : Tensor
        (out, in), float32, bfloat16 or float16, the last dimension contiguous.

    Returns
    -------
    Tensor
        (rows, out) float32.

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes or devices differ from these.
    """
    _common.check_float_dtype("weight", weight)
    _common.check_float_dtype("x", x, (weight.dtype,))
    rows, out = x.shape[0], weight.shape[0]
    _common.check_shape("x", x, (rows, weight.shape[1]), "(rows, in)")
    if x.device.type != "cpu" or weight.device.type != "cpu":
        raise ValueError(f"x and weight: expected the CPU, got {x.device} and {weight.device}")
    if weight.stride(1) != 1:
        raise ValueError(f"weight: expected contiguous rows, got strides {weight.stride()}")
    x = x.contiguous()
    y = torch.empty(rows, out)
    _common.call_kernel(
        "few_row_linear",
        x,
        _common.DTYPE_CODES[weight.dtype],
        x.data_ptr(),
        weight.data_ptr(),
        weight.stride(0),
        y.data_ptr(),
        rows,
        weight.shape[1],
        out,
    )
    return y
