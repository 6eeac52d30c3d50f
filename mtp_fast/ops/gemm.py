"""The matrix products of the chunked losses, summed in float32."""

import itertools
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


def gemm(
    a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None = None, accumulate: bool = False
) -> None:
    """``out = a @ b``, plus a bias or what `out` holds.

    On a processor with AMX, float32 results of large products are made by a kernel (csrc/gemm).
    Their error is about torch's or less; where a float32 operand is not finite, they are NaN. All
    else is torch's, 16-bit products on a CPU where torch has but plain loops as float32 products.

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
    """
    if _runs_on_amx(a, b, out):
        if bias is not None:
            out.copy_(bias)
        _on_amx(a, b, out, accumulate=accumulate or bias is not None)
    elif not a.is_cuda and not torch_multiplies(a.dtype):
        _in_float32(a, b, out, bias=bias, accumulate=accumulate)
    elif bias is not None:
        torch.addmm(bias, a, b, out=out)
    elif out.dtype == a.dtype:
        out.addmm_(a, b, beta=1.0 if accumulate else 0.0)
    elif a.is_cuda:
        _float32_from_16_bits(a, b, out, accumulate=accumulate)
    else:
        rows = max(PRODUCT_BYTES // (max(out.shape[1], 1) * a.itemsize), 1)
        product = a.new_empty(min(rows, len(a)), out.shape[1])
        for start in range(0, len(a), rows):
            sums = out[start : start + rows]
            torch.mm(a[start : start + rows], b, out=product[: len(sums)])
            scaled_add(product[: len(sums)], sums, 1.0, accumulate=accumulate)


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
    has = getattr(torch.ops.mkldnn, f"_is_mkldnn_{names[dtype]}_supported", None)
    return has is None or bool(has())  # None: a torch without oneDNN


def _in_float32(
    a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None, accumulate: bool
) -> None:
    """By pieces of the longest dimension; an operand that it does not cut is converted once."""
    m, k, n = *a.shape, b.shape[1]
    longest = max(m, k, n)
    step = max(PIECE_BYTES // (4 * max(m + k + n - longest, 1)), 1)

    def pieces(size: int) -> list[slice]:
        width = step if size == longest else max(size, 1)
        return [slice(i, min(i + width, size)) for i in range(0, max(size, 1), width)]

    rows, inner, columns = pieces(m), pieces(k), pieces(n)
    if len(columns) > 1:
        a = a.float()
    if len(rows) > 1:
        b = b.float()

    def memory(x: list[slice], y: list[slice]) -> Tensor:
        return a.new_empty(x[0].stop * y[0].stop, dtype=torch.float32)

    of_a, of_b, of_sums = memory(rows, inner), memory(inner, columns), memory(rows, columns)
    for r, c in itertools.product(rows, columns):
        part = out[r, c]
        sums = part if part.dtype == torch.float32 else of_sums[: part.numel()].view_as(part)
        if bias is not None:
            sums.copy_(bias[c])
        elif accumulate:
            sums.copy_(part)
        beta = 1.0 if accumulate or bias is not None else 0.0
        for i in inner:
            sums.addmm_(_converted(a[r, i], of_a), _converted(b[i, c], of_b), beta=beta)
            beta = 1.0
        part.copy_(sums)


def _converted(x: Tensor, memory: Tensor) -> Tensor:
    """x (2-D) in float32, in `memory` if it is not, in the order in which it is stored."""
    if x.dtype == torch.float32:
        return x
    if x.stride(0) == 1:
        return memory[: x.numel()].view(x.t().shape).copy_(x.t()).t()
    return memory[: x.numel()].view(x.shape).copy_(x)


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
