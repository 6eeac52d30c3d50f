"""The CUDA acceptance kernels against the CPU's, on the emulator and, with `-m cuda`, on a GPU."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import emulator
from mtp_fast.ops.acceptance import AcceptResult, prepare_sample, sample, speculative_accept

needs_emulator = pytest.mark.skipif(not emulator.AVAILABLE, reason="needs the sources and x86-64")

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch, half of it greedy, ragged, some rows without a finite logit."""

    vocab: int
    dtype: torch.dtype = FLOAT
    batch: int = 6
    width: int = 2
    rule: str = "exact"
    stochastic: bool = False
    filters: tuple[tuple[str, float], ...] = ()
    coarse: bool = False  # few values, so that ties abound


# One tile and many, one block and clusters of 2, 4 and 8, rows that are not aligned, each rule with
# each kind of draft, each filter.
TOP_K, TOP_P, MIN_P = ("top_k", 5), ("top_p", 0.8), ("min_p", 0.1)
CASES = [
    Case(1),
    Case(7, BF16, stochastic=True),
    Case(129, HALF, rule="block", stochastic=True),
    Case(129, FLOAT, filters=(TOP_K,), coarse=True),
    Case(300, BF16, rule="typical", filters=(TOP_P,)),
    Case(1003, FLOAT, rule="block", filters=(TOP_P,), coarse=True),
    Case(1003, BF16, stochastic=True, filters=(("top_k", 50), TOP_P, MIN_P)),
    Case(2500, HALF, rule="typical", filters=(MIN_P,)),
    Case(5003, FLOAT, batch=3, rule="block", stochastic=True, filters=(TOP_P,)),
    Case(20011, BF16, batch=3, stochastic=True, filters=(("top_k", 200), ("top_p", 0.95))),
    Case(20011, FLOAT, batch=3, rule="block", coarse=True, filters=(("top_k", 300),)),
    Case(50257, BF16, batch=2, rule="block", stochastic=True),
    Case(5003, BF16, filters=(("top_k", 20),)),  # fewer than there are tiles
    Case(129, BF16, batch=30, filters=(("top_k", 1),)),
    Case(300, HALF, batch=30, filters=(("top_k", 2),), coarse=True),
    Case(70_001, FLOAT, batch=2),
    # Alone in its batch, a sequence is split over a cooperative grid on sm_80.
    Case(5003, HALF, batch=1, rule="typical", filters=(TOP_P,)),
    Case(20011, FLOAT, batch=1, rule="block", stochastic=True, filters=(TOP_P,)),
    Case(20011, BF16, batch=1, coarse=True, filters=(("top_k", 300), MIN_P)),
    # All drafts are accepted: the log-probabilities read row after row into the same images.
    Case(5003, BF16, batch=1, width=3, filters=(("top_k", 1),)),
]


def describe(value: object) -> str | None:
    if not isinstance(value, Case):
        return None
    kept = [f"vocab={value.vocab}", str(value.dtype).removeprefix("torch."), value.rule]
    kept += ["stochastic"] * value.stochastic + [name for name, _ in value.filters]
    return "-".join(kept)


