"""Scale: what n heads cost at 7, 13 and 70 billion parameters, by a model checked at small sizes.

`cost_model` counts FLOPs, memory, traffic and time from a model's shape. First the same formulas
are held against measurements at shapes that run here; the study fails if one is off by more than
its tolerance. Then they are read at shapes that do not. At equal parameters: heads replace layers.

    python bench/paper/scale.py
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import cost_model as cost
from mtp_fast.decoding import generate
from mtp_fast.models import MTPConfig, MTPTransformer
from mtp_fast.ops.gemm import gemm
from mtp_fast.training import multi_token_loss
from study import Report, Study, StudyProgress, repeats, table

HEADS = (1, 4, 8)
# Llama's shapes, with 4096 positions.
SIZES = {
    "7B": MTPConfig(32_000, 4096, 32, 32, 32, 1, 11_008, 4096),
    "13B": MTPConfig(32_000, 5120, 40, 40, 40, 1, 13_824, 4096),
    "70B": MTPConfig(32_000, 8192, 80, 64, 8, 1, 28_672, 4096),
}
DEVICES = 64
DECODE_CONTEXT = 1024
BATCHES = (1, 16, 64)
# What the paper says of 6.7 billion parameters: training time over that of n = 1; and of 7 billion,
# decoding code: speedup and tokens per forward.
PAPER_TRAINING = {("7B", 4): 1.07}
PAPER_DECODING = {("7B", 4): (3.05, 3.50)}

# Shapes that run here: a vocabulary of bytes and a large one; one to decode with, whose weights are
# too large for the caches, as those of the sizes above are.
BYTES = MTPConfig(256, 256, 10, 4, 2, 1, 704, 1024)
WORDS = MTPConfig(8192, 256, 10, 4, 2, 1, 704, 1024)
DECODER, DECODER_DTYPE = MTPConfig(512, 768, 24, 12, 2, 8, 2048, 256), torch.bfloat16
TRAINED = {"bytes": BYTES, "V = 8192": WORDS}
TOKENS = (2, 256)
LONG_TOKENS = (1, 640)  # beyond 512 positions attention is fused on a CPU too
DECODED = 32
PRODUCT = 1536  # rows of a square matrix, whose product shows what the machine computes
COUNTED, HELD, TIMED = 0.02, 0.10, 0.20  # tolerances: of counts, of memory, of ratios of times


@dataclass(frozen=True)
class Check:
    """A quantity that the model predicts, to lie between two values, and the machine shows."""

    quantity: str
    predicted: tuple[float, float]
    measured: float
    tolerance: float

    @property
    def off(self) -> float:
        """Measured over the nearest value that is predicted."""
        least, most = self.predicted
        return self.measured / min(max(self.measured, least), most)

    @property
    def holds(self) -> bool:
        return abs(self.off - 1) <= self.tolerance


def exactly(value: float) -> tuple[float, float]:
    return value, value


def run(arguments: argparse.Namespace, progress: StudyProgress) -> dict[str, Any]:
    torch.manual_seed(0)
    checks = [*check_flops(progress), *check_memory(progress), *check_decode_bytes(progress)]
    checks += check_times(max(progress.left, 1.0), progress)
    report = {
        "checks": [{**vars(check), "off": check.off, "holds": check.holds} for check in checks],
        "predictions": [prediction(size, n) for size in SIZES for n in HEADS],
    }
    if not all(check.holds for check in checks):
        raise RuntimeError(f"the model is off:\n{table(check_rows(report))}")
    return report


def model_of(shape: MTPConfig, n: int) -> MTPTransformer:
    return MTPTransformer(replace(shape, n_future_tokens=n))


def decoder(shape: MTPConfig) -> MTPTransformer:
    return MTPTransformer(shape).eval().to(DECODER_DTYPE)


def eager_loss(model: MTPTransformer, tokens: Tensor) -> Tensor:
    """Every head's logits at once."""
    losses = [
        F.cross_entropy(model.unembedding(hidden[:, : -1 - k]).mT, tokens[:, 1 + k :])
        for k, hidden in enumerate(model(tokens))
    ]
    return torch.stack(losses).sum()


