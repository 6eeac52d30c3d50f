"""`linear_cross_entropy`: against float64, and where other implementations go wrong."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mtp_fast
from helpers import PEAK_MEMORY, assert_as_good_as_eager, gradients, small_problem_tolerance
from mtp_fast.ops import chunked_loss, reference
from test_cross_entropy import DTYPES, OPTIONS, with_tensors


def problem(
    rows: int, dim: int, vocab: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Input, weight, bias, target and the tensors of the options."""
    x = torch.randn(rows, dim).to(dtype)
    weight = (torch.randn(vocab, dim) * dim**-0.5).to(dtype)
    bias = torch.randn(vocab).to(dtype)
    target = torch.randint(0, vocab, (rows,))
    target[torch.rand(rows) < 0.25] = -100
    return x, weight, bias, target, {"weight": torch.rand(vocab), "token_weight": torch.rand(rows)}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_float64(dtype: torch.dtype, reduction: str, options: dict[str, Any]) -> None:
    x, weight, bias, target, tensors = problem(53, 24, 211, dtype)
    options = with_tensors(options, tensors) | {"reduction": reduction}
    upstream = torch.randn(53) if reduction == "none" else torch.tensor(-0.7)
    for chunk_bytes in (None, 9 * 211 * 4):
        assert_as_good_as_eager(
            lambda x, w, b, c=chunk_bytes: mtp_fast.linear_cross_entropy(
                x, w, target, linear_bias=b, chunk_bytes=c, **options
            ),
            lambda x, w, b: reference.linear_cross_entropy(x, w, target, linear_bias=b, **options),
            [x, weight, bias],
            upstream,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_is_float32_and_the_same_at_1_and_256_chunks(dtype: torch.dtype) -> None:
    """torch's own op adds a bfloat16 loss up in bfloat16: 14 % off at 256 chunks."""
    x, weight, _, target, _ = problem(256, 32, 400, dtype)
    target = target.abs()
    one, many = (
        gradients(
            lambda x, w, c=chunk_bytes: mtp_fast.linear_cross_entropy(x, w, target, chunk_bytes=c),
            [x, weight],
        )
        for chunk_bytes in (1 << 30, 1)
    )
    assert one[0].dtype == torch.float32
    assert abs(one[0] - many[0]) <= 1e-5 * one[0]
    logits = F.linear(x, weight)
    truth = F.cross_entropy(logits.double(), target)
    eager = F.cross_entropy(logits.float(), target)
    assert abs(one[0] - truth) <= 2 * abs(eager - truth) + 1e-6 * truth


def test_float32_loss_is_within_1e_5() -> None:
    x, weight, bias, target, _ = problem(1000, 64, 5000)
    truth = reference.linear_cross_entropy(
        x.double(), weight.double(), target, linear_bias=bias.double()
    )
    ours = mtp_fast.linear_cross_entropy(x, weight, target, linear_bias=bias)
    assert abs(ours - truth) < 1e-5 * truth


@pytest.mark.parametrize("dim", [1, 3, 17, 64])
@pytest.mark.parametrize("vocab", [2, 3, 1000, 32003])
@pytest.mark.parametrize("rows", [1, 2, 31])
def test_any_shape(rows: int, vocab: int, dim: int) -> None:
    x, weight, _, target, _ = problem(rows, dim, vocab)
    target[0] = vocab - 1
    assert_as_good_as_eager(
        lambda x, w: mtp_fast.linear_cross_entropy(x, w, target, chunk_bytes=5 * vocab * 4),
        lambda x, w: reference.linear_cross_entropy(x, w, target),
        [x, weight],
        # MKL's product of a few rows adds 32003 terms up in order: 1e-5 of error, ours or eager's.
        granted=1e-6 if vocab < 32003 else 1e-5,
    )


def test_largest_vocabulary() -> None:
    x, weight, _, target, _ = problem(6, 8, 262144, torch.bfloat16)
    assert_as_good_as_eager(
        lambda x, w: mtp_fast.linear_cross_entropy(x, w, target),
        lambda x, w: reference.linear_cross_entropy(x, w, target),
        [x, weight],
    )


def test_drop_in_for_torch() -> None:
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    x, weight, bias, target, tensors = problem(37, 16, 90)
    shared: list[dict[str, Any]] = [
        {},
        {"reduction": "sum", "linear_bias": bias},
        {"reduction": "none", "ignore_index": 3},
        {"weight": tensors["weight"], "ignore_index": None},
        {"label_smoothing": 0.2},
    ]
    for arguments in shared:
        kept = target.abs() % 90 if "ignore_index" in arguments else target
        theirs = gradients(
            lambda x, w, a=arguments, t=kept: F.linear_cross_entropy(x, w, t, **a), [x, weight]
        )
        ours = gradients(
            lambda x, w, a=arguments, t=kept: mtp_fast.linear_cross_entropy(x, w, t, **a),
            [x, weight],
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# What peers get wrong.


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_gives_the_same_gradient(reduction: str) -> None:
    """Liger and flash-linear-attention return it doubled; torch's own op raises."""
    x, weight, _, target, _ = problem(30, 8, 50)
    x.requires_grad_()
    weight.requires_grad_()
    loss = mtp_fast.linear_cross_entropy(x, weight, target, reduction=reduction).sum()
    first = torch.autograd.grad(loss, [x, weight], retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.mul_(3)  # a caller may clip what it was given
    second = torch.autograd.grad(loss, [x, weight])
    assert all(torch.equal(a, b) for a, b in zip(kept, second, strict=True))


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_tensors(frozen: str, reduction: str) -> None:
    """With a frozen input, Liger gives the weight no gradient and says nothing."""
    x, weight, bias, target, _ = problem(30, 8, 50)
    leaves = {"input": x, "weight": weight, "bias": bias}
    free = [name for name in leaves if name != frozen]

    def loss_of(op: Any) -> Any:
        def loss(*tensors: Tensor) -> Tensor:
            given = {name: leaf.to(tensors[0].dtype) for name, leaf in leaves.items()}
            given |= dict(zip(free, tensors, strict=True))
            return op(
                given["input"],
                given["weight"],
                target,
                linear_bias=given["bias"],
                reduction=reduction,
            ).sum()

        return loss

    assert_as_good_as_eager(
        loss_of(mtp_fast.linear_cross_entropy),
        loss_of(reference.linear_cross_entropy),
        [leaves[name] for name in free],
    )


@pytest.mark.parametrize(
    ("needed", "products"), [("", 1), ("input", 2), ("weight", 2), ("both", 3)]
)
def test_products_that_nobody_needs_are_not_made(
    monkeypatch: pytest.MonkeyPatch, needed: str, products: int
) -> None:
    x, weight, _, target, _ = problem(30, 8, 50, torch.bfloat16)
    x.requires_grad_(needed in ("input", "both"))
    weight.requires_grad_(needed in ("weight", "both"))
    made = []
    gemm = chunked_loss.gemm
    monkeypatch.setattr(
        chunked_loss, "gemm", lambda *a, **k: made.append(a[0].shape) or gemm(*a, **k)
    )
    mtp_fast.linear_cross_entropy(x, weight, target)
    assert len(made) == products
    # Ignored rows cost no products.
    assert made[0][0] == int((target != -100).sum())


@pytest.mark.parametrize("bad", [50, -1, -99, 1 << 40])
@pytest.mark.parametrize("place", [0, 29])
def test_target_out_of_range(bad: int, place: int) -> None:
    """Liger returns a finite loss."""
    x, weight, _, target, _ = problem(30, 8, 50)
    target[place] = bad
    with pytest.raises(IndexError, match=rf"target: .*\[0, 50\).*got {bad} at \[0, {place}\]"):
        mtp_fast.linear_cross_entropy(x, weight, target)


def test_upstream_gradient_scales() -> None:
    x, weight, _, target, _ = problem(30, 8, 50)
    loss = lambda x, w: mtp_fast.linear_cross_entropy(x, w, target)  # noqa: E731
    unit, scaled = gradients(loss, [x, weight]), gradients(loss, [x, weight], torch.tensor(-3.0))
    for a, b in zip(unit[1:], scaled[1:], strict=True):
        torch.testing.assert_close(-3 * a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(reduction: str) -> None:
    """F.cross_entropy's mean is NaN here."""
    x, weight, bias, target, _ = problem(30, 8, 50)
    x[:] = float("nan")
    loss, dx, dw, db = gradients(
        lambda x, w, b: mtp_fast.linear_cross_entropy(
            x, w, torch.full_like(target, -100), linear_bias=b, reduction=reduction
        ),
        [x, weight, bias],
    )
    assert (loss == 0).all()
    for grad in (dx, dw, db):
        assert (grad == 0).all()


def test_nan_in_ignored_rows_stays_there() -> None:
    x, weight, _, target, _ = problem(30, 8, 50)
    dirty = x.clone()
    dirty[target == -100] = float("nan")
    loss = lambda x, w: mtp_fast.linear_cross_entropy(x, w, target)  # noqa: E731
    for clean, got in zip(
        gradients(loss, [x, weight]), gradients(loss, [dirty, weight]), strict=True
    ):
        assert torch.equal(clean, got)


def test_no_rows() -> None:
    for reduction in ("mean", "sum", "none"):
        x, weight, _, target, _ = problem(0, 8, 50)
        loss, dx, dw = gradients(
            lambda x, w, t=target, r=reduction: mtp_fast.linear_cross_entropy(x, w, t, reduction=r),
            [x, weight],
        )
        assert loss.shape == ((0,) if reduction == "none" else ())
        assert loss.sum() == 0
        assert dx.shape == (0, 8)
        assert (dw == 0).all()


def test_bias_of_minus_infinity_masks_a_class() -> None:
    x, weight, bias, target, _ = problem(30, 8, 50)
    target = target.clamp(max=48)
    bias[49] = -float("inf")
    loss, dx, dw, db = gradients(
        lambda x, w, b: mtp_fast.linear_cross_entropy(x, w, target, linear_bias=b),
        [x, weight, bias],
    )
    without = gradients(
        lambda x, w, b: mtp_fast.linear_cross_entropy(x, w, target, linear_bias=b),
        [x, weight[:49], bias[:49]],
    )
    for a, b in zip((loss, dx, dw[:49], db[:49]), without, strict=True):
        torch.testing.assert_close(a, b)
    assert (dw[49] == 0).all()
    assert db[49] == 0


def test_float16_under_a_gradient_scaler() -> None:
    """Gradients of a mean, made in float16 in the forward pass, would underflow to nothing."""
    x, weight, _, target, _ = problem(2000, 32, 500, torch.float16)
    scale = torch.tensor(65536.0)
    assert_as_good_as_eager(
        lambda x, w: mtp_fast.linear_cross_entropy(x, w, target),
        lambda x, w: reference.linear_cross_entropy(x, w, target),
        [x, weight],
        scale,
    )


def test_weight_changed_before_the_backward_pass() -> None:
    x, weight, _, target, _ = problem(30, 8, 50)
    weight.requires_grad_()
    loss = mtp_fast.linear_cross_entropy(x, weight, target, reduction="none")
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_double_backward_is_refused() -> None:
    x, weight, _, target, _ = problem(5, 8, 50)
    x.requires_grad_()
    for reduction in ("mean", "none"):
        loss = mtp_fast.linear_cross_entropy(x, weight, target, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="once differentiable"):
            torch.autograd.grad(loss, x, create_graph=True)


def test_num_items_replaces_the_denominator() -> None:
    """Two micro-batches with num_items add up to one batch's mean."""
    x, weight, _, target, _ = problem(40, 8, 50)
    items = (target != -100).sum()
    whole = gradients(lambda w: mtp_fast.linear_cross_entropy(x, w, target), [weight])
    parts = [
        gradients(
            lambda w, s=rows: mtp_fast.linear_cross_entropy(x[s], w, target[s], num_items=items),
            [weight],
        )
        for rows in (slice(0, 7), slice(7, 40))
    ]
    for a, b, c in zip(whole, *parts, strict=True):
        torch.testing.assert_close(a, b + c)
    as_number = mtp_fast.linear_cross_entropy(x, weight, target, num_items=float(items))
    torch.testing.assert_close(as_number, whole[0])


MEMORY = """
import sys, torch, mtp_fast
rows, dim, vocab, chunk = map(int, sys.argv[2:])
dtype = getattr(torch, sys.argv[1])
x = torch.randn(rows, dim).to(dtype).requires_grad_()
weight = torch.randn(vocab, dim).to(dtype).requires_grad_()
target = torch.randint(0, vocab, (rows,))
warm = mtp_fast.linear_cross_entropy(x[:64], weight, target[:64], chunk_bytes=chunk)
warm.backward(); x.grad = weight.grad = None; del warm
before = reset_peak()
mtp_fast.linear_cross_entropy(x, weight, target, chunk_bytes=chunk).backward()
print(peak() - before - x.grad.nbytes - weight.grad.nbytes - chunk - vocab * dim * 4)
"""


# Environment variables that keep oneDNN and the kernels from products of 16 bits.
WITHOUT_16_BITS = {"ONEDNN_MAX_CPU_ISA": "AVX2", "MTP_FAST_SIMD": "portable"}


@pytest.mark.parametrize(
    ("dtype", "variables"),
    [("float32", {}), ("bfloat16", {}), ("bfloat16", WITHOUT_16_BITS)],
    ids=["float32", "bfloat16", "bfloat16, in float32"],
)
@pytest.mark.parametrize(
    "shape",
    [
        (65536, 64, 4096, 32 << 20),  # many rows
        (2048, 400, 32768, 128 << 20),  # products that AMX makes, where there is AMX
    ],
    ids=["rows", "large"],
)
def test_memory_bound(
    dtype: str, variables: dict[str, str], shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Above inputs and gradients: the chunk, float32 d(weight) and 64 MiB; eager takes 2 GiB."""
    extra = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY + MEMORY, dtype, *map(str, shape)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,  # outside the source tree
        env=os.environ | variables | {"OMP_NUM_THREADS": "2"},
    )
    assert int(extra.stdout) <= 64 << 20


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_problems(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    rows, dim, vocab = (draw(st.integers(low, high)) for low, high in ((0, 40), (1, 33), (2, 300)))
    x, weight, bias, target, tensors = problem(rows, dim, vocab, draw(st.sampled_from(DTYPES)))
    options = with_tensors(draw(st.sampled_from(list(OPTIONS.values()))), tensors)
    options["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["num_items"] = draw(st.floats(0.5, 1e4))
    chunk_bytes = draw(st.integers(1, 1 << 16))
    if draw(st.booleans()):
        x = x.t().contiguous().t()
    if draw(st.booleans()):
        weight = weight.repeat(1, 2)[:, ::2]
    upstream = torch.randn(rows) if options["reduction"] == "none" else torch.randn(())
    assert_as_good_as_eager(
        lambda x, w, b: mtp_fast.linear_cross_entropy(
            x, w, target, linear_bias=b, chunk_bytes=chunk_bytes, **options
        ),
        lambda x, w, b: reference.linear_cross_entropy(x, w, target, linear_bias=b, **options),
        [x, weight, bias],
        upstream,
        **small_problem_tolerance([x, weight, bias], upstream),
    )


def test_reference_gradient() -> None:
    """The truth that the kernel is compared with passes gradcheck."""
    x, weight, bias, target, tensors = problem(6, 3, 7, torch.float64)
    options = with_tensors(OPTIONS["all"], tensors)
    assert torch.autograd.gradcheck(
        lambda x, w, b: reference.linear_cross_entropy(x, w, target, linear_bias=b, **options),
        [t.requires_grad_() for t in (x, weight, bias)],
    )