def problem(case: Case) -> dict[str, Any]:
    """The arguments of speculative_accept, on the CPU."""
    random = torch.Generator().manual_seed(case.vocab)
    shape = (case.batch, 2 * case.width + 1, case.vocab)
    logits = torch.randn(shape, generator=random) * 2
    if case.coarse:
        logits = (logits.mul(2).round() / 2).clamp(max=3)
    if case.batch > 3:
        logits[1, case.width] = torch.nan
        logits[2, :, ::3] = torch.nan
        logits[3, 0, -1] = torch.inf
        logits[3, 1, 0] = -torch.inf
    logits = logits.to(case.dtype)
    target, draft = logits[:, : case.width + 1], logits[:, case.width + 1 :]
    temperature = torch.linspace(0.5, 1.5, case.batch)
    temperature[::2] = 0
    if case.batch < 4:
        temperature[0] = 1.0
    sampling = {
        "temperature": temperature,
        "seed": torch.arange(case.batch) - 1,
        "position": torch.arange(case.batch) * 2**33,
        **dict(case.filters),
    }
    best = target[:, :-1].float().nan_to_num(nan=-torch.inf).argmax(-1)
    other = torch.randint(-1, case.vocab + 1, best.shape, generator=random)
    drafts = torch.where(torch.rand(best.shape, generator=random) < 0.7, best, other)
    if case.stochastic:
        drafts = torch.stack(
            [sample(draft[:, i], index=i, **sampling) for i in range(case.width)], 1
        )
    return {
        "target_logits": target,
        "draft_tokens": torch.cat([drafts, drafts + 1], 1)[:, : case.width],  # rows apart
        "draft_logits": draft if case.stochastic else None,
        "num_draft": torch.randint(0, case.width + 1, (case.batch,), generator=random).clamp_(
            min=case.width if case.batch < 4 else 0
        ),
        "rule": case.rule,
        "eos_token_id": 3,
        "return_logprobs": True,
        **sampling,
    }


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "position")


def run(arguments: dict[str, Any]) -> tuple[AcceptResult, Tensor]:
    """The acceptance step, and tokens sampled from its first rows, into a column of a tensor."""
    sampling = {name: arguments.get(name) for name in SAMPLING}
    first = arguments["target_logits"][:, 0]
    columns = torch.full((len(first), 3), -7, device=first.device)
    prepare_sample(first, columns[:, 1], 2, **sampling)()
    assert (columns[:, ::2] == -7).all()
    assert torch.equal(columns[:, 1], sample(first, index=2, **sampling))
    return speculative_accept(**arguments), columns[:, 1]


def check(got: tuple[AcceptResult, Tensor], expected: tuple[AcceptResult, Tensor]) -> None:
    """Equal tokens: the backends add in other orders, but no draw of these is within rounding."""
    assert torch.equal(got[0].num_tokens, expected[0].num_tokens)
    assert torch.equal(got[0].num_accepted, expected[0].num_accepted)
    assert torch.equal(got[0].tokens, expected[0].tokens)
    torch.testing.assert_close(got[0].logprobs, expected[0].logprobs, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[1], expected[1])


@pytest.fixture
def em():
    loaded = emulator.load()
    yield loaded
    loaded.set_device(90)
    loaded.set_schedule("forward")


@contextmanager
def emulated(em: emulator.Emulator) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        em.install(patch)
        yield


@needs_emulator
@pytest.mark.parametrize(
    ("capability", "schedule"),
    [(90, "forward"), (90, "shuffled"), (80, "reverse"), (80, "shuffled")],
)
@pytest.mark.parametrize("case", CASES, ids=describe)
def test_emulated_equals_cpu(em, case, capability, schedule):
    arguments = problem(case)
    expected = run(arguments)
    em.set_device(capability)
    em.set_schedule(schedule, seed=case.vocab)
    with emulated(em):
        check(run(arguments), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES, ids=describe)
