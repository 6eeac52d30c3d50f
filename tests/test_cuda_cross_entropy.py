"""The CUDA cross-entropy kernel, on the emulator and, with `-m cuda`, on a GPU.

Truth is the reference in float64, of the same rounded logits.
"""

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
    grad: Tensor | None


def call(
    kernel: Callable[..., None], *first: int, inputs: Inputs, ignore: int = IGNORED
) -> Results:
    """Call an entry point; `first` is what comes before the parameters."""
    case, n = inputs.case, inputs.case.rows
    loss = torch.full((n,), 7.0, device=inputs.device)
    lse = torch.full_like(loss, 7.0)
    correct = torch.zeros(n, dtype=torch.bool, device=inputs.device)
    on_device = [
        tensor if tensor is None else tensor.to(inputs.device)
        for tensor in (inputs.target, inputs.row_weight, inputs.class_weight, inputs.grad_output)
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
        ignore,
        case.label_smoothing,
        case.z_loss,
        case.softcap,
        0.0,  # class_weight_sum: the kernel's own
    )
    if inputs.device != "cpu":
        torch.cuda.synchronize()
    copy = None if grad is None else grad.clone().cpu()
    inputs.check_guards()
    return Results(loss.cpu(), lse.cpu(), correct.cpu(), copy)


def on_emulator(inputs: Inputs, **options: Any) -> Results:
    return call(emulator.load().C.cross_entropy_cuda, 0, 0, inputs=inputs, **options)


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
    correct = inputs.logits.float().argmax(1) == inputs.target
    return Results(loss.detach(), torch.logsumexp(capped, 1).detach(), correct, grad)


def check(results: Results, expected: Results, case: Case) -> None:
    """Float32 rounding of quantities as large as the logits; one rounding to the storage type."""
    size = 1.0 + float(expected.lse.abs().max())
    torch.testing.assert_close(results.lse.double(), expected.lse, rtol=0, atol=2.5e-7 * size)
    torch.testing.assert_close(results.loss.double(), expected.loss, rtol=2e-6, atol=5e-7 * size)
    assert results.correct.tolist() == expected.correct.tolist()
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


@pytest.fixture
def em():
    loaded = emulator.load()
    loaded.set_device(90)
    loaded.set_schedule("forward")
    yield loaded
    loaded.set_device(90)
    loaded.set_schedule("forward")


@needs_emulator
@pytest.mark.parametrize(
    ("capability", "schedule"),
    [(90, "forward"), (90, "reverse"), (90, "shuffled"), (80, "reverse"), (120, "shuffled")],
)
@pytest.mark.parametrize("case", CASES, ids=describe)
def test_emulated(em, case, capability, schedule):
    em.set_device(capability)
    em.set_schedule(schedule, seed=case.vocab)
    check(on_emulator(Inputs(case)), truth(case), case)


@needs_emulator
@pytest.mark.parametrize("capability", [80, 90])
def test_rows_too_long_to_be_kept(em, capability):
    em.set_device(capability)
    check(on_emulator(Inputs(LARGEST)), truth(LARGEST), LARGEST)


@pytest.mark.cuda
@pytest.mark.parametrize("case", [*CASES, LARGEST], ids=describe)
def test_cuda(case):
    stream = torch.cuda.current_stream().cuda_stream
    inputs = Inputs(case, "cuda")
    check(call(mtp_fast._C.cross_entropy_cuda, 0, stream, inputs=inputs), truth(case), case)


@needs_emulator
@pytest.mark.parametrize("case", CASES[-4:], ids=describe)
def test_order_of_threads_does_not_change_a_bit(em, case):
    runs = []
    for schedule in emulator.SCHEDULES:
        em.set_schedule(schedule, seed=1)
        runs.append(on_emulator(Inputs(case)))
    for run in runs[1:]:
        assert torch.equal(run.loss, runs[0].loss)
        assert torch.equal(run.lse, runs[0].lse)
        assert torch.equal(run.grad, runs[0].grad)


@needs_emulator
@pytest.mark.parametrize("grad", ["inplace", "apart", "misaligned"])
@pytest.mark.parametrize("vocab", [1003, 50257])
def test_where_the_gradient_goes_does_not_change_it(em, vocab, grad):
    inplace = on_emulator(Inputs(Case(vocab, BF16, rows=2)))
    elsewhere = on_emulator(Inputs(Case(vocab, BF16, rows=2, grad=grad)))
    assert torch.equal(inplace.grad, elsewhere.grad)


@needs_emulator
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF])
@pytest.mark.parametrize("vocab", [5, 1003, 50257])
def test_rows_without_a_loss(em, vocab, dtype):
    """Ignored rows are 0 and are not read; rows with a target out of range are NaN."""
    inputs = Inputs(Case(vocab, dtype, rows=4, offset=1))
    inputs.logits[0] = float("nan")
    inputs.target = torch.tensor([-3, vocab, -1, 2])
    counters = em.measure()
    results = on_emulator(inputs, ignore=-3)
    one_row = on_emulator(Inputs(Case(vocab, dtype, rows=1, offset=1)))
    assert counters.read < 3 * vocab * dtype.itemsize
    assert results.loss[0] == results.lse[0] == 0
    assert bool((results.grad[0] == 0).all())
    for row in (1, 2):
        assert bool(results.loss[row].isnan())
        assert bool(results.lse[row].isnan())
        assert bool(results.grad[row].isnan().all())
    assert bool(results.grad[3].isfinite().all())
    assert results.correct.tolist()[:3] == [False] * 3
    assert bool(one_row.loss.isfinite().all())


