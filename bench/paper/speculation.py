"""Self-speculation on real code: tokens per forward and wall clock against heads, batch, context.

A byte model with 8 heads continues held-out files of the standard library, greedily, with 1 to 8 of
its heads. Times are those of the steps after the prompt. Beside each measurement stands what theory
expects of it:

- tokens per forward: 1 + the sum over drafts of the share of all positions at which that draft and
  those before it are right, read off one pass over the finished text. A generation visits the
  positions that its own acceptance leads to, so the two need not agree.
- speedup: steps saved, times the cost of a step with one head over that of a step with k, if bytes
  read are what costs, and if FLOPs are (`cost_model`). A batch takes the steps of its slowest
  sequence.

    python bench/paper/speculation.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import mtp_fast
from cost_model import decode_bytes, decode_flops
from mtp_fast.decoding import GenerateResult, generate
from mtp_fast.demo import standard_library
from mtp_fast.models import MTPTransformer, load_checkpoint
from mtp_fast.training import Corpus, Windows
from study import Report, Study, StudyProgress, over_seeds, plus_minus, repeats

SHIPPED = Path(mtp_fast.__file__).parent / "checkpoints" / "stdlib"
# Batch and context. Prompts end at the same places whatever the context.
SETTINGS = ((1, 128), (4, 128), (16, 128), (64, 128), (1, 32), (1, 512))
PROMPTS = 64
ALONE = 8  # prompts that batches of less than 8 decode
NEW_TOKENS = 96
# Two tokens whose logits differ by less are a tie: sums depend on how many rows a product has.
TIES = {"float32": 1e-4, "bfloat16": 0.25}
# What the paper says of its byte model of 7 billion parameters, n = 8: speedup, tokens per forward.
PAPER = {2: (1.94, 1.98), 4: (3.67, 3.84), 8: (6.39, 7.04)}


@dataclass
class Case:
    """Prompts continued with a number of heads, in batches; and the times of each repeat."""

    batch: int
    context: int
    heads: int
    seed: int
    prompts: Tensor  # (prompts, context)
    results: list[GenerateResult] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def run(self, model: MTPTransformer) -> None:
        """Continue the prompts; the clock starts with the first token, which the prompt gives."""
        self.results, seconds = [], 0.0
        for prompts in self.prompts.split(self.batch):
            starts: list[float] = []
            result = generate(
                model,
                prompts,
                NEW_TOKENS,
                n_heads=self.heads,
                on_tokens=lambda *_, starts=starts: starts.append(time.perf_counter()),
            )
            seconds += time.perf_counter() - starts[0]
            self.results.append(result)
        self.seconds.append(seconds)

    @property
    def tokens(self) -> list[Tensor]:
        return [tokens for result in self.results for tokens in result.tokens]

    @property
    def steps(self) -> int:
        """Forwards after the prompt; a batch's are those of its slowest sequence."""
        return sum(max(result.stats.forwards) - 1 for result in self.results)

    @property
    def acceptance(self) -> list[float]:
        """Share of forwards in which draft i and those before it were accepted."""
        weights = [sum(r.stats.forwards) - len(r.tokens) for r in self.results]
        return [
            sum(w * r.stats.acceptance[i] for w, r in zip(weights, self.results, strict=True))
            / sum(weights)
            for i in range(self.heads - 1)
        ]


