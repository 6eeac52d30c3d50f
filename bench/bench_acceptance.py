"""The acceptance step against its bound and against PyTorch.

Bound: one read of the logits, here torch's maximum of the same bytes taken as int16, on all
threads. Greedy reads B (K+1) V logits once; with draft logits there are K more rows for K+1.

    pytest bench/bench_acceptance.py --benchmark-only
    python bench/bench_acceptance.py --json bench/results/acceptance.json    # the table
"""

from __future__ import annotations

import argparse
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mtp_fast
from harness import DEVICE, MODELS, QUICK_MODELS, Comparison, agreeing, finish, interleaved

try:
    from transformers.generation.utils import _speculative_sampling
except ImportError:
    _speculative_sampling = None

SHAPE = (32, 3, 128256)  # B, K, V
# Sampling arguments, and whether drafts are stochastic.
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "greedy": ({}, False),
    "sampled": ({"temperature": 1.0}, False),
    "sampled, draft logits": ({"temperature": 1.0}, True),
    "top-k 50, top-p 0.9": ({"temperature": 1.0, "top_k": 50, "top_p": 0.9}, False),
}


class Problem:
    """Logits that accept every draft, so that all rows are judged whatever the draws."""

    def __init__(self, shape: tuple[int, int, int], device: str = "cpu") -> None:
        batch, width, vocab = shape
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(batch, width + 1, vocab, generator=generator) * 2
        drafts = torch.randint(0, vocab, (batch, width), generator=generator)
        # The tokens that these logits admit: every draft, then the best id of the bonus row.
        self.expected = torch.cat([drafts, drafts[:, :1]], 1).to(device)
        self.drafts = drafts.to(device)
        best = self.expected.unsqueeze(-1)
        self.target = logits.to(device).scatter(-1, best, 40.0).bfloat16()
        self.draft = self.target[:, :-1].clone()

    def bound(self) -> Tensor:
        return self.target.view(torch.int16).amax(-1)

    def accept(self, stochastic: bool, sampling: dict[str, Any]) -> mtp_fast.AcceptResult:
        return mtp_fast.speculative_accept(
            self.target, self.drafts, draft_logits=self.draft if stochastic else None, **sampling
        )


def eager_probabilities(logits: Tensor, sampling: dict[str, Any], by_topk: bool) -> Tensor:
    """Filtered softmax as eager PyTorch composes it; by_topk: no full sort where top_k is given."""
    z = logits.float() / sampling["temperature"]
    if "top_k" not in sampling:
        return z.softmax(-1)
    if by_topk:
        z_sorted, order = z.topk(sampling["top_k"], dim=-1)
    else:
        z_sorted, order = z.sort(dim=-1, descending=True)
        z_sorted[..., sampling["top_k"] :] = -torch.inf
    p = z_sorted.softmax(-1)
    p = p * (p.cumsum(-1) - p < sampling["top_p"])
    return torch.zeros_like(z).scatter_(-1, order, p / p.sum(-1, keepdim=True))


def eager(problem: Problem, stochastic: bool, sampling: dict[str, Any], by_topk: bool) -> Tensor:
    """The exact rule in eager PyTorch, batched; returns tokens (B, K+1)."""
    target, drafts = problem.target, problem.drafts
    batch, width = drafts.shape
    if not sampling:
        choice = target.argmax(-1)
        count = (choice[:, :-1] == drafts).long().cumprod(-1).sum(-1)
        following = choice.gather(1, count.unsqueeze(1))
    else:
        p = eager_probabilities(target, sampling, by_topk)
        p_draft = p[:, :-1].gather(-1, drafts.unsqueeze(-1)).squeeze(-1)
        if stochastic:
            q = eager_probabilities(problem.draft, sampling, by_topk)
            q_draft = q.gather(-1, drafts.unsqueeze(-1)).squeeze(-1)
        else:
            q_draft = torch.ones_like(p_draft)
        accepts = torch.rand_like(p_draft) * q_draft < p_draft
        count = accepts.long().cumprod(-1).sum(-1)
        row = torch.arange(batch, device=drafts.device)
        left = p[row, count]
        rejected = count < width
        if rejected.any():
            at = count.clamp_max(width - 1)
            if stochastic:
                minus = q[row, at]
            else:
                minus = torch.zeros_like(left).scatter_(1, drafts.gather(1, at.unsqueeze(1)), 1.0)
            left = torch.where(rejected.unsqueeze(1), (left - minus).clamp_min(0), left)
        following = left.multinomial(1)
    tokens = torch.cat([drafts, drafts[:, :1]], 1).scatter(1, count.unsqueeze(1), following)
    columns = torch.arange(width + 1, device=drafts.device)
    return tokens.masked_fill(columns > count.unsqueeze(1), -1)


