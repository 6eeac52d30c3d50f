"""The products of the chunked losses against float64, with torch's and with the kernel for AMX."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import mtp_fast
from helpers import assert_as_good_as_eager
from mtp_fast import _C
from mtp_fast.ops import gemm as module
from mtp_fast.ops import reference
from mtp_fast.ops.gemm import gemm

LEVELS = mtp_fast.build_info()["simd_levels"]
needs_amx = pytest.mark.skipif("amx" not in LEVELS, reason="the processor has no AMX")

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(params=["torch", "torch, in float32", pytest.param("amx", marks=needs_amx)])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make products of any size in torch, as where it has no 16-bit products, then with AMX."""
    monkeypatch.setattr(module, "SMALLEST_ON_AMX", 1)
    monkeypatch.setattr(module, "PIECE_BYTES", 1 << 17)
    in_float32 = request.param == "torch, in float32"
    monkeypatch.setattr(
        module, "torch_multiplies", lambda dtype: dtype == torch.float32 or not in_float32
    )
    _C.set_simd_level(LEVELS.index("amx") if request.param == "amx" else 0)
    yield request.param
    _C.set_simd_level(len(LEVELS) - 1)


def stored(rows: int, columns: int, dtype: torch.dtype, layout: str) -> Tensor:
    """A random matrix; what lies between its elements must not be used."""
    x = torch.randn(rows, columns).to(dtype)
    other = torch.nan if _C.has_amx() else 1e4  # oneDNN reads beyond a row, times 0
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "rows apart":
        return torch.cat([x, torch.full((rows, 3), other, dtype=dtype)], 1)[:, :columns]
    if layout == "neither contiguous":
        return torch.stack([x, torch.full_like(x, other)], 2)[:, :, 0]
    return x


LAYOUTS = ("contiguous", "transposed", "rows apart", "neither contiguous")
# Below, at and above a tile, a panel, a block of columns, a piece of inputs; several of each.
SHAPES = [
    (1, 1, 1),
    (15, 17, 31),
    (16, 16, 32),
    (33, 65, 33),
    (40, 577, 70),
    (70, 40, 342),
    (65, 1200, 1025),
    (2100, 33, 2100),
    (300, 700, 700),
]


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(products: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = shape
    for i, (of_a, of_b) in enumerate((a, b) for a in LAYOUTS for b in LAYOUTS):
        if i and max(shape) > 1024 and of_a != of_b:
            continue
        a, b = stored(m, k, dtype, of_a), stored(k, n, dtype, of_b)
        exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
        allowed = 2e-6 * size + 1e-6
        if dtype == torch.bfloat16 and products == "torch":
            allowed += 2**-8 * exact.abs()  # the product is rounded
        held = torch.randn(m + 2, n)
        for accumulate in (False, True):
            whole = held.clone()
            gemm(a, b, whole[1:-1], accumulate=accumulate)
            expected = exact + held[1:-1] if accumulate else exact
            assert ((whole[1:-1] - expected).abs() <= allowed).all(), (of_a, of_b)
            assert torch.equal(whole[[0, -1]], held[[0, -1]])


@needs_amx
@DTYPES
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (500, 3100, 2000),  # of float32, 36 MB of B
        (3100, 500, 2000),  # 36 MB of A, one block of columns
        (2100, 1200, 3000),  # 36 MB of A, whose piece goes through three
        (2100, 4300, 3000),  # the same for more columns than sums are kept of
    ],
    ids=str,
)
def test_operands_that_are_not_packed_at_once(
    layout: str, m: int, n: int, k: int, dtype: torch.dtype
) -> None:
    a, b = stored(m, k, dtype, layout), stored(k, n, dtype, layout)
    out = torch.empty(m, n)
    gemm(a, b, out)
    rows = torch.randint(0, m, (300,))
    torch.testing.assert_close(
        out[rows].double(), a[rows].double() @ b.double(), rtol=1e-5, atol=1e-4
    )
    assert out.isfinite().all()


@pytest.mark.parametrize("products", [pytest.param("amx", marks=needs_amx)], indirect=True)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(256, 300, 8), (64, 2048, 576), (64, 300, 8192)], ids=str
)
@pytest.mark.parametrize("values", ["normal", "positive", "of all sizes"])
def test_no_less_exact_than_torch(products: str, m: int, n: int, k: int, values: str) -> None:
    """A product that is left out, or small ones that a large sum swallows, cost digits."""
    a, b = torch.randn(m, k), torch.randn(k, n)
    if values == "positive":
        a, b = a.abs(), b.abs()
    if values == "of all sizes":
        a, b = a * (8 * torch.randn(m, k)).exp(), b * (8 * torch.randn(k, n)).exp()
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    out = torch.empty(m, n)
    gemm(a, b, out)

    def error(x: Tensor) -> float:
        return float(((x - exact) / size).square().mean().sqrt())

    assert error(out) <= max(1.25 * error(a @ b), 2**-24)


