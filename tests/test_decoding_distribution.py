"""Sampled continuations against the model's enumerated law, with one head and with four."""

from __future__ import annotations

import functools

import pytest
import torch
from scipy.stats import chi2_contingency, chisquare

from mtp_fast.decoding import generate
from tiny_models import sharp_model


@functools.cache
def five_word_law(temperature: float, top_k: int | None):
    """A five-word model, a prompt, and the enumerated joint law of four sampled tokens."""
    model = sharp_model(3, vocab_size=5, n_layers=4, dim=16, ffn_dim=16)
    with torch.no_grad():
        model.unembedding.weight.div_(3)
    prompt = torch.tensor([1, 4, 2])
    law = torch.ones(1, dtype=torch.float64)
    contexts = prompt[None]
    with torch.no_grad():
        for _ in range(4):
            logits = model.logits(contexts)[:, -1].double() / temperature
            if top_k:
                cut = logits.topk(top_k).values[:, -1:]
                logits = logits.masked_fill(logits < cut, -torch.inf)
            law = (law[:, None] * logits.softmax(-1)).flatten()
            contexts = torch.cat(
                [contexts.repeat_interleave(5, 0), torch.arange(5).repeat(len(contexts))[:, None]],
                1,
            )
    return model, prompt, law


SAMPLED = 20_000


@functools.cache
def sampled_counts(temperature: float, top_k: int | None, n_heads: int, rule: str):
    """How often each of the 625 continuations came in 20,000 runs, and the drafts' acceptance."""
    model, prompt, _ = five_word_law(temperature, top_k)
    result = generate(
        model,
        prompt.expand(SAMPLED, -1),
        4,
        n_heads=n_heads,
        rule=rule,
        seed=100_000 * n_heads,
        temperature=temperature,
        top_k=top_k,
    )
    drawn = torch.stack(result.tokens) @ torch.tensor([125, 25, 5, 1])
    return torch.bincount(drawn, minlength=625).double(), result.stats.acceptance


def pooled(*columns: torch.Tensor, by: torch.Tensor) -> list[torch.Tensor]:
    """Cells with `by` under 5 become one: chi-squared wants cells that are not almost empty."""
    rare = by < 5
    cells = [torch.cat([x[~rare], x[rare].sum(0, keepdim=True)]) for x in columns]
    return cells if by[rare].sum() > 0 else [x[:-1] for x in cells]


FILTERS = pytest.mark.parametrize(
    ("temperature", "top_k"), [(1.0, None), (1.0, 3), (0.7, None)], ids=["plain", "top-k", "cold"]
)


@FILTERS
@pytest.mark.parametrize(("n_heads", "rule"), [(1, "exact"), (4, "exact"), (4, "block")])
def test_sampled_continuations_have_the_models_distribution(temperature, top_k, n_heads, rule):
    _, _, law = five_word_law(temperature, top_k)
    observed, acceptance = sampled_counts(temperature, top_k, n_heads, rule)
    assert observed[law == 0].sum() == 0
    observed, expected = observed[law > 0], law[law > 0] * SAMPLED
    observed, expected = pooled(observed, expected, by=expected)
    assert len(expected) > 40
    assert chisquare(observed, expected * (SAMPLED / expected.sum())).pvalue > 1e-4
    if n_heads > 1:
        assert 0.05 < acceptance[0] < 0.95  # both branches were taken


@FILTERS
@pytest.mark.parametrize("rule", ["exact", "block"])
def test_one_head_and_four_sample_alike(temperature, top_k, rule):
    one, _ = sampled_counts(temperature, top_k, 1, "exact")
    four, _ = sampled_counts(temperature, top_k, 4, rule)
    assert not torch.equal(one, four)
    one, four = pooled(one, four, by=one + four)
    assert chi2_contingency(torch.stack([one, four]).numpy()).pvalue > 1e-4
