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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", emulator.SCHEDULES)
@pytest.mark.parametrize("case", CASES, ids=describe)
def test_gradient_from_statistics(em, case, schedule, backend):
    if backend != "emulated" and schedule != "forward":
        pytest.skip("only the emulator has schedules")
    em.set_schedule(schedule, seed=case.vocab)
    case = dataclasses.replace(case, grad=case.grad or "apart")
    check(run_on(backend, case), truth(case), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_lose_nothing_at_large_logits(backend):
    """Logits that are shifted exactly give the same bits, where an lse would round by 2^-9."""

    def shifted(by: float) -> Callable[[Inputs], None]:
        return lambda inputs: inputs.logits.copy_((inputs.logits * 64).round() / 64 + by)

    case = Case(1003, grad="apart")
    near, far = (run_on(backend, case, shifted(by)) for by in (0.0, 2.0**15))
    assert torch.equal(near.grad, far.grad)
    assert torch.equal(near.stats[:, 1], far.stats[:, 1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FLOAT, BF16, HALF])
def test_gradient_from_statistics_without_a_loss(backend, dtype):
    def prepare(inputs: Inputs) -> None:
        inputs.logits[0] = float("nan")
        inputs.target = torch.tensor([-3, inputs.case.vocab, -1, 2])

    results = run_on(backend, Case(20011, dtype, rows=4, offset=1), prepare, ignore=-3)
    assert results.stats[0].tolist() == [0.0] * 4
    assert results.argmax[0] == -1
    assert bool((results.grad[0] == 0).all())
    assert results.stats[:, 2].isnan().tolist() == [False, True, True, False]
    assert bool(results.grad[1:3].isnan().all())
    assert bool(results.grad[3].isfinite().all())
    assert results.correct.tolist() == [False] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_vocabulary_in_parts(backend):
    """Statistics of parts merge into those of the row, which give the gradient of each part."""
    whole = Case(2006, FLOAT, rows=5, grad="apart", z_loss=1e-3)
    expected = truth(whole)
    full = Inputs(whole)
    width = whole.vocab // 2
    part = dataclasses.replace(whole, vocab=width)

    def cut(first: int) -> Callable[[Inputs], None]:
        def prepare(inputs: Inputs) -> None:
            inputs.logits.copy_(full.logits[:, first : first + width])
            inputs.target = full.target - first

        return prepare

    parts = [run_on(backend, part, cut(first)) for first in (0, width)]
    stats = torch.stack([results.stats for results in parts])
    top = stats[..., 0].amax(0)
    total = (stats[..., 1] * (stats[..., 0] - top).exp()).sum(0)
    target_logit = stats[..., 2].nan_to_num(0.0).sum(0)
    argmax = torch.where(
        parts[0].stats[:, 0] >= parts[1].stats[:, 0], parts[0].argmax, parts[1].argmax + width
    )
    assert argmax.tolist() == expected.argmax.tolist()
    merged = torch.stack([top, total, target_logit, torch.zeros_like(top)], dim=1)
    assert bool(torch.stack([results.grad for results in parts])[:, :, 0].isnan().any())
    grads = [run_on(backend, part, cut(first), merged=merged).grad for first in (0, width)]
    check(
        dataclasses.replace(
            expected,
            loss=expected.loss.float(),
            lse=expected.lse.float(),
            stats=merged,
            grad=torch.cat(grads, 1),
        ),
        expected,
        whole,
    )


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
    """Ignored rows are 0 and are not read; where the target is out of range, the loss is NaN."""
    inputs = Inputs(Case(vocab, dtype, rows=4, offset=1))
    inputs.logits[0] = float("nan")
    inputs.target = torch.tensor([-3, vocab, -1, 2])
    counters = em.measure()
    results = on_emulator(inputs, ignore=-3)
    one_row = on_emulator(Inputs(Case(vocab, dtype, rows=1, offset=1)))
    assert counters.read < 4.5 * (vocab + 16) * dtype.itemsize
    assert results.loss[0] == results.lse[0] == 0
    assert bool((results.grad[0] == 0).all())
    for row in (1, 2):
        assert bool(results.loss[row].isnan())
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
    scratch, bytes_of_row = 640, case.vocab * case.dtype.itemsize
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


@needs_emulator
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", [case for case in CASES if case.vocab > 1000], ids=describe)
def test_bytes_moved_with_saved_statistics(em, case, capability):
    em.set_device(capability)
    case = dataclasses.replace(case, grad=case.grad or "inplace")
    stats = on_emulator(Inputs(dataclasses.replace(case, grad=None))).stats
    inputs = Inputs(case)
    counters = em.measure()
    on_emulator(inputs, saved=stats)
    once = case.rows * case.vocab * case.dtype.itemsize
    weights = 4 * case.rows * case.vocab if case.label_smoothing and case.class_weight else 0
    assert (counters.launches, counters.cluster, counters.shared_bytes) == (1, 1, 0)
    assert counters.read == pytest.approx(once + weights, rel=0.05)
    assert counters.written == pytest.approx(once, rel=0.05)


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