def test_cuda_equals_cpu(case):
    arguments = problem(case)
    expected = run(arguments)
    on_device = {
        name: value.cuda() if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    result, token = run(on_device)
    check((AcceptResult(*[field.cpu() for field in result]), token.cpu()), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("batch", [1, 6])
def test_step_is_captured_in_a_graph(batch):
    """The graph reads logits, seeds and positions where they were; only their values change."""
    case = Case(5003, BF16, batch=batch, stochastic=True, filters=(TOP_P,))
    first = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in problem(case).items()}
    run(first)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, token = run(first)
    for shift in (0, 5):
        first["position"] += shift
        first["target_logits"].copy_(first["target_logits"].roll(shift, -1))
        graph.replay()
        check((captured, token), run(first))


@needs_emulator
def test_one_sequence_is_split_over_blocks(em):
    arguments = problem(Case(50257, BF16, batch=1, width=0))
    for capability, cluster in [(90, 8), (80, 1)]:
        em.set_device(capability)
        counters = em.measure()
        with emulated(em):
            sample(arguments["target_logits"][:, 0])
        assert (counters.launches, counters.blocks, counters.threads) == (1, 8, 512)
        assert counters.cluster == cluster


@needs_emulator
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("batch", [1, 7])
def test_bytes_moved(em, batch, capability):
    """As the head of cuda.cu states them: a greedy row is read once, a sampled one twice."""
    em.set_device(capability)
    vocab, width = 50257, 3
    logits = torch.randn(batch, width + 1, vocab).bfloat16()
    drafts = logits[:, :-1].argmax(-1)
    row, tile = 2 * vocab, 2 * 512
    with emulated(em):
        counters = em.measure()
        speculative_accept(logits, drafts)
        # A tile for each argmax, by each of the warps.
        warps = counters.blocks * counters.threads / 32
        assert counters.read == pytest.approx((width + 1) * (batch * row + warps * tile), rel=0.05)
        rejected = torch.full_like(drafts, vocab)  # no draft at all: one row is judged
        counters = em.measure()
        speculative_accept(logits, rejected, temperature=1.0)
        assert counters.read == pytest.approx(batch * 2 * row + warps * tile, rel=0.05)
        # Maxima and sums of 99 tiles; tokens and counts, a few bytes a sequence, are not counted.
        in_a_grid = capability == 80 and batch == 1
        assert counters.written == (2 * 99 * 4 if in_a_grid else 0)
        assert counters.shared_bytes == 14848


@needs_emulator
@pytest.mark.parametrize("capability", [80, 90])
def test_bytes_moved_by_draws_filters_and_log_probabilities(em, capability):
    """As the head of cuda.cu states them."""
    em.set_device(capability)
    batch, width, vocab = 3, 2, 50257
    logits = torch.randn(batch, width + 1, vocab).bfloat16()
    first, drafts = logits[:, 0], logits[:, :-1].argmax(-1)
    unlikely = logits[:, :-1].clone()
    logits[:, 0, 5], unlikely[:, 0, 5] = -30, 30

    def rejecting():  # the first draft of two: both rows are judged, then make the residual
        rejected = torch.full_like(drafts, 5)
        speculative_accept(logits, rejected, draft_logits=unlikely, temperature=1.0)

    calls = [  # rows read, tiles read besides by each warp of the sequence's blocks, and by one
        (3, 1, 0, lambda: speculative_accept(logits[:, :1], drafts[:, :0], return_logprobs=True)),
        (9, 3, 0, lambda: speculative_accept(logits, drafts, return_logprobs=True)),
        (2, 1, 0, lambda: sample(first, temperature=1.0)),
        (1, 1, 2, lambda: sample(first, temperature=1.0, top_k=1)),  # a histogram, and the sums
        (6, 2, 0, rejecting),
    ]
    with emulated(em):
        for rows, by_warp, by_one, call in calls:
            counters = em.measure()
            call()
            warps = counters.blocks * counters.threads / 32
            tiles = by_warp * warps + by_one * batch
            expected = rows * batch * 2 * vocab + tiles * 2 * 512
            assert counters.read == pytest.approx(expected, rel=0.03), rows
            assert counters.written == 0
        # A grid exchanges maxima and sums of 99 tiles, and a histogram of 6 KiB.
        counters = em.measure()
        sample(first[:1], temperature=1.0, top_k=1)
        exchanged = 2 * 99 * 4 + counters.blocks * 6144
        assert counters.written == (exchanged if capability == 80 else 0)


def steps(dtype: torch.dtype) -> Tensor:
    """Three rows: tiles 0 to 79 of 99 have two logits of 15 - tile / 16, all others are -30."""
    logits = torch.full((3, 50257), -30.0)
    tiles = torch.arange(80)
    for place in (7, 300):
        logits[:, 512 * tiles + place] = 15 - tiles / 16
    return logits.to(dtype)


def accept_nothing(logits: Tensor, **sampling: float) -> AcceptResult:
    no_drafts = torch.empty(len(logits), 0, dtype=torch.int64)
    return speculative_accept(logits[:, None], no_drafts, **sampling)


# In `steps`, from the top down, 80 logits end in tile 39, nine tenths of the mass in tile 35, those
# of at least a fifth of the largest weight in tile 25; and nine tenths of the 80 logits' in 27.
@needs_emulator
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("call", [sample, accept_nothing])
@pytest.mark.parametrize(
    ("filters", "bf16", "float32", "equals", "kept"),
    [  # tiles read: by each histogram in either dtype, by the count of equals, by the sums
        ({"min_p": 0.2}, [], [], 0, 26),
        ({"top_k": 80}, [80], [80, 40, 40], 0, 40),
        ({"top_k": 79}, [80], [80, 40, 40], 40, 40),  # one of two equals is dropped
        ({"top_k": 200}, [99, 99], [99, 99, 99, 99], 99, 99),  # more than tiles: no bound
        ({"top_p": 0.9}, [80], [80, 36, 36], 0, 36),
        ({"top_p": 0.8965}, [80], [80, 36, 36], 36, 36),
        ({"top_k": 80, "min_p": 0.2}, [80], [80, 40, 40], 0, 26),
        ({"top_p": 0.9, "min_p": 0.2}, [80], [80, 36, 36], 0, 26),
        ({"top_k": 80, "top_p": 0.9}, [80, 40], [80, 40, 40, 40, 28, 28], 0, 28),
        ({"top_k": 80, "top_p": 0.9, "min_p": 0.2}, [80, 40], [80, 40, 40, 40, 28, 28], 0, 26),
    ],
)
def test_bytes_moved_by_filters(em, filters, bf16, float32, equals, kept, call, capability):
    """As the head of cuda_filters.cuh states them."""
    em.set_device(capability)
    passes = 1 if "top_k" in filters else 2
    for dtype, histograms in ((BF16, bf16), (FLOAT, float32)):
        logits = steps(dtype)
        with emulated(em):
            counters = em.measure()
            call(logits, temperature=1.0, **filters)
            # The last equal, and the token, are looked for by each warp.
            by_warp = counters.blocks * counters.threads / 32 * (2 if equals else 1)
            tiles = 3 * (sum(histograms) + equals + kept) + by_warp
            expected = (3 * passes * 50257 + tiles * 512) * dtype.itemsize
            assert counters.read == pytest.approx(expected, rel=0.03)
            counters = em.measure()
            call(logits[:1], temperature=1.0, **filters)
            # Maxima and sums as read, counts of equals, sums of what is kept.
            exchanged = 4 * 99 * (passes + bool(equals) + 1)
            exchanged += 6144 * counters.blocks * len(histograms)
            assert counters.written == (exchanged if capability == 80 else 0)


# A thread passes the same few barriers many times. The first times of each, every one matters;
# later ones may wait for nothing, where what they guard has not changed.
@needs_emulator
@pytest.mark.parametrize("capability", [80, 90])
def test_no_barrier_is_superfluous(em, capability):
    cases = [
        Case(20011, FLOAT, batch=1, rule="block", stochastic=True, filters=(TOP_P,)),
        Case(20011, FLOAT, batch=1, coarse=True, filters=(("top_k", 300),)),
    ]
    em.set_device(capability)
    visits, noticed = set(), set()
    for case in cases:
        arguments = problem(case)
        expected = run(arguments)
        with emulated(em):
            em.forget_barriers()
            check(run(arguments), expected)
            for barrier in em.barriers():
                visit = (barrier.site, barrier.visit)
                # The launch itself is what the first one would wait for in a block alone.
                if barrier.visit > 2 or (capability == 80 and visit == (0, 0)):
                    continue
                visits.add(visit)
                for schedule in emulator.SCHEDULES:
                    em.set_schedule(schedule)
                    with em.without(barrier):
                        try:
                            check(run(arguments), expected)
                        except (AssertionError, RuntimeError):
                            noticed.add(visit)
                em.set_schedule("forward")
    assert len(visits) >= 5
    assert noticed == visits
