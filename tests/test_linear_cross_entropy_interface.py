"""`linear_cross_entropy` among other code: autocast, compile, opcheck, strides, bad input."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import mtp_fast
from helpers import assert_as_good_as_eager, gradients
from mtp_fast.ops import chunked_loss, reference
from test_cross_entropy import DTYPES
from test_linear_cross_entropy import problem


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """The products run in the autocast dtype; gradients come back in float32, once rounded."""
    x, weight, bias, target, _ = problem(40, 16, 90)

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return mtp_fast.linear_cross_entropy(x, w, target, linear_bias=b)

    def eager(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        low = dtype if x.dtype == torch.float32 else torch.float64
        return reference.linear_cross_entropy(x.to(low), w.to(low), target, linear_bias=b.to(low))

    assert_as_good_as_eager(loss, eager, [x, weight, bias])
    got = gradients(loss, [x, weight, bias])
    assert [g.dtype for g in got] == [torch.float32] * 4
    low_x = x.to(dtype)
    mixed = gradients(loss, [low_x, weight, bias])
    assert mixed[1].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_into_one_graph(reduction: str, dtype: torch.dtype) -> None:
    x, weight, bias, target, _ = problem(40, 16, 90, dtype)

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        value, stats = mtp_fast.linear_cross_entropy(
            x * 2, w, target, linear_bias=b, reduction=reduction, return_stats=True
        )
        return value + 0 * stats.lse.sum()

    leaves = [x, weight, bias]
    upstream = torch.randn(40) if reduction == "none" else None
    compiled = gradients(torch.compile(loss, fullgraph=True), leaves, upstream)
    for a, b in zip(compiled, gradients(loss, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_compiles_under_autocast() -> None:
    x, weight, _, target, _ = problem(40, 16, 90)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return mtp_fast.linear_cross_entropy(x * 2, w, target)

    compiled = gradients(torch.compile(loss, fullgraph=True), [x, weight])
    for a, b in zip(compiled, gradients(loss, [x, weight]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("stacked", [False, True])
def test_opcheck(reduction: str, stacked: bool) -> None:
    heads = 1 if reduction == "none" else 2
    hidden = [torch.randn(2, 5, 4, requires_grad=True) for _ in range(heads)]
    if stacked:
        hidden = [torch.stack(hidden).detach().requires_grad_()]
    weight, bias = torch.randn(11, 4, requires_grad=True), torch.randn(11, requires_grad=True)
    labels = torch.randint(0, 11, (2, 5))
    arguments = (
        *(hidden, weight, bias, labels, torch.zeros_like(labels), torch.rand(11)),
        *(torch.rand(2, 5), None, None, 1, reduction, -100, 0.1, 1e-3, 5.0),
        *(torch.float32, None if stacked else 200, False, True, [reduction != "none"] * 3),
    )
    if reduction == "none":
        arguments = (*arguments[:-1], [True] * 3)
    torch.library.opcheck(torch.ops.mtp_fast.linear_cross_entropy.default, arguments)
    torch.library.opcheck(
        torch.ops.mtp_fast.scale_gradient.default,
        (torch.randn(3, 4), torch.tensor(2.0), torch.bfloat16),
    )


def test_compiled_graph_chooses_its_chunks_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(40, 16, requires_grad=True), torch.randn(90, 16)
    target = torch.randint(90, (40,))
    loss = torch.compile(
        lambda x: mtp_fast.linear_cross_entropy(x, weight, target),
        fullgraph=True,
        backend="aot_eager",
    )
    sizes: list[int] = []
    run_rows = chunked_loss.run_rows
    monkeypatch.setattr(
        chunked_loss, "run_rows", lambda z, *a, **k: sizes.append(len(z)) or run_rows(z, *a, **k)
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (40, 1):
            monkeypatch.setattr(chunked_loss, "default_chunk_bytes", lambda w, r=rows: r * 90 * 4)
            loss(x)
    assert sizes == [40, *[1] * 40]


MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("vocab", "dim", "itemsize", "unused", "expected"),
    [
        (128_256, 4096, 2, 20 * GIB, 4096 * 128_256 * 2),
        (128_256, 4096, 2, math.inf, 4096 * 128_256 * 2),
        (49_152, 576, 2, 20 * GIB, 7281 * 49_152 * 2),  # rows x d fills the device
        (256, 1024, 2, 20 * GIB, 256 * MIB),
        (256_000, 4096, 4, 100 * GIB, 2 * GIB),
        (256_000, 64, 2, 100 * GIB, 2 * GIB),
        (128_256, 4096, 2, 3 * GIB, 4096 * 128_256),  # 501 of 768 MiB
        (32_000, 2048, 2, 700 * MIB, 128 * MIB),
        (128_256, 4096, 2, 2 * MIB, 4096 * 128_256 * 2 >> 11),
        (128_256, 4096, 2, 0, 128_256 * 2),
        (128_256, 4096, 2, -5, 128_256 * 2),
        (1 << 30, 8, 4, 100 * GIB, 4 * GIB),
        (5, 0, 4, 8 * GIB, 256 * MIB),
    ],
)
def test_cuda_chunk(vocab: int, dim: int, itemsize: int, unused: float, expected: int) -> None:
    """Rows for efficient products, within bounds, in a quarter of what is unused, at least one."""
    chunk = chunked_loss.cuda_chunk_bytes(vocab, dim, itemsize, unused)
    assert chunk == expected
    assert chunk <= max(unused / 4, vocab * itemsize)


def test_what_is_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's free memory and the allocator's; not asked for while a graph is captured."""
    answers = {
        "mem_get_info": (100, 1000),
        "memory_reserved": 70,
        "memory_allocated": 30,
        "get_allocator_backend": "native",
        "is_current_stream_capturing": False,
    }
    for name in answers:
        monkeypatch.setattr(torch.cuda, name, lambda *_, n=name: answers[n])
    device = torch.device("cuda", 0)
    assert chunked_loss._unused_bytes(device) == 140
    answers["get_allocator_backend"] = "pluggable"
    assert chunked_loss._unused_bytes(device) == 100
    answers["is_current_stream_capturing"] = True
    assert chunked_loss._unused_bytes(device) == math.inf


