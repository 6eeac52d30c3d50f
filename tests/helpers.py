"""What the tests of the losses share: truth in float64, and how far eager PyTorch is from it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mtp_fast.ops import _common

# For scripts that measure memory: reset and read the peak of resident memory, in bytes.
PEAK_MEMORY = """
from pathlib import Path
def peak():
    status = Path("/proc/self/status").read_text()
    return int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1]) * 1024
def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")
    return peak()
"""

Loss = Callable[..., Tensor]


def emulated() -> bool:
    """Whether the ops run their CUDA kernels on the emulator (pytest --emulated)."""
    return _common.on_cuda(torch.empty(0))


def draws(count: int) -> int:
    """How many sequences a statistical test draws: the emulator has time for a 1000th."""
    return max(200, count // 1000) if emulated() else count


def gradients(loss: Loss, leaves: Sequence[Tensor], upstream: Tensor | None = None) -> list[Tensor]:
    """[loss, d(leaf) ...] of loss(*leaves)."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = loss(*leaves)
    upstream = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def assert_as_good_as_eager(
    ours: Loss,
    reference: Loss,
    leaves: Sequence[Tensor],
    upstream: Tensor | None = None,
    granted: float = 1e-6,
    terms: float = 0.0,
) -> None:
    """Our error against float64 is at most twice that of eager PyTorch in the leaves' dtype.

    The reference is run in float64 for the truth and in the leaves' own dtype for eager's error.
    Errors are root mean squares over a tensor (three times eager's for the largest single error);
    one rounding of the largest value, at least `granted` times it, is allowed on top. Where sums
    may cancel, `terms` is the size of what is summed, to be taken for the largest value.
    """
    truth = gradients(reference, [leaf.double() for leaf in leaves], upstream)
    eager = gradients(reference, leaves, upstream)
    got = gradients(ours, leaves, upstream)
    for index, (g, e, t) in enumerate(zip(got, eager, truth, strict=True)):
        assert g.shape == t.shape
        assert g.isfinite().all()
        if not t.numel():
            continue
        error, eager_error = (g.double() - t).abs(), (e.double() - t).abs()
        largest = max(t.abs().max().item(), terms)
        rounding = max(torch.finfo(g.dtype).eps / 2, granted) * largest + 1e-7
        rms, eager_rms = (x.square().mean().sqrt() for x in (error, eager_error))
        assert rms <= 2 * eager_rms + rounding, f"value {index}"
        assert error.max() <= 3 * eager_error.max() + rounding, f"value {index}"


def small_problem_tolerance(leaves: Sequence[Tensor], upstream: Tensor) -> dict[str, float]:
    """Tolerance for a few rows and classes, where eager may round to the truth by luck."""
    terms = max([1.0, *[leaf.abs().max().item() for leaf in leaves if leaf.numel()]])
    size = upstream.abs().max().item() if upstream.numel() else 0.0
    eps = torch.finfo(leaves[0].dtype).eps
    return {"granted": max(2 * eps, 1e-6), "terms": terms * size}
