"""The CUDA cross-entropy kernel, on the emulator and, with `-m cuda`, on a GPU.

Truth is the reference in float64, of the same rounded logits.
"""

import dataclasses
from collections.abc import Callable

import pytest
import torch

import emulator
import mtp_fast._C
from cuda_cross_entropy_cases import (
    BACKENDS,
    BF16,
    CASES,
    FLOAT,
    HALF,
    LARGEST,
    Case,
    Inputs,
    call,
    check,
    describe,
    needs_emulator,
    on_emulator,
    run_on,
    truth,
)


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
