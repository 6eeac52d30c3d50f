"""Induction: does a second head teach a small model to copy a name from earlier in the story?

Stories (stories.py) are about characters with random two-token names. Once a name has been told,
its first token determines its second; the measure is the accuracy of head 0 on that second token,
in stories whose names never occur in training, with one head and with two, at several sizes.

    python bench/paper/induction.py
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from mtp_fast.models import MTPConfig
from mtp_fast.training import Trainer
from stories import VOCAB_SIZE, split_names, story
from study import Report, Run, Study, StudyProgress, over_seeds, plus_minus, train_all

HEADS = (1, 2)
DIMS = (16, 32, 64)
CONTEXT = 80
TRAINING = {"batch_size": 16, "context": CONTEXT, "learning_rate": 3e-3, "eval_batches": 1}
TRAINING_STORIES, TEST_STORIES = 40_000, 200


def model_of(dim: int, n: int) -> MTPConfig:
    """Four layers, the heads included."""
    return MTPConfig(VOCAB_SIZE, dim, 4, dim // 16, dim // 16, n, 2 * dim, max_seq_len=CONTEXT)


class NameTest:
    """Accuracy of head 0 on the second tokens of names.

    Parameters
    ----------
    n_stories : int
        How many stories; their names are held out.
    """

    def __init__(self, n_stories: int) -> None:
        _, names = split_names()
        rng = random.Random("test")
        stories = [story(names, rng) for _ in range(n_stories)]
        length = max(len(s.tokens) for s in stories)
        self.tokens = torch.tensor([s.tokens + [0] * (length - len(s.tokens)) for s in stories])
        mentions = [(b, i, again) for b, s in enumerate(stories) for i, again in s.mentions]
        self.story, self.position, self.again = torch.tensor(mentions).unbind(1)

    @torch.no_grad()
    def __call__(self, trainer: Trainer) -> dict[str, Any]:
        """Return the accuracy on names told before, and on those that are new in the story."""
        predicted = trainer.model.logits(self.tokens).argmax(-1)[self.story, self.position - 1]
        right = (predicted == self.tokens[self.story, self.position]).float()
        again = self.again.bool()
        return {"accuracy": float(right[again].mean()), "new": float(right[~again].mean())}


def run(arguments: argparse.Namespace, progress: StudyProgress) -> dict[str, Any]:
    started = time.process_time()
    names, _ = split_names()
    rng = random.Random("training")
    told = [t for _ in range(TRAINING_STORIES) for t in story(names, rng).tokens]
    tokens = np.array(told, np.uint16)
    runs = [
        Run({"dim": dim, "n": n}, seed, model_of(dim, n), TRAINING)
        for seed in range(arguments.seeds)
        for dim in arguments.dims
        for n in HEADS
    ]
    left = 60 * arguments.budget - (time.process_time() - started)
    corpus = tokens, tokens[: 10 * CONTEXT]
    return {"runs": train_all(runs, corpus, left, progress, NameTest(TEST_STORIES), evaluations=10)}


def _final(record: dict[str, Any]) -> float:
    return record["history"][-1]["accuracy"]


def _best(record: dict[str, Any]) -> float:
    return max(point["accuracy"] for point in record["history"])


def _area(record: dict[str, Any]) -> float:
    """Mean over the run: the earlier a model learns, the larger."""
    return float(np.mean([point["accuracy"] for point in record["history"]]))


def rows(report: Report) -> list[list[str]]:
    runs = report["results"]["runs"]
    lines = [["parameters", "n", "at the end, %", "best checkpoint, %", "mean over the run, %"]]
    values = [over_seeds(runs, ["dim", "n"], value) for value in (_final, _best, _area)]
    for key in values[0]:
        parameters = next(r["parameters"] for r in runs if (r["dim"], r["n"]) == key)
        cells = [plus_minus(value[key], digits=1, scale=100) for value in values]
        lines.append([f"{parameters:,}", str(key[1]), *cells])
    return lines


def draw(report: Report, figure: Figure) -> None:
    runs = report["results"]["runs"]
    sizes, curves = figure.subplots(1, 2)
    dims = sorted({r["dim"] for r in runs})
    parameters = {r["dim"]: r["parameters"] for r in runs}
    final = over_seeds(runs, ["dim", "n"], _final)
    for n in HEADS:
        means, errors = zip(*[final[dim, n] for dim in dims], strict=True)
        x = [parameters[dim] for dim in dims]
        sizes.errorbar(x, means, errors, fmt=f"C{n - 1}o-", capsize=4, label=f"n = {n}")
        for i, dim in enumerate(dims):
            chosen = [r for r in runs if (r["dim"], r["n"]) == (dim, n)]
            means = np.mean([[p["accuracy"] for p in r["history"]] for r in chosen], 0)
            seen = [p["tokens"] / 1e6 for p in chosen[0]["history"]]
            label, style = f"{parameters[dim]:,}, n = {n}", ("-", "--", ":", "-.")[i % 4]
            curves.plot(seen, means, f"C{n - 1}{style}", label=label)
    sizes.set(title="At the end", xlabel="parameters", xscale="log", ylim=(0, 1))
    sizes.set_ylabel("accuracy on a name's second token")
    curves.set(title="In training", xlabel="million tokens seen", ylim=(0, 1))
    sizes.legend(frameon=False)
    curves.legend(frameon=False)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS, help="widths of the models")


STUDY = Study("induction", 9, 3, run=run, rows=rows, draw=draw, add_options=add_options)

if __name__ == "__main__":
    STUDY.main()
