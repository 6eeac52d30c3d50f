"""What every op needs before it calls its kernel: checks of arguments and the kernels' codes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtp_fast import _C

# csrc/common/dtype.h
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

INTEGER_DTYPES = (torch.int64, torch.int32)


def on_cuda(tensor: Tensor) -> bool:
    """Whether ops on `tensor` run the CUDA kernels, and must not wait for their results."""
    return tensor.is_cuda


def call_kernel(name: str, like: Tensor, *arguments: Any) -> Any:
    """Call a kernel of `_C` where `like` is: on torch's threads or on its current CUDA stream.

    Raises
    ------
    RuntimeError
        The build has no CUDA kernels, or CUDA refused the launch.
    """
    if not like.is_cuda:
        return getattr(_C, name)(torch.get_num_threads(), *arguments)
    kernel = getattr(_C, f"{name}_cuda", None)
    if kernel is None:
        raise RuntimeError(
            f"mtp_fast.{name}: got a tensor on {like.device}, but this build is for the CPU only; "
            "install mtp_fast where nvcc is found (MTP_FAST_CUDA=1 insists on it)"
        )
    return kernel(like.get_device(), torch.cuda.current_stream(like.device).cuda_stream, *arguments)


# A kernel with its arguments; it returns the name of one that is out of range and the sequence that
# has it, ("", 0) or None if there is none.
BoundKernel = Callable[[], tuple[str, int] | None]


def bind_kernel(name: str, like: Tensor, *arguments: Any) -> BoundKernel:
    """Return a call of a decode step's kernel, to be made again and again.

    What the arguments point to must live as long. On a CPU it is a `_C.Call`, on as many threads as
    torch has now; on CUDA it goes to the stream that is current then.
    """
    if on_cuda(like):
        return partial(call_kernel, name, like, *arguments)
    kernel: BoundKernel = getattr(_C, f"bind_{name}")(torch.get_num_threads(), *arguments)
    return kernel


def check_tensor(name: str, value: object) -> Tensor:
    """Return `value`, or raise TypeError if it is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    return value


def check_float_dtype(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = ()) -> None:
    """Raise TypeError unless the dtype is one of `dtypes` (default: all that kernels take)."""
    allowed = tuple(dtypes) or tuple(DTYPE_CODES)
    if tensor.dtype not in allowed:
        raise TypeError(f"{name}: expected {_names(allowed)}, got {tensor.dtype}")


def check_integer_dtype(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the tensor holds int64 or int32."""
    if tensor.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name}: expected {_names(INTEGER_DTYPES)}, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], meaning: str) -> None:
    """Raise ValueError unless the shape is `shape`; `meaning` says what the sizes are, "(B, T)"."""
    if tensor.shape != torch.Size(shape):
        raise ValueError(
            f"{name}: expected shape {meaning} = {tuple(shape)}, got {tuple(tensor.shape)}"
        )


def check_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Raise ValueError unless both tensors are on one device."""
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} (where {like_name} is), got {tensor.device}"
        )


def _names(dtypes: Sequence[torch.dtype]) -> str:
    names = [str(dtype) for dtype in dtypes]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]
