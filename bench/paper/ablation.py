"""Dropout schedules and weights of the heads' losses: what each does to a byte model of 4 heads.

One change at a time against the plain model (no dropout, equal weights), on the bytes of Python's
standard library. A seed has the same batches in every variant, so differences are taken seed by
seed.

    python bench/paper/ablation.py
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from matplotlib.figure import Figure

from mtp_fast.demo import standard_library
from mtp_fast.models import MTPConfig
from mtp_fast.training import BYTE_VOCAB_SIZE, Corpus
from study import Report, Run, Study, StudyProgress, over_seeds, plus_minus, train_all

N = 4
MODEL = MTPConfig(BYTE_VOCAB_SIZE, 64, 7, 2, 1, N, ffn_dim=176, max_seq_len=128)
TRAINING = {"batch_size": 8, "context": 128, "learning_rate": 3e-3, "eval_batches": 8}
DROPOUT = (0.1,) * N
WARM_IN = 0.5  # share of the run over which a schedule rises from 0
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout in heads, constant": {"head_dropout": DROPOUT},
    "dropout in heads, warm-in": {"head_dropout": DROPOUT, "dropout_warmup": WARM_IN},
    "head weights decaying": {"head_weights": tuple(0.5**k for k in range(N))},
    "head weights warm-in": {"head_weights_warmup": WARM_IN},
}


def run(arguments: argparse.Namespace, progress: StudyProgress) -> dict[str, Any]:
    corpus = Corpus(tuple(standard_library())).read()
    runs = [
        Run({"variant": name}, seed, MODEL, {**TRAINING, **changes})
        for seed in range(arguments.seeds)
        for name, changes in VARIANTS.items()
    ]
    return {
        "runs": train_all(runs, corpus, progress.left, progress, lambda t: {"loss": t.validate()})
    }


def _head_0(point: dict[str, Any]) -> float:
    return point["loss"][0]


def _later(point: dict[str, Any]) -> float:
    return statistics.mean(point["loss"][1:])


def rows(report: Report) -> list[list[str]]:
    runs = report["results"]["runs"]
    plain = {r["seed"]: r["history"] for r in runs if r["variant"] == "plain"}
    columns = []
    for value in (_head_0, _later):
        columns.append(over_seeds(runs, ["variant"], lambda r, v=value: v(r["history"][-1])))
        for at in (len(plain[0]) // 2, -1):
            difference = over_seeds(
                runs,
                ["variant"],
                lambda r, v=value, i=at: v(r["history"][i]) - v(plain[r["seed"]][i]),
            )
            columns.append(difference)
    head = ["nats a byte", "head 0", "against plain, half-way", "at the end"]
    head += ["mean of heads 1 to 3", "against plain, half-way", "at the end"]
    lines = [head]
    for name in VARIANTS:
        cells = [plus_minus(column[name,]) for column in columns]
        lines.append([name, *["" if c.startswith("0.000 ±") else c for c in cells]])
    return lines


def draw(report: Report, figure: Figure) -> None:
    runs = report["results"]["runs"]
    for axes, value, title in zip(
        figure.subplots(1, 2), (_head_0, _later), ("head 0", "mean of heads 1 to 3"), strict=True
    ):
        for i, name in enumerate(VARIANTS):
            chosen = [r for r in runs if r["variant"] == name]
            points = [
                over_seeds(chosen, ["variant"], lambda r, v=value, j=j: v(r["history"][j]))[name,]
                for j in range(len(chosen[0]["history"]))
            ]
            means, errors = zip(*points, strict=True)
            seen = [p["tokens"] / 1e6 for p in chosen[0]["history"]]
            axes.errorbar(seen, means, errors, fmt=f"C{i}.-", capsize=3, label=name)
        axes.set(title=f"Validation loss, {title}", xlabel="million bytes seen")
        axes.set_ylabel("nats a byte")
    axes.legend(frameon=False)


STUDY = Study("ablation", budget=5, seeds=3, run=run, rows=rows, draw=draw)

if __name__ == "__main__":
    STUDY.main()