@needs_amx
@pytest.mark.parametrize(
    ("shape", "dtype", "out_dtype", "on_amx"),
    [
        ((256, 257, 258), torch.float32, torch.float32, True),
        ((255, 300, 300), torch.float32, torch.float32, False),
        ((300, 255, 300), torch.float32, torch.float32, False),
        ((300, 300, 255), torch.float32, torch.float32, False),
        ((2, 3, 4), torch.bfloat16, torch.float32, True),
        ((300, 300, 300), torch.bfloat16, torch.bfloat16, False),
        ((300, 300, 300), torch.float16, torch.float32, False),
    ],
)
def test_which_products_are_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    on_amx: bool,
) -> None:
    m, n, k = shape
    calls, kernel = [], _C.gemm_amx
    monkeypatch.setattr(_C, "gemm_amx", lambda *a: calls.append(a) or kernel(*a))
    for level in (LEVELS.index("amx"), 0):
        calls.clear()
        _C.set_simd_level(level)
        gemm(
            torch.ones(m, k, dtype=dtype),
            torch.ones(k, n, dtype=dtype),
            out := torch.empty(m, n, dtype=out_dtype),
        )
        assert len(calls) == (on_amx and level > 0)
        assert (out == k).all()
    _C.set_simd_level(len(LEVELS) - 1)


@DTYPES
def test_the_same_bits_with_any_number_of_threads(products: str, dtype: torch.dtype) -> None:
    a, b, out = stored(700, 2000, dtype, "transposed"), stored(2000, 600, dtype, "contiguous"), []
    threads = torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        out.append(torch.empty(700, 600))
        gemm(a, b, out[-1])
    torch.set_num_threads(threads)
    if _C.has_amx():
        assert torch.equal(out[0], out[1])
        assert torch.equal(out[0], out[2])
    torch.testing.assert_close(out[0], out[2])


@DTYPES
def test_numbers_that_are_not_finite_do_not_get_lost(products: str, dtype: torch.dtype) -> None:
    inner = 64 if products == "torch" else 50  # oneDNN reads beyond a row of 50, times 0
    for bad in (torch.nan, torch.inf, -torch.inf):
        a, b = torch.randn(40, inner).to(dtype), torch.randn(inner, 60).to(dtype)
        a[3, 7] = b[5, 9] = bad
        out = torch.full((40, 60), torch.nan)
        gemm(a, b, out)
        finite = out.isfinite()
        assert not finite[3].any()
        assert not finite[:, 9].any()
        assert finite.sum() == 39 * 59


@pytest.mark.parametrize(
    ("value", "other"), [(torch.finfo(torch.float32).max, 1e-30), (1e-30, 1e30)]
)
def test_numbers_at_the_ends_of_the_range(products: str, value: float, other: float) -> None:
    a, b, out = torch.full((40, 50), value), torch.rand(50, 60) * other, torch.empty(40, 60)
    gemm(a, b, out)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
def test_bias(products: str, dtype: torch.dtype) -> None:
    a, b, bias = torch.randn(40, 50).to(dtype), torch.randn(50, 60).to(dtype), torch.randn(60)
    out = torch.full((40, 60), torch.nan, dtype=dtype)
    gemm(a, b, out, bias=bias.to(dtype))
    expected = a.double() @ b.double() + bias.to(dtype).double()
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
    assert not out.isnan().any()


@pytest.mark.parametrize("products", ["torch, in float32"], indirect=True)
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(999, 60, 70), (60, 999, 70), (60, 70, 999), (150, 150, 150)], ids=str
)
def test_16_bit_results_are_rounded_once(
    products: str, m: int, n: int, k: int, dtype: torch.dtype
) -> None:
    a, b = stored(m, k, dtype, "transposed"), stored(k, n, dtype, "rows apart")
    bias, held = torch.randn(n).to(dtype), torch.randn(m, n).to(dtype)
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    for options in ({}, {"bias": bias}, {"accumulate": True}):
        out = held.clone() if "accumulate" in options else torch.full_like(held, torch.nan)
        gemm(a, b, out, **options)
        expected = exact + (bias if "bias" in options else held if options else 0)
        allowed = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-6 * size + 1e-6
        assert ((out - expected).abs() <= allowed).all(), list(options)


@pytest.mark.parametrize("products", ["torch, in float32"], indirect=True)
@pytest.mark.parametrize("shape", [(0, 5, 7), (5, 0, 7), (5, 7, 0)], ids=str)
def test_sizes_of_zero(products: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b = torch.ones(m, k).bfloat16(), torch.ones(k, n).bfloat16()
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full((m, n), torch.nan, dtype=dtype)
        gemm(a, b, out)
        assert (out == 0).all()


def test_torch_is_asked_for_the_products_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = []
    monkeypatch.setattr(module, "_in_float32", lambda *_, **__: ours.append(1))
    expected = []
    for dtype, has in (
        (torch.float32, lambda: True),
        (torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported),
        (torch.float16, torch.ops.mkldnn._is_mkldnn_fp16_supported),
    ):
        x = torch.ones(8, 8, dtype=dtype)
        gemm(x, x, torch.empty_like(x))
        expected += [1] * (not has())
    assert ours == expected


@DTYPES
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"label_smoothing": 0.1}], ids=str)
def test_losses_are_made_of_them(
    products: str, dtype: torch.dtype, options: dict[str, float]
) -> None:
    x, weight = torch.randn(200, 48).to(dtype), (torch.randn(333, 48) * 0.2).to(dtype)
    bias = torch.randn(333).to(dtype)
    target = torch.randint(0, 333, (200,))
    target[::3] = -100
    assert_as_good_as_eager(
        lambda x, w, b: mtp_fast.linear_cross_entropy(
            x, w, target, linear_bias=b, chunk_bytes=70 * 333 * 4, **options
        ),
        lambda x, w, b: reference.linear_cross_entropy(x, w, target, linear_bias=b, **options),
        [x, weight, bias],
    )
