"""The row kernel and `cross_entropy` against float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mtp_fast
from helpers import assert_as_good_as_eager
from mtp_fast.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "class_weights": {"weight": "weight"},
    "token_weights": {"token_weight": "token_weight"},
    "all": {
        "label_smoothing": 0.2,
        "z_loss": 1e-2,
        "softcap": 3.0,
        "weight": "weight",
        "token_weight": "token_weight",
    },
}


def problem(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    logits = (3 * torch.randn(rows, vocab)).to(dtype)
    target = torch.randint(0, vocab, (rows,))
    target[torch.rand(rows) < 0.2] = -100
    return logits, target, {"weight": torch.rand(vocab), "token_weight": torch.rand(rows)}


def with_tensors(options: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {k: tensors.get(v, v) if isinstance(v, str) else v for k, v in options.items()}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_float64(simd_level: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    # 997 classes: a vector tail at every width; 3 rows more than any thread count divides.
    logits, target, tensors = problem(43, 997, dtype)
    options = with_tensors(options, tensors)
    for reduction in ("mean", "sum", "none"):
        upstream = torch.randn(43) if reduction == "none" else torch.tensor(2.5)
        for inplace in (False, True):
            assert_as_good_as_eager(
                lambda z, r=reduction, i=inplace: mtp_fast.cross_entropy(
                    z * 1, target, reduction=r, inplace_backward=i, **options
                ),
                lambda z, r=reduction: reference.cross_entropy(z, target, reduction=r, **options),
                [logits],
                upstream,
            )


@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 15, 16, 17, 127, 128, 129, 1000, 50257, 262144])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_vocabulary(simd_level: str, vocab: int, dtype: torch.dtype) -> None:
    rows = 5 if vocab > 1000 else 33
    logits, target, _ = problem(rows, vocab, dtype)
    target[0], target[1] = 0, vocab - 1
    assert_as_good_as_eager(
        lambda z: mtp_fast.cross_entropy(z, target, reduction="sum", label_smoothing=0.1),
        lambda z: reference.cross_entropy(z, target, reduction="sum", label_smoothing=0.1),
        [logits],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_that_keep_rising(simd_level: str, dtype: torch.dtype) -> None:
    """Exponentials are kept relative to a reference; here it must change with every block."""
    vocab = 16 * 8 * 150
    rising = torch.linspace(-1500.0, 1500.0, vocab)
    logits = torch.stack([rising, -rising, rising[torch.randperm(vocab)], 1000 * rising]).to(dtype)
    logits[3] = logits[3].clamp(-6e4, 6e4)
    target = torch.tensor([vocab - 1, 0, 77, vocab // 2])
    assert_as_good_as_eager(
        lambda z: mtp_fast.cross_entropy(z, target, reduction="sum"),
        lambda z: reference.cross_entropy(z, target, reduction="sum"),
        [logits],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(simd_level: str, dtype: torch.dtype) -> None:
    logits, target, _ = problem(64, 333, dtype)
    target[:32] = logits[:32].float().argmax(1)
    target[5] = -100
    logits[7, :] = 1.0  # all equal: the lowest id is the argmax
    target[7] = 0
    logits[8, :] = 1.0
    target[8] = 1
    logits[9, 200], logits[9, 300] = 99.0, 99.0
    target[9] = 300
    with torch.no_grad():
        _, stats = mtp_fast.cross_entropy(logits, target, return_stats=True)
    valid = target != -100
    truth = torch.logsumexp(logits.double(), 1)
    torch.testing.assert_close(stats.lse[valid].double(), truth[valid], rtol=1e-6, atol=1e-6)
    argmax = logits.float().argmax(1)
    assert torch.equal(stats.correct, (argmax == target) & valid)
    assert stats.correct[7]
    assert not stats.correct[8]
    assert not stats.correct[9]
    assert stats.num_valid == valid.sum()
    assert stats.lse[5] == 0


def test_extreme_logits(simd_level: str) -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[0.0, -inf, 1.0], [-inf] * 3, [nan, 0.0, 0.0], [1e30, -1e30, 0.0]])
    target = torch.tensor([2, 0, 1, 0])
    loss = mtp_fast.cross_entropy(logits, target, reduction="none")
    assert loss[0] == pytest.approx(0.31326166)
    assert loss[1:3].isnan().all()
    assert loss[3] == 0
    # A masked class under smoothing costs infinitely much, as in torch.
    assert mtp_fast.cross_entropy(logits[:1], target[:1], label_smoothing=0.1) == inf


def test_confident_rows_keep_their_small_loss(simd_level: str) -> None:
    logits = torch.zeros(1, 50, dtype=torch.float32)
    logits[0, 40] = 16.0
    loss = mtp_fast.cross_entropy(logits, torch.tensor([40]))
    truth = reference.cross_entropy(logits.double(), torch.tensor([40]))
    assert abs(loss.item() - truth.item()) < 2e-7  # of 5.5e-6


def test_inplace_backward_writes_over_the_logits() -> None:
    logits, target, _ = problem(20, 60, torch.float32)
    leaf = logits.clone().requires_grad_()
    mine = leaf * 1
    mtp_fast.cross_entropy(mine, target, inplace_backward=True).backward()
    assert torch.equal(mine.detach(), leaf.grad)
    assert not torch.equal(mine.detach(), logits)

    mine = leaf * 1
    loss = mtp_fast.cross_entropy(mine, target, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "view",
    [
        lambda z: z[:, ::2],
        lambda z: z.t().contiguous().t(),
        lambda z: z[::2],
        lambda z: z[:, 3:-5],
    ],
    ids=["every other class", "transposed", "every other row", "a slice"],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_strided_logits(view: Callable[[Tensor], Tensor], inplace: bool) -> None:
    base = torch.randn(24, 130)
    target = torch.randint(0, view(base).shape[1], (view(base).shape[0],))
    assert_as_good_as_eager(
        lambda z: mtp_fast.cross_entropy(view(z * 1), target, inplace_backward=inplace),
        lambda z: reference.cross_entropy(view(z), target),
        [base],
    )


def test_same_bits_at_any_thread_count() -> None:
    logits, target, _ = problem(37, 20000, torch.bfloat16)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            z = logits.clone().requires_grad_()
            loss = mtp_fast.cross_entropy(z, target, reduction="none")
            loss.sum().backward()
            results.append((loss.detach(), z.grad))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_into_one_graph(inplace: bool) -> None:
    logits, target, _ = problem(20, 60, torch.float32)

    def loss(z: Tensor) -> Tensor:
        return mtp_fast.cross_entropy(
            z * 2, target, label_smoothing=0.1, inplace_backward=inplace, return_stats=True
        )[0]

    assert_as_good_as_eager(
        torch.compile(loss, fullgraph=True),
        lambda z: reference.cross_entropy(z * 2, target, label_smoothing=0.1),
        [logits],
    )


def test_opcheck() -> None:
    logits, target, tensors = problem(9, 33, torch.float32)
    terms = (tensors["token_weight"], tensors["weight"], -100, 0.1, 1e-3, 5.0)
    ops = torch.ops.mtp_fast
    leaf = logits.clone().requires_grad_()
    torch.library.opcheck(ops.cross_entropy.default, (leaf, target, *terms, False, False))
    grad, stats = torch.randn(9), torch.rand(9, 4)
    torch.library.opcheck(ops.cross_entropy_backward.default, (grad, logits, stats, target, *terms))
    torch.library.opcheck(
        ops.cross_entropy_backward_.default, (grad, logits, stats, target, *terms)
    )


def test_double_backward_is_refused() -> None:
    logits, target, _ = problem(5, 9, torch.float32)
    z = logits.requires_grad_()
    loss = mtp_fast.cross_entropy(z, target)
    with pytest.raises(RuntimeError, match="once differentiable"):
        torch.autograd.grad(loss, z, create_graph=True)


def test_leading_shapes_and_empty_input() -> None:
    logits, target = torch.randn(2, 3, 4, 11), torch.randint(0, 11, (2, 3, 4))
    loss, stats = mtp_fast.cross_entropy(logits, target, reduction="none", return_stats=True)
    assert loss.shape == stats.lse.shape == stats.correct.shape == target.shape
    torch.testing.assert_close(loss, reference.cross_entropy(logits, target, reduction="none"))
    assert mtp_fast.cross_entropy(logits[0, 0, 0], target[0, 0, 0]).shape == ()
    empty = torch.empty(0, 11, requires_grad=True)
    loss = mtp_fast.cross_entropy(empty, torch.empty(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert empty.grad.shape == (0, 11)


LOGITS, TARGET = torch.randn(4, 9), torch.tensor([1, 2, 3, 4])


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "logits: expected a tensor", {"logits": [1.0]}),
        (TypeError, "logits: expected .*float16, got torch.float64", {"logits": LOGITS.double()}),
        (ValueError, "logits: .*V > 0", {"logits": LOGITS[:, :0]}),
        (TypeError, "target: expected .*int64.*got torch.float32", {"target": LOGITS[:, 0]}),
        (ValueError, "target: expected shape", {"target": TARGET[:3]}),
        (IndexError, r"target: .*got 9 at \[0\]", {"target": torch.tensor([9, 0, 0, 0])}),
        (IndexError, r"target: .*got -1 at \[3\]", {"target": torch.tensor([0, 0, 0, -1])}),
        (ValueError, "reduction: expected one of", {"reduction": "avg"}),
        (ValueError, "softcap: expected a finite number > 0", {"softcap": 0.0}),
        (ValueError, "softcap", {"softcap": float("nan")}),
        (ValueError, r"label_smoothing: .*\[0, 1\], got 1.5", {"label_smoothing": 1.5}),
        (TypeError, "label_smoothing: expected a number", {"label_smoothing": "a"}),
        (ValueError, "z_loss", {"z_loss": -1.0}),
        (TypeError, "ignore_index: expected an int", {"ignore_index": 0.5}),
        (ValueError, "weight: expected shape", {"weight": torch.ones(8)}),
        (TypeError, "weight: expected a floating-point", {"weight": torch.ones(9).int()}),
        (ValueError, "weight: .*requires grad", {"weight": torch.ones(9, requires_grad=True)}),
        (ValueError, "token_weight: .*grad", {"token_weight": torch.ones(4, requires_grad=True)}),
        (ValueError, "token_weight: expected shape", {"token_weight": torch.ones(4, 1)}),
        (ValueError, 'num_items: goes with reduction="mean"', {"num_items": 3, "reduction": "sum"}),
        (ValueError, "num_items: expected a finite number >= 0", {"num_items": -3}),
        (ValueError, "num_items: expected a 0-d tensor", {"num_items": torch.ones(2)}),
        (TypeError, "num_items: expected a number", {"num_items": "all"}),
        (ValueError, "target: expected device cpu", {"target": TARGET.to("meta")}),
    ],
)
def test_bad_input(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        mtp_fast.cross_entropy(**({"logits": LOGITS, "target": TARGET} | arguments))