def test_cpu_chunk_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(chunked_loss, "_unused_bytes")
    for dtype in DTYPES:
        assert chunked_loss.default_chunk_bytes(torch.empty(9, 3, dtype=dtype)) == 256 * MIB


@pytest.mark.parametrize(
    "loss", [mtp_fast.linear_cross_entropy, mtp_fast.multi_token_cross_entropy]
)
def test_docstrings_state_the_default_chunk(loss: Any) -> None:
    words = " ".join(loss.__doc__.split())
    assert "256 MiB on the CPU" in words
    assert (
        "max(4096, 2**22 / d) rows within 256 MiB and 2 GiB, halved until it is at most a quarter "
        "of the memory that is unused" in words
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_run_to_run(dtype: torch.dtype) -> None:
    x, weight, bias, target, _ = problem(200, 32, 3000, dtype)

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return mtp_fast.linear_cross_entropy(x, w, target, linear_bias=b, chunk_bytes=1 << 17)

    first = gradients(loss, [x, weight, bias])
    for _ in range(3):
        again = gradients(loss, [x, weight, bias])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_strides_and_leading_shapes() -> None:
    x, weight = torch.randn(3, 8, 20), torch.randn(8, 40)
    target = torch.randint(0, 40, (20, 3))

    def with_op(op: Any) -> Any:
        return lambda x, w: op(x.permute(2, 0, 1), w.t(), target, token_weight=target.float() / 40)

    assert_as_good_as_eager(
        with_op(mtp_fast.linear_cross_entropy),
        with_op(reference.linear_cross_entropy),
        [x, weight],
    )
    loss, stats = mtp_fast.linear_cross_entropy(
        x.permute(2, 0, 1), weight.t(), target, reduction="none", return_stats=True
    )
    assert loss.shape == stats.lse.shape == stats.correct.shape == (20, 3)
    assert stats.num_valid == 60
    vector = mtp_fast.linear_cross_entropy(x[0, :, 0], weight.t(), target[0, 0])
    torch.testing.assert_close(
        vector, reference.linear_cross_entropy(x[0, :, 0], weight.t(), target[0, 0])
    )
    with torch.inference_mode():
        assert mtp_fast.linear_cross_entropy(x.permute(2, 0, 1), weight.t(), target).isfinite()


def test_int32_targets() -> None:
    x, weight, _, target, _ = problem(30, 8, 50)
    assert torch.equal(
        mtp_fast.linear_cross_entropy(x, weight, target),
        mtp_fast.linear_cross_entropy(x, weight, target.int()),
    )


X, WEIGHT, TARGET = torch.randn(4, 3), torch.randn(9, 3), torch.tensor([1, 2, 3, 4])


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "input: expected a tensor", {"input": None}),
        (ValueError, r"input: expected shape \(..., d\)", {"input": torch.tensor(1.0)}),
        (TypeError, "input: expected .*got torch.float64", {"input": X.double()}),
        (ValueError, "linear_weight: .*d = 3", {"linear_weight": torch.randn(9, 4)}),
        (ValueError, "linear_weight: .*V, d", {"linear_weight": torch.randn(9)}),
        (ValueError, "linear_weight: .*V > 0", {"linear_weight": torch.randn(0, 3)}),
        (TypeError, "linear_weight: expected torch.float32", {"linear_weight": WEIGHT.half()}),
        (ValueError, "linear_weight: expected device", {"linear_weight": WEIGHT.to("meta")}),
        (ValueError, "linear_bias: expected shape", {"linear_bias": torch.randn(8)}),
        (TypeError, "linear_bias: expected torch.float32", {"linear_bias": WEIGHT[:, 0].half()}),
        (TypeError, "target: expected torch.int64", {"target": TARGET.float()}),
        (ValueError, "target: expected shape", {"target": TARGET[None]}),
        (IndexError, r"got 9 at \[0, 0\]", {"target": torch.tensor([9, 0, 0, 0])}),
        (ValueError, "chunk_bytes: .*> 0, got 0", {"chunk_bytes": 0}),
        (ValueError, "chunk_bytes: .*> 0, got -5", {"chunk_bytes": -5}),
        (TypeError, "chunk_bytes: expected an int", {"chunk_bytes": 1e6}),
        (ValueError, "softcap", {"softcap": -30.0}),
        (ValueError, "label_smoothing", {"label_smoothing": -0.1}),
        (ValueError, "weight: .*requires grad", {"weight": torch.ones(9, requires_grad=True)}),
        (ValueError, "token_weight: .*grad", {"token_weight": torch.ones(4, requires_grad=True)}),
        (ValueError, "num_items: goes with", {"num_items": 4, "reduction": "none"}),
        (ValueError, "reduction: expected one of", {"reduction": None}),
    ],
)
def test_bad_input(
    monkeypatch: pytest.MonkeyPatch,
    error: type[Exception],
    message: str,
    arguments: dict[str, Any],
) -> None:
    def no_work(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done before the arguments were checked")

    monkeypatch.setattr(chunked_loss, "run_rows", no_work)
    given = {"input": X, "linear_weight": WEIGHT, "target": TARGET}
    with pytest.raises(error, match=message):
        mtp_fast.linear_cross_entropy(**(given | arguments))
