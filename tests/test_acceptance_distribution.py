"""The token rule and the block rule keep the target's distribution: chi-squared tests.

A step emits a random number of tokens. Two laws of it are exact and are tested:
- completed with tokens from the target's own rows, the first three tokens follow the target;
- uncompleted, "token j is x" has a probability that is known in closed form under the token rule
  and is enumerated over all drafts under the block rule.
Faults planted in the reference show that these tests see what they are for.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from helpers import draws, emulated
from mtp_fast.ops import acceptance, reference
from mtp_fast.ops.acceptance import AcceptResult

SIGNIFICANCE = 1e-4
FILTERS = [
    {},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.15},
    {"top_k": 10, "top_p": 0.9, "min_p": 0.05},
]


def p_value(counts: Tensor, law: Tensor) -> float:
    """Chi-squared of counts against a law; cells that expect less than 10 are one cell.

    0 where something of probability 0 was counted.
    """
    if counts[law == 0].sum() > 0:
        return 0.0
    expected = law / law.sum() * counts.sum()
    rare = expected < 10
    observed = torch.cat([counts[~rare], counts[rare].sum().reshape(1)])
    expected = torch.cat([expected[~rare], expected[rare].sum().reshape(1)])
    keep = expected > 0
    if keep.sum() < 2:
        return 1.0
    statistic = ((observed - expected) ** 2 / expected.clamp_min(1e-300))[keep].sum()
    return float(stats.chi2.sf(statistic.item(), int(keep.sum()) - 1))


class Case:
    """One pair of target and draft rows, sampled by `runs` seeds."""

    def __init__(
        self,
        vocab: int,
        width: int,
        runs: int,
        *,
        rule: str,
        stochastic: bool,
        ragged: bool = False,
        ops: Any = acceptance,
        **sampling: float,
    ) -> None:
        generator = torch.Generator().manual_seed(vocab * 100 + width)
        self.target = torch.randn(width + 1, vocab, generator=generator) * 1.2
        noise = torch.randn(width, vocab, generator=generator)
        self.draft = self.target[:width] + noise
        self.stochastic, self.rule = stochastic, rule
        seeds = {"seed": torch.arange(runs), "position": 3, **sampling}
        defaults = {"temperature": 1.0, "top_k": 0.0, "top_p": 1.0, "min_p": 0.0}
        columns = [torch.tensor(v).double() for v in {**defaults, **sampling}.values()]
        self.p = reference.filtered_probabilities(self.target.double(), *columns)
        draft = self.draft.expand(runs, width, vocab)
        if stochastic:
            self.q = reference.filtered_probabilities(self.draft.double(), *columns)
            drafts = [ops.sample(draft[:, i], index=i, **seeds) for i in range(width)]
            drafts = torch.stack(drafts, 1) if width else torch.empty((runs, 0), dtype=torch.long)
        else:
            likely = self.p[:width].argsort(-1, descending=True)[:, 1]
            self.q = torch.nn.functional.one_hot(likely, vocab).double()
            drafts = likely.expand(runs, width)
        self.num_draft = torch.full((runs,), width)
        if ragged:
            self.num_draft = torch.randint(0, width + 1, (runs,), generator=generator)
        self.result: AcceptResult = ops.speculative_accept(
            self.target.expand(runs, width + 1, vocab),
            drafts,
            draft_logits=draft if stochastic else None,
            num_draft=self.num_draft,
            rule=rule,
            **seeds,
        )

    def completed(self, length: int) -> Tensor:
        """(runs, length): the emitted tokens, then tokens from the target's rows."""
        generator = torch.Generator().manual_seed(9)
        tokens = self.result.tokens[:, :length].clone()
        for j in range(tokens.shape[1]):
            fresh = torch.multinomial(self.p[j], len(tokens), replacement=True, generator=generator)
            tokens[:, j] = torch.where(self.result.num_tokens > j, tokens[:, j], fresh)
        return tokens

    def completed_p_values(self) -> list[float]:
        tokens, vocab = self.completed(3), self.p.shape[1]
        return [
            p_value(torch.bincount(tokens[:, j], minlength=vocab).double(), self.p[j])
            for j in range(tokens.shape[1])
        ]

    def joint_p_value(self) -> float:
        """Of (token 1, token 2)."""
        tokens, vocab = self.completed(2), self.p.shape[1]
        pairs = torch.bincount(tokens[:, 0] * vocab + tokens[:, 1], minlength=vocab**2)
        return p_value(pairs.double(), torch.outer(self.p[0], self.p[1]).flatten())

    def emitted_p_values(self) -> list[float]:
        """Of "token j is x" and "there is no token j", for the first three j."""
        vocab, values = self.p.shape[1], []
        law = torch.zeros(min(3, len(self.p)), vocab, dtype=torch.float64)
        lengths = torch.bincount(self.num_draft).double() / len(self.num_draft)
        for length, share in enumerate(lengths):
            if share > 0:
                rows = self._law(length)[:3]
                law[: len(rows)] += share * rows
        for j, row in enumerate(law):
            has = self.result.num_tokens > j
            counts = torch.bincount(self.result.tokens[has, j], minlength=vocab)
            counts = torch.cat([counts, (~has).sum().reshape(1)]).double()
            none = 0 if j == 0 else (1 - row.sum()).clamp_min(0)
            values.append(p_value(counts, torch.cat([row, torch.tensor([none])])))
        return values

    def _law(self, length: int) -> Tensor:
        """(length + 1, V): the probability that token j is emitted and is x."""
        p, q = self.p[: length + 1], self.q[:length]
        if self.rule == "exact":
            accepts = torch.minimum(p[:-1], q).sum(-1)
            reached = torch.cat([torch.ones(1), accepts]).cumprod(0)
            return reached.unsqueeze(-1) * p
        law = torch.zeros_like(p)
        support = [row.nonzero().flatten().tolist() for row in q]
        for drafts in itertools.product(*support):
            chance = torch.tensor([q[i, d] for i, d in enumerate(drafts)]).double().prod()
            left, prefix = 1.0, 1.0  # of u not having passed a longer prefix
            heights, prefixes = [1.0], [1.0]
            for i, d in enumerate(drafts):
                prefix = min(1.0, prefix * float(p[i, d] / q[i, d]))
                prefixes.append(prefix)
                if i + 1 < length:
                    mass = float((prefix * p[i + 1] - q[i + 1]).clamp_min(0).sum())
                    heights.append(1.0 if prefix == 1 else mass / (mass + 1 - prefix))
                else:
                    heights.append(prefix)
            for kept in range(length, -1, -1):
                here = left * heights[kept]
                left -= here
                weight = p[kept]
                if kept < length:
                    weight = (prefixes[kept] * p[kept] - q[kept]).clamp_min(0)
                if here > 0:
                    law[kept] += chance * here * weight / weight.sum()
                    for j in range(kept):
                        law[j, drafts[j]] += chance * here
        return law