def transformers_rows(problem: Problem, sampling: dict[str, Any]) -> Tensor:
    """transformers' speculative sampling, which takes one sequence at a time."""
    rows = []
    for b in range(len(problem.drafts)):
        drafts = problem.drafts[b : b + 1]
        target = problem.target[b : b + 1].float() / sampling["temperature"]
        draft = problem.draft[b : b + 1].float() / sampling["temperature"]
        tokens, _ = _speculative_sampling(drafts, draft, drafts.shape[1], target, False)
        rows.append(torch.nn.functional.pad(tokens[0], (0, problem.drafts.shape[1] + 1)))
    return torch.stack([row[: problem.drafts.shape[1] + 1] for row in rows])


def comparison(problem: Problem, case: str) -> Comparison:
    """The bound, the op, and what it replaces, under one case."""
    sampling, stochastic = CASES[case]
    runs: dict[str, Callable[[], Any]] = {
        "bound": problem.bound,
        "ours": lambda: problem.accept(stochastic, sampling).tokens,
        "eager": lambda: eager(problem, stochastic, sampling, by_topk=False),
    }
    if "top_k" in sampling:
        runs["eager, topk"] = lambda: eager(problem, stochastic, sampling, by_topk=True)
    if stochastic and _speculative_sampling is not None:
        runs["transformers"] = lambda: transformers_rows(problem, sampling)
    return agreeing(runs, [problem.expected], [0.0])


def host_overhead() -> float:
    """Microseconds of one call at B = 1, K = 3, V = 256, bfloat16, sampled."""
    problem = Problem((1, 3, 256))
    sampling = {"temperature": 1.0, "seed": 1, "position": 2}
    run = lambda: problem.accept(False, sampling)  # noqa: E731
    return min(timeit.repeat(run, number=1000, repeat=7)) * 1e3


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("competitor", ["bound", "ours", "eager", "eager, topk", "transformers"])
def test_accept(compare: Any, quick: bool, competitor: str, case: str, model: str) -> None:
    if quick and model not in QUICK_MODELS:
        pytest.skip("not quick")
    vocab, _ = MODELS[model]
    batch = 32 if DEVICE == "cuda" else 4
    compare(
        f"acceptance, {case}, {batch} x 4 x {vocab} ({model})",
        competitor,
        lambda: comparison(Problem((batch, 3, vocab), DEVICE), case),
        vocab=vocab,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--slow-repeats", type=int, default=3, help="of the eager competitors")
    parser.add_argument("--json", type=Path, help="save the report there")
    arguments = parser.parse_args()
    problem = Problem(SHAPE)
    cases, left_out = {}, {}
    for case in CASES:
        runs, wrong, _ = comparison(problem, case)
        left_out.update({f"{name} ({case})": why for name, why in wrong.items()})
        fast = {name: runs[name] for name in ("bound", "ours")}
        slow = {name: run for name, run in runs.items() if name != "bound"}
        seconds = interleaved(fast, arguments.repeats, warmup=3)
        others = interleaved(slow, arguments.slow_repeats)
        ours = others.pop("ours")
        cases[case] = {**seconds, "over_ours": {name: s / ours for name, s in others.items()}}
    report = {
        "bench": "acceptance",
        "shape": dict(zip("BKV", SHAPE, strict=True)),
        "dtype": "bfloat16",
        "repeats": arguments.repeats,
        "notes": [f"host time of a call at B = 1, K = 3, V = 256: {host_overhead():.1f} us"],
        "cases": cases,
        "left_out": left_out,
    }
    finish(report, arguments.json)


if __name__ == "__main__":
    main()
