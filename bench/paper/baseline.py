"""Heads at equal parameters: a next-token model against n = 2, 4, 8 on bytes of real code.

n - 1 layers leave the trunk for n - 1 heads. The loss is that of held-out files of Python's
standard library; head 0 is the model, so its loss shows what the other heads cost or give it.

    python bench/paper/baseline.py
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from matplotlib.figure import Figure

from mtp_fast.demo import standard_library
from mtp_fast.models import MTPConfig, MTPTransformer
from mtp_fast.training import BYTE_VOCAB_SIZE, Corpus, multi_token_loss
from study import Report, Run, Study, StudyProgress, harness, over_seeds, plus_minus, train_all

HEADS = (1, 2, 4, 8)
BATCH, CONTEXT = 8, 128
TRAINING = {"batch_size": BATCH, "context": CONTEXT, "learning_rate": 3e-3, "eval_batches": 8}


def model_of(n: int) -> MTPConfig:
    """Ten layers, the heads included."""
    return MTPConfig(BYTE_VOCAB_SIZE, 64, 10, 2, 1, n, ffn_dim=176, max_seq_len=CONTEXT)


def memory(n: int) -> float:
    """Peak MiB of one forward and backward with `n` heads, above weights and gradients."""
    torch.set_num_threads(1)
    model, tokens = MTPTransformer(model_of(n)), torch.zeros(BATCH, CONTEXT, dtype=torch.int64)
    multi_token_loss(model, tokens[:1, :16]).backward()  # what a first call sets up; the gradients
    return harness.peak_growth(lambda: multi_token_loss(model, tokens).backward())


def run(arguments: argparse.Namespace, progress: StudyProgress) -> dict[str, Any]:
    progress.show(0.0, "measuring memory")
    peaks = {str(n): harness.in_fresh_process(memory, n) for n in HEADS}
    corpus = Corpus(tuple(standard_library())).read()
    runs = [
        Run({"n": n}, seed, model_of(n), TRAINING) for seed in range(arguments.seeds) for n in HEADS
    ]
    records = train_all(runs, corpus, progress.left, progress, lambda t: {"loss": t.validate()})
    return {"memory_mib": peaks, "runs": records}


def _last_loss(record: dict[str, Any], head: int) -> float:
    return record["history"][-1]["loss"][head]


def rows(report: Report) -> list[list[str]]:
    results = report["results"]
    runs, peaks = results["runs"], results["memory_mib"]
    time_of_one = statistics.median(r["step_ms"] for r in runs if r["n"] == 1)
    lines = [["n", "head 0, nats a byte", "head 1", "head 3", "head 7", "step", "memory, MiB"]]
    for n in HEADS:
        chosen = [r for r in runs if r["n"] == n]
        losses = [
            plus_minus(over_seeds(chosen, ["n"], lambda r, k=k: _last_loss(r, k))[n,])
            if k < n
            else ""
            for k in (0, 1, 3, 7)
        ]
        step = statistics.median(r["step_ms"] for r in chosen) / time_of_one
        lines.append([str(n), *losses, f"{step:.2f}x", f"{peaks[str(n)]:.0f}"])
    return lines


def draw(report: Report, figure: Figure) -> None:
    runs = report["results"]["runs"]
    curves, final = figure.subplots(1, 2, width_ratios=(3, 2))
    for i, n in enumerate(HEADS):
        for record in (r for r in runs if r["n"] == n):
            points = record["history"]
            curves.plot(
                [p["tokens"] / 1e6 for p in points],
                [p["loss"][0] for p in points],
                f"C{i}.-",
                label=f"n = {n}" if record["seed"] == 0 else None,
            )
        heads = range(n)
        values = [
            over_seeds([r for r in runs if r["n"] == n], ["n"], lambda r, k=k: _last_loss(r, k))[n,]
            for k in heads
        ]
        means, errors = zip(*values, strict=True)
        final.errorbar(heads, means, errors, fmt=f"C{i}o-", capsize=3, label=f"n = {n}")
    curves.set(title="Validation loss of head 0", xlabel="million bytes seen", ylabel="nats a byte")
    final.set(title="By head, at the end", xlabel="head", xticks=range(max(HEADS)))
    curves.legend(frameon=False)
    final.legend(frameon=False)


STUDY = Study("baseline", budget=4, seeds=2, run=run, rows=rows, draw=draw)

if __name__ == "__main__":
    STUDY.main()