@pytest.mark.parametrize("rule", ["exact", "block"])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_first_tokens_of_ragged_steps(
    rule: str, stochastic: bool, temperature: float, filters: dict
) -> None:
    case = Case(
        16, 8, draws(200_000), rule=rule, stochastic=stochastic, ragged=True,
        temperature=temperature, **filters,
    )  # fmt: skip
    assert min(case.completed_p_values()) > SIGNIFICANCE
    if rule == "exact":
        assert min(case.emitted_p_values()) > SIGNIFICANCE


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_block_rule_against_enumeration(stochastic: bool, filters: dict) -> None:
    case = Case(
        16, 3, draws(200_000), rule="block", stochastic=stochastic, ragged=True, temperature=1.0,
        **filters,
    )  # fmt: skip
    assert min(case.emitted_p_values()) > SIGNIFICANCE


@pytest.mark.parametrize("rule", ["exact", "block"])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("filters", [{}, {"top_k": 400}, {"top_p": 0.9}, {"min_p": 0.02}], ids=str)
def test_large_vocabulary(rule: str, stochastic: bool, filters: dict) -> None:
    vocab = 1100 if emulated() else 4096  # many tiles of a row, either way
    case = Case(
        vocab, 2, draws(50_000), rule=rule, stochastic=stochastic, temperature=1.0, **filters
    )
    assert min(case.completed_p_values()) > SIGNIFICANCE
    if rule == "exact":
        assert min(case.emitted_p_values()) > SIGNIFICANCE


@pytest.mark.parametrize("rule", ["exact", "block"])
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("ops", [acceptance, reference], ids=["kernel", "reference"])
def test_joint_of_two_tokens(rule: str, stochastic: bool, ops: Any) -> None:
    case = Case(
        8,
        3,
        draws(200_000),
        rule=rule,
        stochastic=stochastic,
        ragged=True,
        temperature=1.0,
        ops=ops,
    )
    assert case.joint_p_value() > SIGNIFICANCE
    assert min(case.completed_p_values()) > SIGNIFICANCE
    assert min(case.emitted_p_values()) > SIGNIFICANCE


# ---- Planted faults: each must be seen by the tests above ----


def shared_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "SALT_ACCEPT", reference.SALT_DRAFT)