LOSSES: dict[str, Callable[[MTPTransformer, Tensor], Tensor]] = {
    "eager": eager_loss,
    "parallel": multi_token_loss,
    "headwise": lambda model, tokens: multi_token_loss(model, tokens, route="headwise"),
}


def check_flops(progress: StudyProgress) -> Iterator[Check]:
    """FLOPs of a forward and backward, as torch counts them."""
    for n in HEADS:
        progress.show(0.0, "counting FLOPs")
        model, tokens = model_of(WORDS, n), torch.randint(0, WORDS.vocab_size, TOKENS)
        with FlopCounterMode(display=False) as counter:
            eager_loss(model, tokens).backward()
        predicted = TOKENS[0] * cost.training_flops(model.config, TOKENS[1], causal=False)
        name = f"training, GFLOPs a step, n = {n}"
        yield Check(name, exactly(predicted / 1e9), counter.get_total_flops() / 1e9, COUNTED)


def check_memory(progress: StudyProgress) -> Iterator[Check]:
    """Peak of what torch allocates in a forward and backward."""
    tokens = torch.randint(0, WORDS.vocab_size, LONG_TOKENS)
    for route, loss in LOSSES.items():
        for n in HEADS:
            progress.show(0.05, f"measuring memory, {route}")
            model = model_of(WORDS, n)
            loss(model, tokens).backward()  # the gradients are there before
            predicted = cost.training_memory(model.config, tokens.numel(), route, 4)
            measured = peak_bytes(lambda f=loss, m=model: f(m, tokens).backward())
            name = f"training, MiB above weights and gradients, {route}, n = {n}"
            yield Check(name, exactly(sum(predicted.values()) / 2**20), measured / 2**20, HELD)


def peak_bytes(work: Callable[[], object]) -> int:
    """Most bytes that `work` has allocated through torch at any time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def check_decode_bytes(progress: StudyProgress) -> Iterator[Check]:
    """Memory that decode steps refer to, by the kernel's count of pages."""
    least = {"vocab_size": 2, "n_layers": max(HEADS), "ffn_dim": 2}
    shape = replace(DECODER, dim=2 * DECODER.n_attention_heads, **least)
    nothing = decoder(shape)  # its pages are the program's own
    model = decoder(DECODER)
    for heads in HEADS:
        progress.show(0.1, "counting pages")
        measured = referenced_bytes(model, heads) - referenced_bytes(nothing, heads)
        layers = cost.decode_weights(DECODER, 1)  # the rest are drafting heads: read as int8
        predicted = DECODER_DTYPE.itemsize * layers + cost.decode_weights(DECODER, heads) - layers
        name = f"decoding, MiB of weights a step, {heads} heads"
        yield Check(name, exactly(predicted / 2**20), measured / 2**20, HELD)


def referenced_bytes(model: MTPTransformer, heads: int) -> int:
    """Bytes in pages that the process refers to in the steps after the prompt."""
    counted: list[int] = []

    def count(*_: object) -> None:
        if counted:
            lines = Path("/proc/self/smaps").read_text().splitlines()
            sizes = [int(x.split()[1]) for x in lines if x.startswith("Referenced:")]
            counted.append(1024 * sum(sizes))
        else:
            counted.append(0)
        Path("/proc/self/clear_refs").write_text("1")

    generate(model, torch.zeros(1, 8, dtype=torch.int64), DECODED, n_heads=heads, on_tokens=count)
    return min(counted[1:])


