"""Products of few rows against float64, with every instruction set."""

from __future__ import annotations

import pytest
import torch

from mtp_fast.ops.few_row_linear import few_row_linear

MAX_ROWS = 19  # two whole tiles of rows, and some

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (37, 100), (64, 256), (130, 31), (2000, 33)])
def test_against_float64(decode_level, dtype, shape):
    out, width = shape
    # Rows further apart than long, and what lies around them spoils a sum that takes it in.
    around = torch.full((out + 17, width + 3), torch.nan, dtype=dtype)
    weight = around[:out, :width].copy_(torch.randn(out, width))
    for rows in range(1, MAX_ROWS + 1):
        x = torch.randn(rows, width).to(dtype)
        exact = x.double() @ weight.double().t()
        granted = 3e-6 * (x.double().abs() @ weight.double().abs().t()) + 1e-6
        assert ((few_row_linear(x, weight) - exact).abs() <= granted).all()


@DTYPES
def test_a_row_has_the_same_bits_beside_any_others(decode_level, dtype):
    x, weight = torch.randn(MAX_ROWS, 200).to(dtype), torch.randn(301, 200).to(dtype)
    together = few_row_linear(x, weight)
    for rows in range(1, MAX_ROWS):
        assert torch.equal(few_row_linear(x[:rows], weight), together[:rows])
        assert torch.equal(few_row_linear(x[rows:], weight), together[rows:])


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3, 5), "x: expected shape"),
        (torch.zeros(4, 3).t(), "weight: expected contiguous rows"),
        (torch.zeros(3, 4, device="meta"), "x and weight: expected the CPU"),
    ],
    ids=["width", "transposed", "device"],
)
def test_bad_input(weight, message):
    with pytest.raises(ValueError, match=message):
        few_row_linear(torch.zeros(2, 4), weight)
    with pytest.raises(TypeError, match=r"x: expected torch\.float32"):
        few_row_linear(torch.zeros(2, 4).half(), torch.zeros(3, 4))