def unnormalised_residual(patch: pytest.MonkeyPatch) -> None:
    def inverse_cdf(weight: Tensor, u: Tensor) -> Tensor:
        token = (weight.cumsum(-1) <= u.unsqueeze(-1)).sum(-1)
        return token.clamp_max(weight.shape[-1] - 1)

    patch.setattr(reference, "inverse_cdf", inverse_cdf)


def block_stopped_at_first_failure(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "longest", lambda passed: reference.leading(passed[:, 1:]))


def bonus_from_last_row(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference, "bonus_row", lambda p, length: p[:, -1])


def filter_on_target_only(patch: pytest.MonkeyPatch) -> None:
    filtered = reference.filtered_probabilities

    def probabilities(logits: Tensor, temperature: Tensor, *filters: Tensor) -> Tensor:
        if logits.dim() == 3 and logits.shape[1] == 3:  # the draft's K rows
            filters = (torch.tensor(0), torch.tensor(1.0), torch.tensor(0.0))
        return filtered(logits, temperature, *filters)

    patch.setattr(reference, "filtered_probabilities", probabilities)


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        (shared_noise, "exact"),
        (shared_noise, "block"),
        (unnormalised_residual, "exact"),
        (block_stopped_at_first_failure, "block"),
        (bonus_from_last_row, "exact"),
        (bonus_from_last_row, "block"),
        (filter_on_target_only, "exact"),
    ],
)
def test_planted_fault_is_seen(
    fault: Callable[[pytest.MonkeyPatch], None], rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    case = Case(
        8, 3, 100_000, rule=rule, stochastic=True, ragged=True, temperature=1.0, top_k=4,
        ops=reference,
    )  # fmt: skip
    monkeypatch.undo()
    assert min(case.completed_p_values()) < SIGNIFICANCE


# ---- Over many steps ----


def decode(ops: Any, rule: str, runs: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens (runs, length) of a Markov target over three ids, and the law of such sequences."""
    width, vocab = 3, 3
    generator = torch.Generator().manual_seed(11)
    target = torch.randn(vocab, vocab, generator=generator)
    draft = target + torch.randn(vocab, vocab, generator=generator)
    tokens = torch.zeros(runs, length + width + 1, dtype=torch.long)  # after a first 0
    done = torch.zeros(runs, dtype=torch.long)
    sequence, columns = torch.arange(runs), torch.arange(width + 1)
    while int(done.min()) < length:
        last = torch.where(done > 0, tokens[sequence, (done - 1).clamp_min(0)], 0)
        sampling = {"temperature": 1.0, "seed": sequence, "position": done}
        context, draft_logits = [last], []
        for i in range(width):
            draft_logits.append(draft[context[-1]])
            context.append(ops.sample(draft_logits[-1], index=i, **sampling))
        result = ops.speculative_accept(
            target[torch.stack(context, 1)],
            torch.stack(context[1:], 1),
            draft_logits=torch.stack(draft_logits, 1),
            rule=rule,
            pad_token_id=0,
            **sampling,
        )
        active = done < length
        places = (done.clamp_max(length - 1).unsqueeze(1) + columns)[active]
        tokens[sequence[active].unsqueeze(1), places] = result.tokens[active]
        done = torch.where(active, done + result.num_tokens, done)
    p = target.double().softmax(-1)
    law = p[0]
    for _ in range(length - 1):
        law = (law.unsqueeze(-1) * p.repeat(len(law) // vocab, 1)).flatten()
    return tokens[:, :length], law


def sequence_p_value(tokens: Tensor, law: Tensor) -> float:
    code = torch.zeros(len(tokens), dtype=torch.long)
    for column in tokens.unbind(1):
        code = code * 3 + column
    return p_value(torch.bincount(code, minlength=len(law)).double(), law)


@pytest.mark.parametrize("rule", ["exact", "block"])
def test_sequences_of_many_steps(rule: str) -> None:
    length = 4 if emulated() else 6  # few draws do not tell 729 sequences apart
    assert sequence_p_value(*decode(acceptance, rule, draws(400_000), length)) > SIGNIFICANCE


@pytest.mark.parametrize("keyed_by_absolute_position", [False, True])
def test_draws_keyed_by_absolute_position_are_seen(
    keyed_by_absolute_position: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    keyed = reference.uniform
    if keyed_by_absolute_position:
        monkeypatch.setattr(
            reference,
            "uniform",
            lambda seed, position, index, salt: keyed(
                seed, position + index, torch.zeros_like(index), salt
            ),
        )
    value = sequence_p_value(*decode(reference, "block", 100_000, 6))
    assert (value < SIGNIFICANCE) == keyed_by_absolute_position