def run(arguments: argparse.Namespace, progress: StudyProgress) -> dict[str, Any]:
    progress.show(0.0, "reading model and text")
    path = SHIPPED if arguments.checkpoint == "shipped" else arguments.checkpoint
    judge = load_checkpoint(path).eval()  # in float32
    model = load_checkpoint(path).eval().to(getattr(torch, arguments.dtype))
    text = Corpus(tuple(standard_library())).read()[1]
    longest = max(context for _, context in SETTINGS)
    prompts = [Windows(text, PROMPTS, longest, seed).batch(0) for seed in range(arguments.seeds)]
    groups = [
        [
            Case(batch, context, k, seed, windows[: max(batch, ALONE), -context:])
            for k in range(1, len(model.heads) + 1)
        ]
        for seed, windows in enumerate(prompts)
        for batch, context in SETTINGS
    ]
    # Repeats are interleaved, so that a disturbance of the machine meets all cases.
    budget = 60 * arguments.budget
    for repeat in repeats(progress.left):
        for case in (case for group in groups for case in group):
            note = f"repeat {repeat + 1}: batch {case.batch}, context {case.context}"
            progress.show(min(1.0, 1 - progress.left / budget), note)
            case.run(model)
        tie = TIES[arguments.dtype]
        records = [record for group in groups for record in _records(group, model, judge, tie)]
    return {"trunk": model.config.n_trunk_layers, "repeats": repeat + 1, "records": records}


