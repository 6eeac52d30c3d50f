"""speculative_accept and sample against their reference, token by token, and their interface."""

import itertools
import timeit

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mtp_fast
from helpers import draws, emulated
from mtp_fast import _C
from mtp_fast.ops import reference
from mtp_fast.ops.acceptance import AcceptResult, sample, speculative_accept

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FILTERS = [
    {},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.05},
]


def equal(a: AcceptResult, b: AcceptResult) -> Tensor:
    """(B,) bool: which sequences have the same tokens and counts."""
    same = (a.tokens == b.tokens).all(-1)
    return same & (a.num_tokens == b.num_tokens) & (a.num_accepted == b.num_accepted)


def draft_from(logits: Tensor, **sampling) -> Tensor:
    """(B, K) drafts sampled from logits (B, K, V)."""
    batch, width, _ = logits.shape
    drafts = [sample(logits[:, i], index=i, **sampling) for i in range(width)]
    return torch.stack(drafts, 1) if drafts else torch.empty((batch, 0), dtype=torch.int64)


def plausible_drafts(logits: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """The argmax of each row but the last, replaced by any id in [-1, V] elsewhere."""
    best = logits[:, :-1].float().nan_to_num(nan=-torch.inf).argmax(-1)
    other = torch.randint(-1, logits.shape[-1] + 1, best.shape, generator=generator)
    return torch.where(torch.rand(best.shape, generator=generator) < share, best, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 5, 33, 1000])
