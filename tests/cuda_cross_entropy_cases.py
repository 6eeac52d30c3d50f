"""Cases of the CUDA row kernel, how it is called, and what it must give."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import emulator
import mtp_fast._C
from mtp_fast.ops import reference
from mtp_fast.ops._common import DTYPE_CODES

needs_emulator = pytest.mark.skipif(not emulator.AVAILABLE, reason="needs the sources and x86-64")

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the kernel."""

    vocab: int
    dtype: torch.dtype = torch.float32
    rows: int = 3
    offset: int = 0  # elements before the first row: misaligns it
    padding: int = 0  # elements between rows
    grad: str | None = "inplace"  # or "apart", "misaligned" (to the logits), None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    class_weight: bool = False
    row_weight: bool = False
    grad_output: bool = False
    spread: float = 3.0  # standard deviation of the logits


FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
EVERYTHING = {
    "label_smoothing": 0.1,
    "z_loss": 1e-3,
    "softcap": 5.0,
    "class_weight": True,
    "row_weight": True,
    "grad_output": True,
}
# 32 to 512 threads, one block and clusters of 2, 4 and 8, kept and streamed slices, all on sm_90;
# sm_80 streams the last two.
CASES = [
    Case(1),
    Case(2, BF16, padding=3),
    Case(7, HALF, offset=1),
    Case(33, FLOAT, offset=3, **EVERYTHING),
    Case(64, BF16, rows=9),
    Case(1000, HALF, offset=5, padding=1, **EVERYTHING),
    Case(1003, BF16, grad="apart"),
    Case(1003, FLOAT, grad="misaligned", offset=1),
    Case(1003, BF16, grad="misaligned", **EVERYTHING),
    Case(4099, HALF, grad=None, offset=1, **EVERYTHING),
    Case(12011, BF16, grad=None),
    Case(12011, FLOAT, spread=30.0),
    Case(20011, FLOAT, offset=2, **EVERYTHING),
    Case(49152, BF16, rows=2, z_loss=1e-3),
    Case(50257, FLOAT, rows=2, padding=2, label_smoothing=0.1),
    Case(128256, HALF, rows=2, offset=4),
    Case(110011, FLOAT, rows=1, label_smoothing=0.05, class_weight=True),
]
LARGEST = Case(480_001, FLOAT, rows=1, offset=1)  # more than a cluster of 8 can keep


def describe(value: object) -> str | None:
    if not isinstance(value, Case):
        return None
    used = [
        f"{field.name}={getattr(value, field.name)}".removeprefix("dtype=torch.")
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    ]
    return ",".join(used)