@needs_emulator
def test_masked_and_infinite_logits(em):
    inputs = Inputs(Case(1003, rows=3))
    inputs.logits[0, :600] = -float("inf")
    inputs.target[0] = 700
    inputs.logits[1] = -float("inf")
    inputs.logits[2, 5] = float("inf")
    expected = torch.nn.functional.cross_entropy(inputs.logits[:1].double(), inputs.target[:1])
    results = on_emulator(inputs)
    assert float(results.loss[0]) == pytest.approx(float(expected), rel=1e-6)
    assert bool((results.grad[0, :600] == 0).all())
    assert bool(results.loss[1:].isnan().all())


@needs_emulator
def test_no_rows(em):
    counters = em.measure()
    on_emulator(Inputs(Case(100, rows=0)))
    assert counters.launches == 0


def traffic(case: Case, capability: int) -> tuple[int, float]:
    """Shared memory of a block and bytes read of a row, as the head of cuda.cu states them."""
    per_block, per_sm, clusters = {80: (163, 164, 1), 90: (227, 228, 8), 120: (99, 100, 8)}[
        capability
    ]
    scratch, bytes_of_row = 800, case.vocab * case.dtype.itemsize
    cluster = 1
    while cluster < clusters and bytes_of_row / cluster > per_sm * 256 - 1024 - scratch:
        cluster *= 2
    kept = 0 if case.grad is None else min(bytes_of_row // cluster, per_block * 1024 - scratch)
    twice = 0 if case.grad is None else bytes_of_row - kept * cluster
    weights = 0
    if case.label_smoothing and case.class_weight:
        weights = 4 * case.vocab * (1 if case.grad is None else 2)
    return scratch + kept, bytes_of_row + twice + weights


@needs_emulator
@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.vocab > 1000] + [LARGEST], ids=describe
)
def test_bytes_moved(em, case, capability):
    em.set_device(capability)
    inputs = Inputs(case)
    counters = em.measure()
    on_emulator(inputs)
    shared, read = traffic(case, capability)
    written = 0 if case.grad is None else case.vocab * case.dtype.itemsize
    assert counters.launches == 1
    assert counters.read == pytest.approx(read * case.rows, rel=0.05)
    assert counters.written == pytest.approx(written * case.rows, rel=0.05)
    assert counters.shared_bytes == pytest.approx(shared, rel=0.02)


# Every barrier, with a case in which it matters.
@needs_emulator
@pytest.mark.parametrize(
    "case", [Case(12011, BF16, rows=2), Case(128256, BF16, rows=2)], ids=["block", "cluster"]
)
def test_no_barrier_is_superfluous(em, case):
    expected = truth(case)
    em.forget_barriers()
    check(on_emulator(Inputs(case)), expected, case)
    barriers = em.barriers()
    assert len(barriers) == (2 if case.vocab == 12011 else 3)
    for barrier in barriers:
        noticed = False
        with em.without(barrier):
            for schedule in emulator.SCHEDULES:
                em.set_schedule(schedule)
                try:
                    check(on_emulator(Inputs(case)), expected, case)
                except (AssertionError, RuntimeError):
                    noticed = True
        assert noticed, f"nothing fails without the barrier {barrier}"


@needs_emulator
def test_launch_errors_are_raised_and_forgotten(em):
    with pytest.raises(RuntimeError, match="CUDA: invalid device ordinal"):
        call(em.C.cross_entropy_cuda, 9, 0, inputs=Inputs(CASES[0]))
    assert em.last_error() == 0
    huge = Inputs(Case(8))
    huge.case = dataclasses.replace(huge.case, vocab=2**31 - 1)
    with pytest.raises(RuntimeError, match="vocabulary"):
        call(em.C.cross_entropy_cuda, 0, 0, inputs=huge)
    assert em.last_error() == 0


@needs_emulator
def test_device_guard(em):
    counters = em.measure()
    call(em.C.cross_entropy_cuda, 1, 0, inputs=Inputs(CASES[0]))
    assert counters.device == 1
    em.launch(1, 32, 0, 1)
    assert counters.device == 0  # restored


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.skipif(
    not hasattr(mtp_fast._C, "cross_entropy_cuda"), reason="the build has no CUDA backend"
)
def test_cuda_build_without_a_driver():
    """The build works on the CPU, and a launch says what is missing."""
    assert mtp_fast._C.build_info()["cuda_driver"] == 0
    with pytest.raises(RuntimeError, match=r"CUDA: .*driver"):
        call(mtp_fast._C.cross_entropy_cuda, 0, 0, inputs=Inputs(CASES[0]))
    loss = mtp_fast.cross_entropy(torch.zeros(1, 4), torch.tensor([1]))
    assert float(loss) == pytest.approx(1.3862944)
