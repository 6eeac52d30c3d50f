"""The matrix products of the chunked losses, summed in float32."""

from functools import cache

import torch
from torch import Tensor

from mtp_fast import _C
from mtp_fast.ops._common import DTYPE_CODES

# 16-bit products that are added to a float32 sum are made for as many rows at a time as fit: they
# are still in the cache when they are added.
PRODUCT_BYTES = 8 << 20
# float32 products with a smaller dimension than this are torch's, where AMX could make them: taking
# the operands apart would cost more than it saves.
SMALLEST_ON_AMX = 256
# 16-bit products on a processor that has none are made in float32, so many bytes of it at a time.
PIECE_BYTES = 16 << 20


def new_workspace(like: Tensor) -> Tensor:
    """Memory for any number of `gemm`s with operands of the dtype and device of `like`.

    Blocks of megabytes that come and go with each product would make malloc's heap grow instead.
    """
    needed = like.device.type == "cpu" and like.dtype != torch.float32
    size = max(2 * PIECE_BYTES, PRODUCT_BYTES) if needed else 0
    return like.new_empty(size, dtype=torch.uint8)


def gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    accumulate: bool = False,
    workspace: Tensor | None = None,
) -> None:
    """``out = a @ b``, plus a bias or what `out` holds.

    On a processor with AMX, float32 results of large products are made by a kernel (csrc/gemm).
    Their error is about torch's or less; where a float32 operand is not finite, they are NaN. All
    else is torch's. Where torch has only plain loops for 16 bits on a CPU, its float32 products are
    used instead.

    Parameters
    ----------
    a, b : Tensor
        (m, k) and (k, n), of one dtype, any strides.
    out : Tensor
        (m, n), contiguous; of the dtype of `a`, or float32.
    bias : Tensor, optional
        (n,), of the dtype of `out`, which is that of `a`; not with `accumulate`.
    accumulate : bool
        Whether to add to what `out` holds.
    workspace : Tensor, optional
        `new_workspace(a)`; not one that is in use.
    """
    workspace = new_workspace(a) if workspace is None else workspace
    if _runs_on_amx(a, b, out):
        if bias is not None:
            out.copy_(bias)
        _on_amx(a, b, out, accumulate=accumulate or bias is not None)
    elif not a.is_cuda and not torch_multiplies(a.dtype):
        held = out if accumulate else bias
        _in_float32(a, b, out, None if held is None else held.expand_as(out), workspace)
    elif bias is not None:
        torch.addmm(bias, a, b, out=out)
    elif out.dtype == a.dtype:
        out.addmm_(a, b, beta=1.0 if accumulate else 0.0)
    elif a.is_cuda:
        _float32_from_16_bits(a, b, out, accumulate=accumulate)
    else:
        memory = workspace.view(a.dtype)
        for rows in _pieces(len(a), PRODUCT_BYTES // (max(out.shape[1], 1) * a.itemsize)):
            product = _stored_like(out[rows], memory)
            torch.mm(a[rows], b, out=product)
            scaled_add(product, out[rows], 1.0, accumulate=accumulate)


def scaled_add(x: Tensor, y: Tensor, alpha: float, *, accumulate: bool) -> None:
    """y = x * alpha, or y + x * alpha; contiguous, any two dtypes."""
    _C.scaled_add(
        torch.get_num_threads(),
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        DTYPE_CODES[y.dtype],
        y.data_ptr(),
        x.numel(),
        alpha,
        accumulate,
    )


def _float32_from_16_bits(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """One GEMM with float32 results, which torch has on CUDA alone."""
    if accumulate:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


@cache
def torch_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN's products of `dtype` on this CPU.

    Its own loops were seen to take 6 to 100 times as long as products of float32.
    """
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if dtype not in names:
        return True
    if not torch._C._has_mkldnn:
        return False
    has = getattr(torch.ops.mkldnn, f"_is_mkldnn_{names[dtype]}_supported", None)
    return has is None or bool(has())  # None: a torch that does not say


def _in_float32(a: Tensor, b: Tensor, out: Tensor, start: Tensor | None, workspace: Tensor) -> None:
    """``out = a @ b``, plus `start` (m, n); at most twice PIECE_BYTES of it are float32 at a time.

    The rows are cut as far as it takes, and the larger of the other two dimensions.
    """
    (m, k), n = a.shape, b.shape[1]
    if m > max(k, n):  # the same transposed
        a, b, out, m, n = b.t(), a.t(), out.t(), n, m
        start = None if start is None else start.t()
    whole = min(k, n)
    rows = _pieces(m, PIECE_BYTES // (4 * max(whole, 1)))
    step = PIECE_BYTES // (4 * (rows[0].stop + whole + 1))
    columns, inner = _pieces(n, step if n > k else n), _pieces(k, k if n > k else step)

    first_rows, first_columns, first_inner = rows[0].stop, columns[0].stop, inner[0].stop
    sizes = [first_rows * first_inner, first_inner * first_columns, first_rows * first_columns]
    of_a, of_b, of_sums = torch.split(workspace.view(torch.float32)[: sum(sizes)], sizes)
    for r in rows:
        x = _converted(a[r], of_a) if len(inner) == 1 else a[r]
        for c in columns:
            part = out[r, c]
            sums = part if part.dtype == torch.float32 else _stored_like(part, of_sums)
            if start is not None:
                sums.copy_(start[r, c])
            for i in inner:
                beta = 1.0 if i.start > 0 or start is not None else 0.0
                sums.addmm_(_converted(x[:, i], of_a), _converted(b[i, c], of_b), beta=beta)
            part.copy_(sums)


def _pieces(size: int, width: int) -> list[slice]:
    """[0, size) in slices of `width`; at least one, which may be empty."""
    width = max(width, 1)
    return [slice(i, min(i + width, size)) for i in range(0, max(size, 1), width)]


def _converted(x: Tensor, memory: Tensor) -> Tensor:
    """x in float32, in `memory` if it is not."""
    return x if x.dtype == torch.float32 else _stored_like(x, memory).copy_(x)


def _stored_like(x: Tensor, memory: Tensor) -> Tensor:
    """A matrix in `memory` of the shape of x, rows or columns contiguous as there."""
    if x.stride(0) == 1:
        return memory[: x.numel()].view(x.t().shape).t()
    return memory[: x.numel()].view(x.shape)


def _runs_on_amx(a: Tensor, b: Tensor, out: Tensor) -> bool:
    if a.is_cuda or out.dtype != torch.float32 or a.dtype == torch.float16 or not _C.has_amx():
        return False
    smallest: int = min(*a.shape, *b.shape)
    return smallest >= (SMALLEST_ON_AMX if a.dtype == torch.float32 else 1)


def _on_amx(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool) -> None:
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    _C.gemm_amx(
        torch.get_num_threads(),
        DTYPE_CODES[a.dtype],
        len(a),
        b.shape[1],
        len(b),
        *_operand(a),
        *_operand(b),
        out.data_ptr(),
        accumulate,
    )


def _operand(x: Tensor) -> tuple[int, int, bool]:
    """`struct GemmOperand`."""
    transposed = x.stride(1) != 1
    return x.data_ptr(), x.stride(1 if transposed else 0), transposed
