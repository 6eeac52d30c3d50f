"""`multi_token_cross_entropy` against the loop over heads in float64."""

import os
import subprocess
import sys
from collections.abc import Sequence
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

Problem = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


def problem(
    heads: int, batch: int, length: int, dim: int, vocab: int, dtype: torch.dtype = torch.float32
) -> Problem:
    """Hidden (n, B, T, d), weight, labels and the tensors of the options."""
    labels = torch.randint(0, vocab, (batch, length))
    labels[torch.rand(batch, length) < 0.2] = -100
    tensors = {
        "weight": torch.rand(vocab),
        "token_weight": torch.rand(batch, length),
        "document_ids": torch.randint(0, 2, (batch, length)).cumsum(1),
    }
    return (
        torch.randn(heads, batch, length, dim).to(dtype),
        (torch.randn(vocab, dim) * dim**-0.5).to(dtype),
        labels,
        tensors,
    )


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_float64(dtype: torch.dtype, options: dict[str, Any], documents: bool) -> None:
    hidden, weight, labels, tensors = problem(4, 3, 19, 16, 97, dtype)
    options = with_tensors(options, tensors)
    if documents:
        options["document_ids"] = tensors["document_ids"]
    for reduction in ("mean", "sum"):
        for head_weights in (None, [1.0, 0.3, -0.5, 0.0], torch.tensor([1e-3, 1.0, 2.0, 5.0])):
            options |= {"reduction": reduction, "head_weights": head_weights}
            for chunk_bytes in (None, 11 * 97 * 4):
                assert_as_good_as_eager(
                    lambda h, w, c=chunk_bytes, o=options: mtp_fast.multi_token_cross_entropy(
                        h, w, labels, chunk_bytes=c, **o
                    ),
                    lambda h, w, o=options: reference.multi_token_cross_entropy(h, w, labels, **o),
                    [hidden, weight],
                    torch.tensor(1.7),
                )


