"""Products of few rows against float64, with every instruction set."""

from __future__ import annotations

import pytest
import torch

from mtp_fast.ops.few_row_linear import MAX_ROWS, few_row_linear

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (37, 100), (64, 256), (130, 31), (2000, 33)])
def test_against_float64(simd_level, dtype, shape):
    out, width = shape
    weight = torch.randn(out, width + 3).to(dtype)[:, :width]  # rows further apart than long
    for rows in range(1, MAX_ROWS + 1):
        x, residual = torch.randn(rows, width).to(dtype), torch.randn(rows, out)
        exact = x.double() @ weight.double().t()
        granted = 3e-6 * (x.double().abs() @ weight.double().abs().t()) + 1e-6
        assert ((few_row_linear(x, weight) - exact).abs() <= granted).all()
        got = few_row_linear(x, weight, residual)
        assert ((got - (residual + exact)).abs() <= granted + 1e-6).all()


@DTYPES
def test_a_row_has_the_same_bits_beside_any_others(simd_level, dtype):
    x, weight = torch.randn(MAX_ROWS, 200).to(dtype), torch.randn(301, 200).to(dtype)
    together = few_row_linear(x, weight)
    for rows in range(1, MAX_ROWS):
        assert torch.equal(few_row_linear(x[:rows], weight), together[:rows])
        assert torch.equal(few_row_linear(x[rows:], weight), together[rows:])


@pytest.mark.parametrize(
    ("x", "weight", "residual", "error", "message"),
    [
        ((2, 4), (3, 5), None, ValueError, "x: expected shape"),
        ((2, 4), (3, 4), (2, 4), ValueError, "residual: expected shape"),
        ((2, 4), (4, 3, "t"), None, ValueError, "weight: expected contiguous rows"),
    ],
)
def test_bad_input(x, weight, residual, error, message):
    weight = torch.zeros(weight[:2]).t() if len(weight) == 3 else torch.zeros(weight)
    residual = None if residual is None else torch.zeros(residual)
    with pytest.raises(error, match=message):
        few_row_linear(torch.zeros(x), weight, residual)
    with pytest.raises(TypeError, match=r"x: expected torch\.float32"):
        few_row_linear(torch.zeros(2, 4).half(), torch.zeros(3, 4))
