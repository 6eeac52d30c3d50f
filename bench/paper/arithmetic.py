"""Arithmetic: do more heads teach a small model to compute with polynomials?

Expressions over F7[X]/(X^degree) (polynomials.py). Training draws the number of operations m
uniformly from 1 to the limit; tests go to twice the limit. A problem counts as solved if greedy
decoding gives every coefficient of the answer.

The paper's setting is `--degree 5 --operations 5`, with or without `--pauses 5` or 10. What a few
minutes on one core can teach is the default here.

    python bench/paper/arithmetic.py
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from mtp_fast.models import MTPConfig
from mtp_fast.training import Trainer
from polynomials import SEPARATOR, VOCAB_SIZE, problem
from study import Report, Run, Study, StudyProgress, over_seeds, plus_minus, train_all

HEADS = (1, 2, 4)
CONTEXT = 64
MODEL = {"dim": 64, "n_layers": 7, "n_attention_heads": 4, "n_kv_heads": 4, "ffn_dim": 128}
TRAINING = {"batch_size": 16, "context": CONTEXT, "learning_rate": 3e-3, "eval_batches": 1}
TRAINING_PROBLEMS, TEST_PROBLEMS = 100_000, 500


class ProblemTest:
    """Share of problems solved, by the number of operations.

    Greedy decoding solves a problem if and only if, shown the answer, the model finds each of its
    tokens the likeliest; so one forward judges all of them.

    Parameters
    ----------
    operations : int
        The largest number of operations.
    degree, pauses : int
        Of the problems.
    n_problems : int
        Problems for each number of operations.
    """

    def __init__(self, operations: int, degree: int, pauses: int, n_problems: int) -> None:
        rng = random.Random("test")
        self.degree = degree
        self.groups: list[tuple[torch.Tensor, torch.Tensor]] = []  # tokens, answers' places
        for m in range(1, operations + 1):
            problems = [problem(m, degree, pauses, rng) for _ in range(n_problems)]
            rows = [[SEPARATOR, *question, *answer] for question, answer in problems]
            length = max(map(len, rows))
            starts = torch.tensor([len(row) - degree for row in rows])
            tokens = torch.tensor([row + [SEPARATOR] * (length - len(row)) for row in rows])
            self.groups.append((tokens, starts[:, None] + torch.arange(degree)))

    @torch.no_grad()
    def __call__(self, trainer: Trainer) -> dict[str, Any]:
        """Return the share solved for each number of operations."""
        solved = []
        for tokens, places in self.groups:
            predicted = trainer.model.logits(tokens).argmax(-1).gather(1, places - 1)
            solved.append(float((predicted == tokens.gather(1, places)).all(1).float().mean()))
        return {"solved": solved}


def run(arguments: argparse.Namespace, progress: StudyProgress) -> dict[str, Any]:
    rng = random.Random("training")
    setting = arguments.degree, arguments.pauses
    told: list[int] = []
    for _ in range(TRAINING_PROBLEMS):
        question, answer = problem(rng.randint(1, arguments.operations), *setting, rng)
        told += [*question, *answer, SEPARATOR]
    tokens = np.array(told, np.uint8)
    test = ProblemTest(2 * arguments.operations, *setting, TEST_PROBLEMS)
    length = max(CONTEXT, *[tokens.shape[1] for tokens, _ in test.groups])
    runs = [
        Run(
            {"n": n},
            seed,
            MTPConfig(VOCAB_SIZE, **MODEL, n_future_tokens=n, max_seq_len=length),
            TRAINING,
        )
        for seed in range(arguments.seeds)
        for n in HEADS
    ]
    return {
        "runs": train_all(runs, (tokens, tokens[: 10 * CONTEXT]), progress.left, progress, test)
    }


def _by_operations(report: Report) -> list[dict[tuple[Any, ...], tuple[float, float]]]:
    """For m = 1, 2, ...: mean and error of the share solved, by (n,)."""
    runs = report["results"]["runs"]
    return [
        over_seeds(runs, ["n"], lambda r, i=i: r["history"][-1]["solved"][i])
        for i in range(len(runs[0]["history"][-1]["solved"]))
    ]


def rows(report: Report) -> list[list[str]]:
    limit = report["arguments"]["operations"]
    lines = [["solved, %", "in training", *[f"n = {n}" for n in HEADS]]]
    for m, groups in enumerate(_by_operations(report), 1):
        cells = [plus_minus(groups[n,], digits=1, scale=100) for n in HEADS]
        lines.append([f"m = {m}", "yes" if m <= limit else "no", *cells])
    return lines


def draw(report: Report, figure: Figure) -> None:
    runs, limit = report["results"]["runs"], report["arguments"]["operations"]
    final, curves = figure.subplots(1, 2)
    groups = _by_operations(report)
    for i, n in enumerate(HEADS):
        means, errors = zip(*[group[n,] for group in groups], strict=True)
        x = range(1, len(groups) + 1)
        final.errorbar(x, means, errors, fmt=f"C{i}o-", capsize=4, label=f"n = {n}")
        histories = [r["history"] for r in runs if r["n"] == n]
        means = np.mean([[np.mean(p["solved"][:limit]) for p in h] for h in histories], 0)
        curves.plot([p["tokens"] / 1e6 for p in histories[0]], means, f"C{i}.-", label=f"n = {n}")
    final.axvline(limit + 0.5, color="0.6", ls="--")
    final.set(title="At the end", xlabel="operations (right of the line: not in training)")
    final.set(ylabel="share of problems solved", ylim=(0, 1), xticks=range(1, len(groups) + 1))
    curves.set(title="In training, problems like those trained on", xlabel="million tokens seen")
    curves.set(ylim=(0, 1))
    final.legend(frameon=False)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--degree", type=int, default=2, help="coefficients of an element")
    parser.add_argument("--operations", type=int, default=2, help="most operations in training")
    parser.add_argument("--pauses", type=int, default=0, help="pause tokens before the answer")


STUDY = Study("arithmetic", 6.5, 2, run=run, rows=rows, draw=draw, add_options=add_options)

if __name__ == "__main__":
    STUDY.main()
