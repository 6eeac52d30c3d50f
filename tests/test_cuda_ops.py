"""The ops on their CUDA road: the emulated kernels under the same Python, on CPU tensors."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import emulator
import mtp_fast
from mtp_fast.ops import _common, reference

needs_emulator = pytest.mark.skipif(not emulator.AVAILABLE, reason="needs the sources and x86-64")


@pytest.fixture
def emulated(monkeypatch):
    em = emulator.load()
    em.install(monkeypatch)
    return em


@contextmanager
def no_sync():
    """Raise where the host would wait for a value of the device."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the host waits for the device")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, refuse)
        yield


def problem(rows=64, dim=24, vocab=301):
    x = torch.randn(rows, dim, requires_grad=True)
    weight = torch.randn(vocab, dim, requires_grad=True)
    target = torch.randint(vocab, (rows,))
    target[::5] = -100
    return x, weight, target


@needs_emulator
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy_does_not_wait(emulated, reduction):
    x, weight, target = problem()
    options = {
        "reduction": reduction,
        "weight": torch.rand(len(weight)) + 0.5,
        "label_smoothing": 0.1,
        "token_weight": torch.rand(len(target)),
    }
    expected = reference.linear_cross_entropy(x.double(), weight.double(), target, **options)
    counters = emulated.measure()
    with no_sync():
        loss, stats = mtp_fast.linear_cross_entropy(
            x, weight, target, chunk_bytes=16 * len(weight) * 4, return_stats=True, **options
        )
    assert counters.launches == 4
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert int(stats.num_valid) == 51


@needs_emulator
def test_gradients_match(emulated):
    x, weight, target = problem()
    loss = mtp_fast.linear_cross_entropy(x, weight, target, chunk_bytes=16 * len(weight) * 4)
    expected = reference.linear_cross_entropy(x.double(), weight.double(), target)
    for ours, truth in zip(
        torch.autograd.grad(loss, (x, weight)),
        torch.autograd.grad(expected, (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)


@needs_emulator
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nan_in_ignored_rows_does_not_leak(emulated, reduction):
    x, weight, target = problem()
    with torch.no_grad():
        x[target == -100] = float("nan")
    loss = mtp_fast.linear_cross_entropy(x, weight, target, reduction=reduction)
    d_x, d_weight = torch.autograd.grad(loss.sum(), (x, weight))
    assert bool(loss.isfinite().all())
    assert bool(d_weight.isfinite().all())
    assert bool((d_x[target == -100] == 0).all())


@needs_emulator
def test_targets_out_of_range(emulated):
    logits, target = torch.randn(3, 10), torch.tensor([1, 10, -5])
    loss = mtp_fast.cross_entropy(logits, target, reduction="none")
    assert loss.isnan().tolist() == [False, True, True]
    with pytest.raises(IndexError, match=r"got 10 at \[1\]"):
        mtp_fast.cross_entropy(logits, target, check_targets=True)


def test_cpu_build_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(_common, "_C", SimpleNamespace())
    tensor = SimpleNamespace(is_cuda=True, device="cuda:0")
    with pytest.raises(RuntimeError, match=r"this build is for the CPU only.*nvcc"):
        _common.call_kernel("cross_entropy", tensor)