def check_times(seconds: float, progress: StudyProgress) -> list[Check]:
    """Ratios of the times of training steps, and of decode steps, interleaved."""
    work: dict[tuple[str, int], Callable[[], float]] = {}
    for name, shape in TRAINED.items():
        tokens = torch.randint(0, shape.vocab_size, TOKENS)
        for n in HEADS:
            model = model_of(shape, n)
            work[name, n] = lambda m=model, t=tokens: _timed(
                lambda: multi_token_loss(m, t).backward()
            )
    decoding = decoder(DECODER)
    for n in HEADS:
        work["decode", n] = lambda n=n: seconds_a_step(decoding, n)
    factor = torch.randn(PRODUCT, PRODUCT, dtype=DECODER_DTYPE)
    work["product", 1] = lambda: _timed(lambda: factor @ factor)
    operand = torch.randn(PRODUCT, PRODUCT)
    out = torch.empty_like(operand)
    work["losses' product", 1] = lambda: _timed(lambda: gemm(operand, operand, out))
    times: dict[tuple[str, int], list[float]] = {key: [] for key in work}
    for repeat in repeats(seconds, least=3):
        for key, measure in work.items():
            share = max(1 - progress.left / seconds, repeat / 3)
            progress.show(min(1.0, 0.1 + 0.9 * share), f"timing, repeat {repeat + 1}")
            times[key].append(measure())
    median = {key: statistics.median(of[1:]) for key, of in times.items()}
    one = median["decode", 1]
    # What this machine computes and, with one head, reads in a second.
    here = cost.Device(
        2 * PRODUCT**3 / median["product", 1],
        cost.decode_bytes(DECODER, 1, 1, DECODED, DECODER_DTYPE.itemsize) / one,
        math.inf,
    )
    # Of a training step: with one head and few tokens, where blocks are all, and of the losses.
    seconds_a_flop = (
        median["bytes", 1]
        / cost.training_flops(TRAINED["bytes"], TOKENS[1], causal=False)
        / TOKENS[0],
        median["losses' product", 1] / (2 * PRODUCT**3),
    )
    checks = []
    for n in HEADS[1:]:
        for name, shape in TRAINED.items():
            predicted = [
                training_seconds(replace(shape, n_future_tokens=k), *seconds_a_flop) for k in (1, n)
            ]
            ratio = median[name, n] / median[name, 1]
            quantity = f"training step, {name}, time of {n} heads over 1"
            checks.append(Check(quantity, exactly(predicted[1] / predicted[0]), ratio, TIMED))
        least, most = cost.decode_seconds(DECODER, n, 1, DECODED, here)
        quantity = f"decode step, batch 1, time of {n} heads over 1"
        checks.append(Check(quantity, (least / one, most / one), median["decode", n] / one, TIMED))
    return checks


def training_seconds(c: MTPConfig, blocks: float, losses: float) -> float:
    """Of a step, where a FLOP takes `blocks` seconds in the blocks and `losses` in the losses."""
    all_flops = TOKENS[0] * cost.training_flops(c, TOKENS[1], causal=False)
    of_losses = TOKENS[0] * cost.unembedding_flops(c, TOKENS[1])
    return (all_flops - of_losses) * blocks + of_losses * losses


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def seconds_a_step(model: MTPTransformer, heads: int) -> float:
    """Time of a decode step after the prompt, at batch 1."""
    starts: list[float] = []
    prompt = torch.zeros(1, 8, dtype=torch.int64)
    mark = lambda *_: starts.append(time.perf_counter())  # noqa: E731
    result = generate(model, prompt, DECODED, n_heads=heads, on_tokens=mark)
    return (starts[-1] - starts[0]) / (result.stats.forwards[0] - 1)


def prediction(size: str, n: int) -> dict[str, Any]:
    """Return what n heads cost at a size that does not run here."""
    one, c = SIZES[size], replace(SIZES[size], n_future_tokens=n)
    length = c.max_seq_len
    decode = {str(batch): decode_ratio(c, n, batch) for batch in BATCHES}
    return {
        "size": size,
        "n": n,
        "parameters": cost.parameters(c),
        "training_flops": cost.training_flops(c, length) / cost.training_flops(one, length),
        "memory": {route: cost.training_memory(c, length, route, 2) for route in cost.ROUTES},
        "communication": {
            route: cost.communication(c, DEVICES, route) for route in ("parallel", "headwise")
        },
        "decode": decode,
    }


def decode_ratio(c: MTPConfig, n: int, batch: int) -> float:
    """Time of a decode step on an H100 over that of one head, at least."""
    many, one = (cost.decode_seconds(c, k, batch, DECODE_CONTEXT, cost.H100)[0] for k in (n, 1))
    return many / one