def _records(
    group: list[Case], model: MTPTransformer, judge: MTPTransformer, tie: float
) -> Iterator[dict[str, Any]]:
    """Numbers of cases that differ in heads alone, checked against and compared with 1 head."""
    one = group[0]
    shares = expected_acceptance(judge, one.prompts, one.tokens)
    for case in group:
        texts = zip(case.prompts, one.tokens, case.tokens, strict=True)
        gaps = [_gap(judge, *each) for each in texts]
        if max(gaps) > tie:
            raise RuntimeError(
                f"batch {case.batch}, context {case.context}: with {case.heads} heads the text "
                f"differs from that with 1 where logits are {max(gaps):.2g} apart, over {tie:g}"
            )
        # A step in the middle of the generation stands for all of them.
        shape = (case.batch, case.context + NEW_TOKENS // 2)
        of_one, of_case = (
            [cost(model.config, c.heads, *shape) * c.steps for cost in (decode_bytes, decode_flops)]
            for c in (one, case)
        )
        seconds = statistics.median(case.seconds)
        yield {
            "batch": case.batch,
            "context": case.context,
            "heads": case.heads,
            "seed": case.seed,
            "acceptance": case.acceptance,
            "tokens_per_forward": 1 + sum(case.acceptance),
            "expected_tokens_per_forward": 1 + sum(shares[: case.heads - 1]),
            "tokens_per_second": len(case.prompts) * (NEW_TOKENS - 1) / seconds,
            "speedup": statistics.median(one.seconds) / seconds,
            "speedup_by_bytes": of_one[0] / of_case[0],
            "speedup_by_flops": of_one[1] / of_case[1],
            "parted_at_ties": sum(gap > 0 for gap in gaps),
        }


@torch.no_grad()
def expected_acceptance(
    model: MTPTransformer, prompts: Tensor, continuations: list[Tensor]
) -> list[float]:
    """Share of the positions of a text at which draft i and those before it are right.

    Parameters
    ----------
    model : MTPTransformer
        The model, float32.
    prompts : Tensor
        (B, T) int64.
    continuations : list of Tensor
        B tensors (N,) int64, of one head.

    Returns
    -------
    list of float
        One share for each of the n - 1 drafting heads.
    """
    tokens = torch.cat([prompts, torch.stack(continuations)], 1)
    trunk = model.trunk_output(tokens)
    n, first, count = len(model.heads), prompts.shape[1] - 1, len(continuations[0])
    rows = slice(first, first + count - n + 1)  # every head's token lies within the text
    standing = torch.ones(len(tokens), count - n + 1, dtype=torch.bool)
    shares = []
    for k in range(1, n):
        drafts = model.unembedding(model.head(trunk, k)[:, rows]).argmax(-1)
        standing &= drafts == tokens[:, first + 1 + k : first + 2 + k + count - n]
        shares.append(float(standing.float().mean()))
    return shares


@torch.no_grad()
def _gap(judge: MTPTransformer, prompt: Tensor, one: Tensor, other: Tensor) -> float:
    """Logit difference of the first two tokens that differ; 0 if none do."""
    if torch.equal(one, other):
        return 0.0
    first = int((one != other).nonzero()[0])
    logits = judge.logits(torch.cat([prompt, one[:first]])[None])[0, -1]
    return float((logits[one[first]] - logits[other[first]]).abs())


def rows(report: Report) -> list[list[str]]:
    """By heads: what the paper says, and means over seeds."""
    head = ["heads", "paper: speedup / tokens per forward", "tokens per forward", "expected"]
    head += ["speedup, batch 1", "expected, by bytes", "batch 4", "batch 16", "batch 64"]
    head += ["expected, by FLOPs", "tokens per forward, context 32", "512"]
    lines = [[*head, "speedup, context 32", "512"]]
    for k in sorted({r["heads"] for r in report["results"]["records"]}):
        wide, alone = (64, 128), (1, 128)
        line = [str(k), "{:.2f} / {:.2f}".format(*PAPER[k]) if k in PAPER else ""]
        line += [_mean(report, wide, k, "tokens_per_forward")]
        line += [_mean(report, wide, k, "expected_tokens_per_forward")]
        line += [_mean(report, alone, k, "speedup"), _mean(report, alone, k, "speedup_by_bytes")]
        line += [_mean(report, (batch, 128), k, "speedup") for batch in (4, 16, 64)]
        line += [_mean(report, wide, k, "speedup_by_flops")]
        for value in ("tokens_per_forward", "speedup"):
            line += [_mean(report, (1, context), k, value) for context in (32, 512)]
        lines.append(line)
    return lines


def _means(report: Report, setting: tuple[int, int], value: str) -> dict[int, tuple[float, float]]:
    records = report["results"]["records"]
    chosen = [r for r in records if (r["batch"], r["context"]) == setting]
    return {k: mean for (k,), mean in over_seeds(chosen, ["heads"], itemgetter(value)).items()}


def _mean(report: Report, setting: tuple[int, int], heads: int, value: str) -> str:
    return plus_minus(_means(report, setting, value)[heads], 2)


def draw(report: Report, figure: Figure) -> None:
    tokens, batches, contexts = figure.subplots(1, 3)

    def plot(axes: Any, setting: tuple[int, int], value: str, style: str, label: str) -> None:
        means = _means(report, setting, value)
        y, errors = zip(*means.values(), strict=True)
        axes.errorbar(list(means), y, errors, fmt=style, label=label, capsize=2, markersize=4)

    plot(tokens, (64, 128), "tokens_per_forward", "C0o", "measured")
    plot(tokens, (64, 128), "expected_tokens_per_forward", "C0-", "expected")
    tokens.plot(list(PAPER), [x for _, x in PAPER.values()], "k^", label="paper, 7B bytes")
    tokens.set(title="Tokens per forward", ylim=0)
    for color, batch in enumerate((1, 4, 16, 64)):
        plot(batches, (batch, 128), "speedup", f"C{color}o-", f"batch {batch}")
    plot(batches, (1, 128), "speedup_by_bytes", "C0--", "batch 1, by bytes")
    plot(batches, (64, 128), "speedup_by_flops", "C3--", "batch 64, by FLOPs")
    batches.set(title="Speedup, context 128", ylim=0)
    for color, context in enumerate((32, 128, 512)):
        plot(contexts, (1, context), "speedup", f"C{color}o-", f"context {context}")
        plot(contexts, (1, context), "speedup_by_bytes", f"C{color}--", "by bytes")
    contexts.set(title="Speedup, batch 1", ylim=0)
    for axes in (tokens, batches, contexts):
        axes.set_xlabel("heads used")
        axes.legend(fontsize=8)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", default="shipped", metavar="DIR", help="a byte model")
    parser.add_argument("--dtype", choices=TIES, default="float32")


STUDY = Study("speculation", 6.0, 1, run, rows, draw, add_options, threads=2)

if __name__ == "__main__":
    STUDY.main()
