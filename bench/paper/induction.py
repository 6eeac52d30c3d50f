"""Induction: does a second head teach a small model to copy a name from earlier in the story?

Stories (stories.py) are about characters with random two-token names. Once a name has been told,
its first token determines its second; the measure is the accuracy of head 0 on that second token,
in stories whose names never occur in training, with one head and with two, at several sizes. At
equal parameters the trunk of two heads is a layer shorter; so is that of a third model, which has
one head alone: what it lacks is not the second loss.

    python bench/paper/induction.py
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
from stories import VOCAB_SIZE, split_names, story
from study import Report, Run, Study, StudyProgress, over_seeds, plus_minus, train_all

MODELS = ((1, 4), (2, 4), (1, 3))  # heads, and layers with the heads included
DIMS = (16, 32, 64)
CONTEXT = 80
TRAINING = {"batch_size": 16, "context": CONTEXT, "learning_rate": 3e-3, "eval_batches": 1}
TRAINING_STORIES, TEST_STORIES = 40_000, 200


def model_of(dim: int, n: int, layers: int) -> MTPConfig:
    shape = {"n_attention_heads": dim // 16, "n_kv_heads": dim // 16, "ffn_dim": 2 * dim}
    return MTPConfig(VOCAB_SIZE, dim, layers, n_future_tokens=n, max_seq_len=CONTEXT, **shape)


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
    names, _ = split_names()
    rng = random.Random("training")
    told = [t for _ in range(TRAINING_STORIES) for t in story(names, rng).tokens]
    tokens = np.array(told, np.uint16)
    runs = [
        Run({"dim": dim, "n": n, "layers": layers}, seed, model_of(dim, n, layers), TRAINING)
        for seed in range(arguments.seeds)
        for dim in arguments.dims
        for n, layers in MODELS
    ]
    corpus = tokens, tokens[: 10 * CONTEXT]
    return {
        "runs": train_all(
            runs, corpus, progress.left, progress, NameTest(TEST_STORIES), evaluations=10
        )
    }


def _final(record: dict[str, Any]) -> float:
    return record["history"][-1]["accuracy"]


def _best(record: dict[str, Any]) -> float:
    return max(point["accuracy"] for point in record["history"])


def _area(record: dict[str, Any]) -> float:
    """Mean over the run: the earlier a model learns, the larger."""
    return float(np.mean([point["accuracy"] for point in record["history"]]))


KEYS = ["dim", "n", "layers"]


def rows(report: Report) -> list[list[str]]:
    runs = report["results"]["runs"]
    columns = ["at the end, %", "best checkpoint, %", "mean over the run, %"]
    lines = [["d", "n", "trunk", "parameters", *columns]]
    values = [over_seeds(runs, KEYS, value) for value in (_final, _best, _area)]
    for key in values[0]:
        dim, n, layers = key
        parameters = next(r["parameters"] for r in runs if tuple(r[k] for k in KEYS) == key)
        cells = [plus_minus(value[key], digits=1, scale=100) for value in values]
        lines.append([str(dim), str(n), str(layers - n), f"{parameters:,}", *cells])
    return lines


def draw(report: Report, figure: Figure) -> None:
    runs = report["results"]["runs"]
    sizes, curves = figure.subplots(1, 2)
    final = over_seeds(runs, KEYS, _final)
    dims = sorted({r["dim"] for r in runs})
    for color, (n, layers) in enumerate(MODELS):
        name = f"n = {n}, trunk of {layers - n}"
        means, errors = zip(*[final[dim, n, layers] for dim in dims], strict=True)
        sizes.errorbar(dims, means, errors, fmt=f"C{color}o-", capsize=4, label=name)
        for i, dim in enumerate(dims):
            chosen = [r for r in runs if (r["dim"], r["n"], r["layers"]) == (dim, n, layers)]
            means = np.mean([[p["accuracy"] for p in r["history"]] for r in chosen], 0)
            seen = [p["tokens"] / 1e6 for p in chosen[0]["history"]]
            style = ("-", "--", ":", "-.")[i % 4]
            curves.plot(seen, means, f"C{color}{style}", label=f"d = {dim}, {name}")
    sizes.set(title="At the end", xlabel="d", ylim=(0, 1))
    sizes.set_xscale("log", base=2)
    sizes.set_xticks(dims, [str(dim) for dim in dims])
    sizes.set_ylabel("accuracy on a name's second token")
    curves.set(title="In training", xlabel="million tokens seen", ylim=(0, 1))
    sizes.legend(frameon=False)
    curves.legend(frameon=False)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dims", type=int, nargs="+", default=DIMS, help="widths of the models")


STUDY = Study("induction", 26, 6, run=run, rows=rows, draw=draw, add_options=add_options)

if __name__ == "__main__":
    STUDY.main()