class Inputs:
    """The tensors of a case, made from its own seed, in buffers that are checked for overruns."""

    GUARD = 64  # elements on either side
    MARK = 77.0

    def __init__(self, case: Case, device: str = "cpu") -> None:
        random = torch.Generator().manual_seed(case.vocab + case.offset)
        n, v = case.rows, case.vocab
        normal = (torch.randn(n, v, generator=random) * case.spread).to(case.dtype)
        self.target = torch.randint(v, (n,), generator=random)
        if n > 0:
            self.target[0] = normal[0].float().argmax()
        if n > 1 and v > 8:  # two equal maxima, the target the later one: not the argmax
            normal[1, v // 2] = normal[1].max() + 1
            normal[1, v - 3] = normal[1, v // 2]
            self.target[1] = v - 3
        if n > 2:  # all equal: the first is the argmax
            normal[2] = 1.5
            self.target[2] = 0
        self.case, self.device = case, device
        self.row_weight = torch.rand(n, generator=random) + 0.5 if case.row_weight else None
        self.class_weight = torch.rand(v, generator=random) + 0.5 if case.class_weight else None
        self.grad_output = torch.randn(n, generator=random) if case.grad_output else None
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.logits = self.rows(case.offset)
        self.logits.copy_(normal)
        self.grad = None
        if case.grad == "inplace":
            self.grad = self.logits
        elif case.grad is not None:
            self.grad = self.rows(case.offset + (1 if case.grad == "misaligned" else 0))

    def rows(self, offset: int) -> Tensor:
        """(rows, vocab) in a buffer of its own, 16-byte aligned plus `offset` elements."""
        case = self.case
        stride = case.vocab + case.padding
        size = case.rows * stride + 2 * self.GUARD + offset
        buffer = torch.full((size,), self.MARK, dtype=case.dtype, device=self.device)
        rows = buffer.as_strided((case.rows, case.vocab), (stride, 1), self.GUARD + offset)
        self.buffers.append((buffer, rows))
        return rows

    def check_guards(self) -> None:
        for buffer, rows in self.buffers:
            rows.fill_(self.MARK)
            assert bool((buffer == self.MARK).all()), "written outside the rows"


@dataclasses.dataclass
class Results:
    loss: Tensor
    lse: Tensor
    correct: Tensor
    argmax: Tensor
    stats: Tensor  # (rows, 4): max, sum of exp(z - max), target logit, sum of class weight * z
    grad: Tensor | None


def call(
    kernel: Callable[..., None],
    *first: int,
    inputs: Inputs,
    ignore: int = IGNORED,
    saved: Tensor | None = None,
) -> Results:
    """Call an entry point; `first` is what comes before the parameters.

    With `saved` statistics it makes the gradient alone.
    """
    case, n = inputs.case, inputs.case.rows
    loss = torch.full((n,), 7.0, device=inputs.device)
    lse = torch.full_like(loss, 7.0)
    correct = torch.zeros(n, dtype=torch.bool, device=inputs.device)
    argmax = torch.full_like(correct, 7, dtype=torch.int64)
    stats = torch.full((n, 4), 7.0, device=inputs.device)
    weights = inputs.class_weight
    on_device = [
        tensor if tensor is None else tensor.to(inputs.device)
        for tensor in (
            inputs.target,
            inputs.row_weight,
            weights,
            None if weights is None else weights.sum(),
            inputs.grad_output,
            saved,
        )
    ]
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in on_device]
    grad = inputs.grad
    kernel(
        *first,
        DTYPE_CODES[case.dtype],
        inputs.logits.data_ptr(),
        inputs.logits.stride(0),
        0 if grad is None else grad.data_ptr(),
        0 if grad is None else grad.stride(0),
        n,
        case.vocab,
        *pointers,
        0,  # workspace
        loss.data_ptr(),
        lse.data_ptr(),
        correct.data_ptr(),
        argmax.data_ptr(),
        stats.data_ptr(),
        ignore,
        case.label_smoothing,
        case.z_loss,
        case.softcap,
    )
    if inputs.device != "cpu":
        torch.cuda.synchronize()
    copy = None if grad is None else grad.clone().cpu()
    inputs.check_guards()
    return Results(loss.cpu(), lse.cpu(), correct.cpu(), argmax.cpu(), stats.cpu(), copy)


def on_emulator(inputs: Inputs, **options: Any) -> Results:
    return call(emulator.load().C.cross_entropy_cuda, 0, 0, inputs=inputs, **options)


BACKENDS = [
    "cpu",
    pytest.param("emulated", marks=needs_emulator),
    pytest.param("cuda", marks=pytest.mark.cuda),
]


def run_on(
    backend: str,
    case: Case,
    prepare: Callable[[Inputs], None] = lambda inputs: None,
    merged: Tensor | None = None,
    **options: Any,
) -> Results:
    """Statistics and loss from one call; from them, or from `merged`, the gradient in another."""
    results = []
    for grad in (None, case.grad or "inplace"):
        inputs = Inputs(
            dataclasses.replace(case, grad=grad), "cuda" if backend == "cuda" else "cpu"
        )
        prepare(inputs)
        if results:
            options["saved"] = results[0].stats if merged is None else merged
        if backend == "emulated":
            results.append(on_emulator(inputs, **options))
        elif backend == "cuda":
            stream = torch.cuda.current_stream().cuda_stream
            kernel = mtp_fast._C.cross_entropy_cuda
            results.append(call(kernel, 0, stream, inputs=inputs, **options))
        else:
            threads = torch.get_num_threads()
            results.append(call(mtp_fast._C.cross_entropy, threads, inputs=inputs, **options))
    assert bool((results[1].stats == 7.0).all()), "the second call makes the gradient alone"
    return dataclasses.replace(results[0], grad=results[1].grad)


def truth(case: Case) -> Results:
    inputs = Inputs(case)
    z = inputs.logits.double().requires_grad_()
    capped = case.softcap * torch.tanh(z / case.softcap) if case.softcap else z
    loss = reference.cross_entropy(
        z,
        inputs.target,
        weight=inputs.class_weight,
        reduction="none",
        label_smoothing=case.label_smoothing,
        token_weight=inputs.row_weight,
        z_loss=case.z_loss,
        softcap=case.softcap or None,
    )
    upstream = torch.ones(case.rows) if inputs.grad_output is None else inputs.grad_output
    (grad,) = torch.autograd.grad(loss, z, upstream.double())
    # Equal maxima of the raw logits are equal after the softcap, and torch takes the first.
    argmax = inputs.logits.float().argmax(1)
    capped = capped.detach()
    weights = torch.ones(case.vocab) if inputs.class_weight is None else inputs.class_weight
    top = capped.amax(1)
    stats = torch.stack(
        [
            top,
            (capped - top[:, None]).exp().sum(1),
            capped.gather(1, inputs.target[:, None])[:, 0],
            (capped * weights).sum(1) if case.label_smoothing else torch.zeros(case.rows),
        ],
        dim=1,
    )
    correct = argmax == inputs.target
    return Results(loss.detach(), torch.logsumexp(capped, 1), correct, argmax, stats, grad)


def check(results: Results, expected: Results, case: Case) -> None:
    """Float32 rounding of quantities as large as the logits; one rounding to the storage type."""
    size = 1.0 + float(expected.lse.abs().max())
    torch.testing.assert_close(results.lse.double(), expected.lse, rtol=0, atol=2.5e-7 * size)
    torch.testing.assert_close(results.loss.double(), expected.loss, rtol=2e-6, atol=5e-7 * size)
    assert results.correct.tolist() == expected.correct.tolist()
    assert results.argmax.tolist() == expected.argmax.tolist()
    for part, rtol, atol in [(0, 3e-7, 0), (1, 3e-6, 0), (2, 3e-7, 1e-6), (3, 1e-5, 1e-6 * size)]:
        torch.testing.assert_close(
            results.stats[:, part].double(),
            expected.stats[:, part].double(),
            rtol=rtol,
            atol=atol * (case.vocab if part == 3 else 1),
        )
    if case.grad is None:
        return
    assert results.grad is not None
    assert expected.grad is not None
    # exp(z - lse) has the relative error of its argument's rounding.
    rounding = 2e-7 * (1.0 + case.spread) * 8
    storage = {FLOAT: 0.0, BF16: 2.0**-8, HALF: 2.0**-11}[case.dtype]
    smallest = 2.0**-25 if case.dtype == HALF else 0.0
    bound = (rounding + storage) * expected.grad.abs() + 3e-7 + smallest
    worst = float(((results.grad.double() - expected.grad).abs() / bound).max())
    assert worst <= 1.0, f"gradient off by {worst:.3g} times the bound"
