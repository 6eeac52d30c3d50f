"""Predictability: tokens per forward on sequences whose entropy is known, beside the expectation.

Markov sources of order 2 over 4 symbols, from 0.1 to 1.95 bits a symbol (2 would be noise), each
drawn with every seed. Three numbers for each: what the best possible heads are expected to reach
(`markov.expected_acceptance`); what the best heads reach through `mtp_fast.speculative_accept`;
and, at some entropies, what a small model reaches in `generate` that was trained on the source. All
sample at temperature 1.

    python bench/paper/predictability.py
"""

from __future__ import annotations

import argparse
import statistics
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from markov import MarkovSource, expected_acceptance, simulated_acceptance
from mtp_fast.decoding import generate
from mtp_fast.models import MTPConfig
from mtp_fast.training import Trainer, multi_token_loss
from study import Report, Run, Study, StudyProgress, over_seeds, plus_minus, train_all

ORDER, VOCAB = 2, 4
BITS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 1.95)
TRAINED_BITS = (0.25, 0.75, 1.5)
CASES = (("exact", 2), ("exact", 4), ("exact", 8), ("block", 8))  # rule and heads
MODEL = MTPConfig(VOCAB, 64, 9, 2, 1, n_future_tokens=8, ffn_dim=128, max_seq_len=96)
TRAINING = {"batch_size": 16, "context": 64, "learning_rate": 4e-3, "eval_batches": 1}
PROMPT, NEW_TOKENS, SEQUENCES = 16, 64, 64
SIMULATED_SEQUENCES, SIMULATED_STEPS = 2000, 60
# Simulation and expectation differ by chance alone, a few thousandths at this size.
TOLERANCE = 0.01


def run(arguments: argparse.Namespace, progress: StudyProgress) -> dict[str, Any]:
    """Return a record for each source, rule and number of heads."""
    sources = {
        (bits, seed): MarkovSource.with_entropy(bits, ORDER, VOCAB, seed)
        for bits in BITS
        for seed in range(arguments.seeds)
    }
    records = []
    for done, ((bits, seed), source) in enumerate(sources.items()):
        progress.show(0.2 * done / len(sources), f"{bits} bits a symbol, exact heads")
        for rule, heads in CASES:
            expected = 1 + expected_acceptance(source, heads, rule).sum()
            shape = (SIMULATED_SEQUENCES, SIMULATED_STEPS)
            simulated = 1 + simulated_acceptance(source, heads, rule, *shape, seed).sum()
            if abs(simulated / expected - 1) > TOLERANCE:
                raise RuntimeError(
                    f"{bits} bits, rule {rule}, {heads} heads: {simulated:.3f} tokens per forward "
                    f"where {expected:.3f} are expected; the numbers would mean nothing"
                )
            record = {"bits": bits, "seed": seed, "rule": rule, "heads": heads}
            records.append({**record, "expected": float(expected), "simulated": float(simulated)})
    trained = [key for key in sources if key[0] in TRAINED_BITS]
    for done, (bits, seed) in enumerate(trained):
        left = progress.left / (len(trained) - done)
        part = _Part(progress, 0.2 + 0.8 * done / len(trained), 0.8 / len(trained))
        model = train(sources[bits, seed], bits, seed, left, part)
        for record in records:
            if (record["bits"], record["seed"]) == (bits, seed):
                record["trained"] = model[f"{record['rule']} {record['heads']}"]
                record["trained_bits"] = model["bits"]
    return {"records": records}


class _Part:
    """The part of the progress that one model takes."""

    def __init__(self, progress: StudyProgress, start: float, share: float) -> None:
        self._progress, self._start, self._share = progress, start, share

    def show(self, done: float, note: str) -> None:
        self._progress.show(self._start + self._share * done, note)


def train(
    source: MarkovSource, bits: float, seed: int, seconds: float, progress: Any
) -> dict[str, float]:
    """Train a model on `source`: its loss of head 0 in bits, and tokens per forward by case."""
    corpus = source.sample(256, 2048, 2 * seed), source.sample(SEQUENCES, 96, 2 * seed + 1)
    prompts = torch.from_numpy(corpus[1][:, :PROMPT].astype(np.int64))
    held_out = torch.from_numpy(corpus[1].astype(np.int64))

    @torch.no_grad()
    def evaluate(trainer: Trainer) -> dict[str, float]:
        _, stats = multi_token_loss(trainer.model, held_out, return_stats=True)
        out = {"bits": float(stats.loss[0]) / np.log(2)}
        for rule, heads in CASES:
            options: dict[str, Any] = {"n_heads": heads, "rule": rule, "seed": seed}
            result = generate(trainer.model, prompts, NEW_TOKENS, temperature=1.0, **options)
            out[f"{rule} {heads}"] = 1 + sum(result.stats.acceptance)
        return out

    runs = [Run({"bits": bits}, seed, MODEL, TRAINING)]
    flat = corpus[0].ravel(), corpus[1].ravel()
    return train_all(runs, flat, seconds, progress, evaluate, evaluations=1)[0]["history"][-1]


def rows(report: Report) -> list[list[str]]:
    """Tokens per forward: expected / with exact heads / trained, means over seeds."""
    records = report["results"]["records"]
    names = {"exact": "token rule", "block": "block rule"}
    head = ["bits", *[f"{names[rule]}, {heads} heads" for rule, heads in CASES]]
    table = [[*head, "trained model's loss, bits"]]
    for bits in BITS:
        row = [f"{bits:g}"]
        of_bits = [r for r in records if r["bits"] == bits]
        for rule, heads in CASES:
            case = [r for r in of_bits if (r["rule"], r["heads"]) == (rule, heads)]
            numbers = [statistics.mean(r[name] for r in case) for name in ("expected", "simulated")]
            cell = " / ".join(f"{number:.2f}" for number in numbers)
            if "trained" in case[0]:
                cell += " / " + _mean(case, "trained")
            row.append(cell)
        table.append([*row, _mean(of_bits, "trained_bits") if "trained" in of_bits[0] else ""])
    return table


def _mean(records: list[dict[str, Any]], name: str) -> str:
    by_seed = {r["seed"]: r for r in records}.values()
    return plus_minus(over_seeds(by_seed, [], itemgetter(name))[()], 2)


def draw(report: Report, figure: Figure) -> None:
    """Tokens per forward against entropy: lines are expected, marks are measured."""
    records = report["results"]["records"]
    for axes, name in zip(figure.subplots(1, 2, sharey=True), ("exact", "block"), strict=True):
        for color, heads in enumerate(sorted({heads for rule, heads in CASES if rule == name})):
            case = [r for r in records if (r["rule"], r["heads"]) == (name, heads)]
            means = {
                value: over_seeds([r for r in case if value in r], ["bits"], itemgetter(value))
                for value in ("expected", "simulated", "trained")
            }
            for value, style in (("expected", "-"), ("simulated", "."), ("trained", "x")):
                x = [bits for (bits,) in means[value]]
                y = [mean for mean, _ in means[value].values()]
                label = f"{heads} heads, {value}"
                axes.plot(x, y, style, color=f"C{color}", label=label, markersize=8)
        axes.set(xlabel="entropy rate, bits a symbol (2 is noise)", ylim=(0.9, 8.1))
        axes.set_title("token rule" if name == "exact" else "block rule")
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("tokens per forward")


STUDY = Study("predictability", 4.0, 3, run, rows, draw)

if __name__ == "__main__":
    STUDY.main()