def test_greedy_equals_reference_on_ragged_cases_with_ties(
    dtype: torch.dtype, vocab: int, simd_level: str
) -> None:
    """2,000 cases for each of five vocabularies; few distinct values, so ties abound."""
    generator = torch.Generator().manual_seed(vocab)
    batch, width = draws(2000), 5
    logits = torch.randint(-3, 4, (batch, width + 1, vocab), generator=generator) / 2
    logits[0], logits[1, 2], logits[2, 0] = torch.nan, -torch.inf, torch.inf
    logits[3::7, :, ::3] = torch.nan
    logits[4::7, :, ::2] *= -0.0  # zeros of both signs
    logits = logits.to(dtype)
    if dtype != torch.float32:  # NaN of positive sign, which sorts above all as an integer
        logits.view(torch.int16)[3::14, :, ::3] = 0x7FFF
    drafts = plausible_drafts(logits, 0.8, generator)
    num_draft = torch.randint(0, width + 1, (batch,), generator=generator)
    arguments = {"num_draft": num_draft, "eos_token_id": 3, "return_logprobs": True}
    ours = speculative_accept(logits, drafts, **arguments)
    expected = reference.speculative_accept(logits, drafts, **arguments)
    assert equal(ours, expected).all()
    torch.testing.assert_close(ours.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    token = sample(logits[:, 0])
    assert torch.equal(token, reference.sample(logits[:, 0]))
    assert token[0] == -1


@pytest.mark.parametrize("rule", ["exact", "block", "typical"])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_sampled_equals_reference(
    rule: str, stochastic: bool, dtype: torch.dtype, filters: dict
) -> None:
    generator = torch.Generator().manual_seed(1)
    wrong, levels = 0, 1 if emulated() else len(mtp_fast.build_info()["simd_levels"])
    for vocab, width, batch in [(2, 6, 40), (300, 1, 40), (300, 6, 40), (3000, 2, 20), (300, 0, 9)]:
        shape = (batch, 2 * width + 1, vocab)
        logits = (torch.randn(shape, generator=generator) * 2).to(dtype)
        target, draft = logits[:, : width + 1], logits[:, width + 1 :]
        target[0, width, ::2], target[1, 0] = torch.nan, -torch.inf
        target[2, width // 2, 1] = torch.inf
        draft[3, :1] = torch.nan
        temperature = 0.2 + torch.rand(batch, generator=generator)
        temperature[::5] = 0  # greedy and sampled sequences in one batch
        sampling = {
            "temperature": temperature,
            "seed": torch.arange(batch) - 3,
            "position": 2**40 + torch.arange(batch),
            **filters,
        }
        drafts = plausible_drafts(target, 0.7, generator)
        if stochastic:
            drafts = draft_from(draft, **sampling)
        arguments = {
            **sampling,
            "rule": rule,
            "num_draft": torch.randint(0, width + 1, (batch,), generator=generator),
            "eos_token_id": 1,
            "return_logprobs": True,
        }
        expected = reference.speculative_accept(
            target.double().clamp_max(torch.finfo(dtype).max),
            drafts,
            draft_logits=draft.double() if stochastic else None,
            **arguments,
        )
        for level in range(levels):  # ends with the best
            if not emulated():
                _C.set_simd_level(level)
            ours = speculative_accept(
                target, drafts, draft_logits=draft if stochastic else None, **arguments
            )
            same = equal(ours, expected)
            wrong += int((~same).sum())
            torch.testing.assert_close(
                ours.logprobs[same], expected.logprobs[same].float(), rtol=1e-5, atol=1e-4
            )
    # Of 149 at each level: a draw within rounding of a boundary may fall on either side of it.
    assert wrong <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_filters_keep_exactly_the_prefix_of_the_sort(dtype: torch.dtype, simd_level: str) -> None:
    """The ids that many draws can yield are the reference's support, ties included."""
    generator = torch.Generator().manual_seed(2)
    count = draws(4000)
    for vocab, values in [(12, 3), (600, 6), (600, 10**6)]:
        logits = torch.randint(0, values, (vocab,), generator=generator) / values * 4
        logits = logits.to(dtype)
        for top_k, top_p, min_p in itertools.product([0, 1, 7], [1.0, 0.35, 0.05], [0.0, 0.3]):
            p = reference.filtered_probabilities(
                logits.double(),
                *(torch.tensor([value]) for value in (1.5, top_k, top_p, min_p)),
            )
            token = sample(
                logits.expand(count, vocab),
                temperature=1.5,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                seed=torch.arange(count),
            )
            seen = torch.zeros(vocab, dtype=torch.bool).index_fill(0, token, True)
            assert not (seen & (p == 0)).any(), (vocab, values, top_k, top_p, min_p)
            sure = p * count > 20  # missed with probability e^-20
            assert seen[sure].all(), (vocab, values, top_k, top_p, min_p)


def test_vanishing_probabilities_take_no_longer(simd_level: str) -> None:
    """Neither low temperatures nor masked logits: subnormal weights would take 10 times as long."""
    logits = 3 * torch.randn(4, 32_000, generator=torch.Generator().manual_seed(0))
    masked = logits.masked_fill(torch.arange(32_000) % 7 == 0, -float("inf"))

    def seconds(logits: Tensor, temperature: float) -> float:
        def run() -> Tensor:
            return sample(logits, temperature=temperature, seed=1)

        return min(timeit.repeat(run, number=1, repeat=20))

    usual = seconds(logits, 1.0)
    assert seconds(logits, 0.1) < 3 * usual
    assert seconds(masked, 1.0) < 3 * usual


@pytest.mark.parametrize(("gap", "accepted"), [(60.0, 1), (80.0, 0)])
def test_weights_count_down_to_2_to_the_minus_100(
    gap: float, accepted: int, simd_level: str
) -> None:
    """Target and draft agree, so a draft that has any weight is accepted."""
    logits = torch.tensor([[[0.0, -gap]] * 2])
    draft = torch.tensor([[1]])
    result = speculative_accept(logits, draft, draft_logits=logits[:, :1], temperature=1.0, seed=1)
    assert result.num_accepted.item() == accepted


def test_top_p_of_a_wide_row_needs_many_bins() -> None:
    """Logits over the whole range of floats, and masses that only the finest bins tell apart."""
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(20, 5000, generator=generator) * torch.logspace(-30, 30, 20).unsqueeze(-1)
    close = 1.0 + torch.randn(20, 5000, generator=generator) * 1e-6
    for logits, (top_k, top_p) in itertools.product(
        [wide, close], [(0, 0.5), (0, 0.999), (300, 1.0), (4000, 0.3)]
    ):
        arguments = {"temperature": 1.0, "top_k": top_k, "top_p": top_p}
        arguments["seed"] = torch.arange(20)
        ours = sample(logits, **arguments)
        assert (ours == reference.sample(logits.double(), **arguments)).sum() >= 19


@pytest.mark.parametrize("rule", ["exact", "block", "typical"])
@pytest.mark.parametrize("filters", [{}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.99}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_depends_on_nothing_but_the_sequence(
    rule: str, filters: dict, dtype: torch.dtype
) -> None:
    """Alone, in any place of any batch, at any thread count: bit for bit the same."""
    generator = torch.Generator().manual_seed(4)
    # Enough that one row is split: across threads, or over 8 blocks if it is alone, else 4.
    batch, width, vocab = (5, 2, 9000) if emulated() else (9, 2, 70_000)
    target = (torch.randn(batch, width + 1, vocab, generator=generator) * 3).to(dtype)
    draft = (target[:, :-1] + torch.randn(batch, width, vocab, generator=generator)).to(dtype)
    temperature = torch.linspace(0, 1.5, batch)
    sampling = {"temperature": temperature, "seed": torch.arange(batch), "position": 5, **filters}
    drafts = draft_from(draft, **sampling)

    def accept(rows: Tensor) -> AcceptResult:
        return speculative_accept(
            target[rows],
            drafts[rows],
            draft_logits=draft[rows],
            rule=rule,
            return_logprobs=True,
            **{**sampling, "temperature": temperature[rows], "seed": rows},
        )

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = accept(torch.arange(batch))
        assert len(set(whole.num_tokens.tolist())) > 1
        for count in (1,) if emulated() else (1, 2, 3, 8):
            torch.set_num_threads(count)
            assert torch.equal(draft_from(draft, **sampling), drafts)
            for rows in (torch.arange(batch), torch.arange(batch).flip(0), *torch.eye(batch)):
                rows = rows.nonzero().flatten() if rows.is_floating_point() else rows
                result = accept(rows)
                for field, expected in zip(result, whole, strict=True):
                    assert torch.equal(field, expected[rows])
    finally:
        torch.set_num_threads(threads)


def test_block_accepts_at_least_as_many_as_exact() -> None:
    """In expectation, over 20,000 seeds of each of 24 pairs; the rules share no per-draw order."""
    generator = torch.Generator().manual_seed(5)
    runs, width, vocab = draws(20_000), 4, 6
    for case in range(0, 24, 6 if emulated() else 1):  # they differ in numbers alone
        noise = 0.3 + 0.1 * case
        target = torch.randn(width + 1, vocab, generator=generator)
        draft = target[:-1] + noise * torch.randn(width, vocab, generator=generator)
        sampling = {"temperature": 1.0, "seed": torch.arange(runs) + case * runs}
        draft = draft.expand(runs, width, vocab)
        drafts = draft_from(draft, **sampling)
        mean = {}
        for rule in ("exact", "block"):
            result = speculative_accept(
                target.expand(runs, width + 1, vocab),
                drafts,
                draft_logits=draft,
                rule=rule,
                **sampling,
            )
            mean[rule] = result.num_accepted.double().mean().item()
        # Three standard errors of the difference at the most.
        assert mean["block"] >= mean["exact"] - 3 * width / (2 * runs) ** 0.5 / 2


@pytest.mark.parametrize("order", ["exact", "block"])
def test_toy_example_of_block_verification(order: str) -> None:
    """p = (1/3, 2/3), q = (2/3, 1/3), two drafts: 10/9 accepted by tokens, 11/9 by blocks."""
    runs = draws(200_000)
    p, q = torch.tensor([1 / 3, 2 / 3]).log(), torch.tensor([2 / 3, 1 / 3]).log()
    draft = q.expand(runs, 2, 2)
    sampling = {"temperature": 1.0, "seed": torch.arange(runs)}
    result = speculative_accept(
        p.expand(runs, 3, 2),
        draft_from(draft, **sampling),
        draft_logits=draft,
        rule=order,
        **sampling,
    )
    expected = {"exact": 10 / 9, "block": 11 / 9}[order]
    assert result.num_accepted.double().mean().item() == pytest.approx(
        expected, abs=4.5 / runs**0.5
    )


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_input_gives_a_consistent_result(data: st.DataObject) -> None:
    batch = data.draw(st.integers(0, 3))
    width = data.draw(st.integers(0, 4))
    vocab = data.draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    values = torch.tensor([-torch.inf, torch.inf, torch.nan, 0.0, -0.0, 1.0, 3e38, -3e38, 1e-45])
    logits = values[torch.randint(0, 9, (batch, width + 1, vocab), generator=generator)]
    drafts = torch.randint(-2, vocab + 2, (batch, width), generator=generator)
    result = speculative_accept(
        logits,
        drafts,
        draft_logits=data.draw(st.sampled_from([None, logits[:, 1:]])),
        temperature=data.draw(st.sampled_from([0.0, 1e-40, 1.0, 1e30])),
        top_k=data.draw(st.sampled_from([0, 1, 5, 10**9])),
        top_p=data.draw(st.sampled_from([1.0, 1e-9, 0.5, 0.9999999])),
        min_p=data.draw(st.sampled_from([0.0, 1e-30, 0.9999])),
        rule=data.draw(st.sampled_from(["exact", "block", "typical"])),
        pad_token_id=-7,
        return_logprobs=True,
    )
    usable = (logits > -torch.inf).any(-1)
    for b in range(batch):
        count, kept = int(result.num_tokens[b]), int(result.num_accepted[b])
        tokens = result.tokens[b]
        assert kept <= count <= kept + 1
        assert torch.equal(tokens[:kept], drafts[b, :kept])
        assert count == kept + 1 or not usable[b, kept]
        assert (tokens[count:] == -7).all()
        assert ((tokens[:count] >= 0) & (tokens[:count] < vocab)).all()
        assert not result.logprobs[b].isnan().any()