def test_head_k_at_t_is_scored_on_label_t_plus_1_plus_k() -> None:
    """Written out by hand, without the reference."""
    hidden, weight, _, _ = problem(3, 2, 7, 5, 11)
    labels = torch.randint(0, 11, (2, 7))
    losses = []
    for k in range(3):
        rows = [
            F.cross_entropy(hidden[k, b, t] @ weight.T, labels[b, t + 1 + k])
            for b in range(2)
            for t in range(7 - 1 - k)
        ]
        losses.append(torch.stack(rows).mean())
    loss, stats = mtp_fast.multi_token_cross_entropy(hidden, weight, labels, return_stats=True)
    torch.testing.assert_close(loss, sum(losses))
    torch.testing.assert_close(stats.loss, torch.stack(losses))
    assert stats.num_valid.tolist() == [12, 10, 8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_list_and_stacked_heads_agree(dtype: torch.dtype) -> None:
    hidden, weight, labels, _ = problem(3, 2, 9, 8, 30, dtype)
    stacked = gradients(
        lambda h, w: mtp_fast.multi_token_cross_entropy(h, w, labels), [hidden, weight]
    )
    listed = gradients(
        lambda w, *h: mtp_fast.multi_token_cross_entropy(h, w, labels),
        [weight, *hidden.unbind()],
    )
    assert torch.equal(stacked[0], listed[0])
    assert torch.equal(stacked[2], listed[1])
    assert torch.equal(stacked[1], torch.stack(listed[2:]))


def test_statistics() -> None:
    hidden, weight, labels, tensors = problem(3, 4, 20, 8, 12)
    options = {"document_ids": tensors["document_ids"], "head_weights": [1.0, 0.5, 0.25]}
    _, stats = mtp_fast.multi_token_cross_entropy(
        hidden, weight, labels, return_stats=True, **options
    )
    for k in range(3):
        target = labels[:, 1 + k :].clone()
        crosses = tensors["document_ids"][:, 1 + k :] != tensors["document_ids"][:, : -1 - k]
        target[crosses] = -100
        logits = F.linear(hidden[k, :, : -1 - k], weight)
        valid = target != -100
        assert stats.num_valid[k] == valid.sum()
        torch.testing.assert_close(
            stats.accuracy[k], (logits.argmax(-1) == target)[valid].float().mean()
        )
        torch.testing.assert_close(stats.loss[k], reference.cross_entropy(logits, target))
        assert not stats.loss.requires_grad


def test_single_head_is_the_linear_loss_on_shifted_labels() -> None:
    hidden, weight, labels, tensors = problem(1, 3, 15, 8, 40)
    token_weight = tensors["token_weight"]
    one = gradients(
        lambda h, w: mtp_fast.multi_token_cross_entropy(h, w, labels, token_weight=token_weight),
        [hidden, weight],
    )
    other = gradients(
        lambda h, w: mtp_fast.linear_cross_entropy(
            h[0, :, :-1], w, labels[:, 1:], token_weight=token_weight[:, 1:]
        ),
        [hidden, weight],
    )
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_heads_without_a_valid_position(length: int) -> None:
    hidden, weight, _, _ = problem(4, 2, length, 8, 20)
    labels = torch.randint(0, 20, (2, length))

    def loss(h: Tensor, w: Tensor) -> Tensor:
        value, stats = mtp_fast.multi_token_cross_entropy(h, w, labels, return_stats=True)
        assert stats.num_valid.tolist() == [2 * max(length - 1 - k, 0) for k in range(4)]
        assert stats.accuracy.isfinite().all()
        assert (stats.loss[stats.num_valid == 0] == 0).all()
        return value

    assert_as_good_as_eager(
        loss,
        lambda h, w: reference.multi_token_cross_entropy(h, w, labels),
        [hidden, weight],
    )


def test_num_items_for_each_head() -> None:
    hidden, weight, labels, _ = problem(3, 2, 9, 8, 20)
    for num_items in (7.0, torch.tensor(7.0), torch.tensor([3.0, 5.0, 9.0])):
        assert_as_good_as_eager(
            lambda h, w, n=num_items: mtp_fast.multi_token_cross_entropy(h, w, labels, num_items=n),
            lambda h, w, n=num_items: reference.multi_token_cross_entropy(
                h, w, labels, num_items=n
            ),
            [hidden, weight],
        )


def test_unused_first_label_may_be_anything() -> None:
    """Column 0 is nobody's target."""
    hidden, weight, labels, _ = problem(2, 2, 9, 8, 20)
    other = labels.clone()
    other[:, 0] = 999
    assert torch.equal(
        mtp_fast.multi_token_cross_entropy(hidden, weight, labels),
        mtp_fast.multi_token_cross_entropy(hidden, weight, other),
    )


def test_inputs_are_not_touched() -> None:
    hidden, weight, labels, tensors = problem(2, 2, 9, 8, 20)
    before = [t.clone() for t in (hidden, weight, labels, *tensors.values())]
    gradients(
        lambda h, w: mtp_fast.multi_token_cross_entropy(h, w, labels, **tensors), [hidden, weight]
    )
    after = (hidden, weight, labels, *tensors.values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_compiles_into_one_graph() -> None:
    hidden, weight, labels, _ = problem(3, 2, 9, 8, 20)

    def loss(w: Tensor, *heads: Tensor) -> Tensor:
        doubled = [h * 2 for h in heads]
        value, stats = mtp_fast.multi_token_cross_entropy(doubled, w, labels, return_stats=True)
        return value + 0 * stats.accuracy.sum()

    leaves = [weight, *hidden.unbind()]
    compiled = gradients(torch.compile(loss, fullgraph=True), leaves)
    for a, b in zip(compiled, gradients(loss, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_partly_frozen_heads() -> None:
    hidden, weight, labels, _ = problem(3, 2, 9, 8, 20)
    heads: Sequence[Tensor] = [h.clone() for h in hidden]
    heads[1].requires_grad_()
    mtp_fast.multi_token_cross_entropy(heads, weight, labels).backward()
    alone = heads[1].detach().clone().requires_grad_()
    reference.multi_token_cross_entropy([heads[0], alone, heads[2]], weight, labels).backward()
    torch.testing.assert_close(heads[1].grad, alone.grad)
    assert heads[0].grad is None


@pytest.mark.parametrize(
    ("most", "expected"),
    [(199, [192, 192, 150]), (185, [128] * 4 + [22]), (20, [20] * 26 + [14])],
    ids=["even", "below the even multiple", "below a multiple"],
)
def test_chunks_span_heads(monkeypatch: pytest.MonkeyPatch, most: int, expected: list[int]) -> None:
    """Three heads of 180, 178 and 176 rows in full chunks, of numbers that products like."""
    hidden, weight, _, _ = problem(3, 2, 91, 8, 20)
    labels = torch.randint(0, 20, (2, 91))
    sizes = []
    run_rows = chunked_loss.run_rows
    monkeypatch.setattr(
        chunked_loss, "run_rows", lambda z, *a, **k: sizes.append(len(z)) or run_rows(z, *a, **k)
    )
    mtp_fast.multi_token_cross_entropy(hidden, weight, labels, chunk_bytes=most * 20 * 4)
    assert sizes == expected


MEMORY = """
import torch, mtp_fast
heads, rows, dim, vocab, chunk = 4, 4096, 512, 16384, 16 << 20
hidden = torch.randn(heads, 1, rows, dim).requires_grad_()
weight = (torch.randn(vocab, dim) * 0.02).requires_grad_()
labels = torch.randint(0, vocab, (1, rows))
warm = mtp_fast.multi_token_cross_entropy(hidden[:, :, :64], weight, labels[:, :64],
                                          chunk_bytes=chunk)
warm.backward(); hidden.grad = weight.grad = None; del warm
before = reset_peak()
mtp_fast.multi_token_cross_entropy(hidden, weight, labels, chunk_bytes=chunk).backward()
print(peak() - before - hidden.grad.nbytes - weight.grad.nbytes - chunk - weight.nbytes)
"""


def test_four_heads_need_one_weight_gradient(tmp_path: Path) -> None:
    """d(weight) is 32 MiB here: four of them would not fit the bound."""
    extra = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY + MEMORY],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,  # outside the source tree
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    assert int(extra.stdout) <= 64 << 20


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_problems(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**31)))
    heads, batch, length, dim, vocab = (
        draw(st.integers(low, high)) for low, high in ((1, 5), (0, 4), (0, 12), (1, 17), (2, 70))
    )
    hidden, weight, labels, tensors = problem(
        heads, batch, length, dim, vocab, draw(st.sampled_from(DTYPES))
    )
    options = with_tensors(draw(st.sampled_from(list(OPTIONS.values()))), tensors)
    options["reduction"] = draw(st.sampled_from(["mean", "sum"]))
    if draw(st.booleans()):
        options["document_ids"] = tensors["document_ids"]
    if draw(st.booleans()):
        options["head_weights"] = torch.randn(heads)
    chunk_bytes = draw(st.integers(1, 1 << 14))
    upstream = torch.randn(())
    assert_as_good_as_eager(
        lambda h, w: mtp_fast.multi_token_cross_entropy(
            h, w, labels, chunk_bytes=chunk_bytes, **options
        ),
        lambda h, w: reference.multi_token_cross_entropy(h, w, labels, **options),
        [hidden, weight],
        upstream,
        **small_problem_tolerance([hidden, weight], upstream),
    )


HIDDEN, WEIGHT, LABELS = torch.randn(2, 3, 5, 4), torch.randn(9, 4), torch.randint(0, 9, (3, 5))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"hidden: expected shape \(n, B, T, d\)", {"hidden": HIDDEN[0]}),
        (ValueError, "hidden: expected at least one head", {"hidden": []}),
        (ValueError, r"hidden: expected shape .* n > 0", {"hidden": HIDDEN[:0]}),
        (TypeError, r"hidden\[1\]: expected a tensor", {"hidden": [HIDDEN[0], None]}),
        (ValueError, r"hidden\[0\]: expected shape \(B, T, d\)", {"hidden": [HIDDEN[0, 0]]}),
        (ValueError, r"hidden\[1\]: expected shape", {"hidden": [HIDDEN[0], HIDDEN[1, :2]]}),
        (TypeError, r"hidden\[1\]: expected torch.f", {"hidden": [HIDDEN[0], HIDDEN[1].half()]}),
        (TypeError, "hidden: expected .*got torch.float64", {"hidden": HIDDEN.double()}),
        (ValueError, "linear_weight: .*d = 4", {"linear_weight": WEIGHT.t()}),
        (ValueError, r"labels: expected shape \(B, T\) = \(3, 5\)", {"labels": LABELS[:, 1:]}),
        (TypeError, "labels: expected torch.int64", {"labels": LABELS.float()}),
        (IndexError, r"labels: .*got 9 at \[2, 3\]", {"labels": torch.full((3, 5), -100)}),
        (ValueError, "document_ids: expected shape", {"document_ids": LABELS[0]}),
        (TypeError, "document_ids: expected torch.int64", {"document_ids": LABELS.float()}),
        (ValueError, r"head_weights: expected shape \(n,\) = \(2,\)", {"head_weights": [1.0]}),
        (
            ValueError,
            "head_weights: .*requires grad",
            {"head_weights": torch.ones(2, requires_grad=True)},
        ),
        (ValueError, "token_weight: expected shape", {"token_weight": torch.ones(3, 4)}),
        (ValueError, "reduction: .*'none'", {"reduction": "none"}),
        (ValueError, r"num_items: .*\(2,\)", {"num_items": torch.ones(3)}),
        (ValueError, "chunk_bytes", {"chunk_bytes": -1}),
    ],
)
def test_bad_input(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    given = {"hidden": HIDDEN, "linear_weight": WEIGHT, "labels": LABELS} | arguments
    if error is IndexError:
        given["labels"][2, 4] = 9  # position t = 3 of head 0
    with pytest.raises(error, match=message):
        mtp_fast.multi_token_cross_entropy(**given)