def check_rows(results: dict[str, Any]) -> list[list[str]]:
    """Predicted and measured, and how far apart they may be."""
    lines = [["checked here", "predicted", "measured", "measured / predicted", "tolerance"]]
    for check in results["checks"]:
        digits = max(0, 2 - math.floor(math.log10(check["predicted"][0])))
        least, most, measured = (
            f"{x:.{digits}f}" for x in (*check["predicted"], check["measured"])
        )
        predicted = least if least == most else f"{least} to {most}"
        ratio = f"{check['off']:.3f}" + ("" if check["holds"] else " (off)")
        lines.append([check["quantity"], predicted, measured, ratio, f"{check['tolerance']:.0%}"])
    return lines


def rows(report: Report) -> list[list[str]]:
    """What to expect at larger sizes."""
    head = ["size, n", "training FLOPs over n = 1", "paper: time over n = 1"]
    head += ["logits, GB", "all activations, GB", "traffic, GB"]
    head += [f"decode step, batch {batch}" for batch in BATCHES]
    lines = [[*head, "speedup", "paper: speedup"]]
    for p in report["results"]["predictions"]:
        key, memory = (p["size"], p["n"]), p["memory"]
        line = [f"{p['size']}, n = {p['n']}", f"{p['training_flops']:.3f}"]
        line += [f"{PAPER_TRAINING[key]:.2f}" if key in PAPER_TRAINING else ""]
        line += [_gigabytes(memory[route]["logits"] for route in cost.ROUTES)]
        line += [_gigabytes(sum(memory[route].values()) for route in cost.ROUTES)]
        line += [_gigabytes(p["communication"].values())]
        line += [f"{p['decode'][str(batch)]:.3f}" for batch in BATCHES]
        if key in PAPER_DECODING:
            speedup, tokens = PAPER_DECODING[key]
            line += [f"{tokens / p['decode']['1']:.2f}", f"{speedup:.2f}"]
        else:
            line += ["", ""]
        lines.append(line)
    return lines


def _gigabytes(values: Any) -> str:
    return " / ".join(f"{value / 1e9:.1f}" for value in values)


def draw(report: Report, figure: Figure) -> None:
    predictions, checks = report["results"]["predictions"], report["results"]["checks"]
    memory, decoding, checked = figure.subplots(1, 3)
    for route in cost.ROUTES:
        y = [p["memory"][route]["logits"] / 1e9 for p in predictions if p["size"] == "7B"]
        memory.plot(HEADS, y, "o-", label=route)
    memory.set(title="7B, 4096 tokens: logits, GB", xlabel="heads", xticks=HEADS, ylim=0)
    batches = [2**i for i in range(10)]
    for i, (size, shape) in enumerate(SIZES.items()):
        for n, style in zip(HEADS[1:], ("-", "--"), strict=True):
            c = replace(shape, n_future_tokens=n)
            y = [decode_ratio(c, n, b) for b in batches]
            decoding.plot(batches, y, f"C{i}{style}", label=f"{size}, {n} heads")
    decoding.set(title="Decode step over that of 1 head, H100", xlabel="batch", xscale="log")
    ratios = [check["off"] for check in checks]
    places = range(len(checks))
    checked.errorbar(ratios, places, xerr=[check["tolerance"] for check in checks], fmt="none")
    checked.plot(ratios, places, "o", markersize=4)
    checked.axvline(1, color="0.5")
    checked.set_yticks(places, [check["quantity"] for check in checks], fontsize=5)
    checked.set_title("Measured here / predicted")
    for axes in (memory, decoding):
        axes.legend(fontsize=8)


class ScaleStudy(Study):
    """A study with a second table: its checks."""

    def text(self, report: Report) -> str:
        return f"{table(check_rows(report['results']))}\n\n{super().text(report)}"


STUDY = ScaleStudy("scale", 3.0, 1, run, rows, draw, threads=2)

if __name__ == "__main__":
    STUDY.main()
