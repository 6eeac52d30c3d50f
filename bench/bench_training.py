"""Training steps against the number of heads: memory, and time.

Memory: with n heads eager PyTorch keeps n x (B, T, V) logits and every head's activations. Ours
keeps a chunk of logits whatever n is; head by head, one head's activations as well. Resident memory
above weights and gradients at the peak of one forward and backward, a fresh process a case; the
trunk is the same for every n.

Time: at equal parameters (a head replaces a layer of the trunk) a step with n heads does the work
of one with a single head and (n - 1) more unembeddings: 6 T d V FLOPs each, forward and backward.
Bound of the ratio, by FLOPs: (blocks + n unembeddings) / (blocks + 1 unembedding).

    pytest bench/bench_training.py --benchmark-only       # a small model
    python bench/bench_training.py --memory --plot training.png
    python bench/bench_training.py --time bytes           # or: --time smollm2
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from bench_cross_entropy import Problem
from harness import (
    DEVICE,
    Comparison,
    agreeing,
    finish,
    in_fresh_process,
    interleaved,
    keep_freed_memory,
    peak_growth,
)
from mtp_fast.models import MTPConfig, MTPTransformer
from mtp_fast.training import multi_token_loss

MIB = 1 << 20
HEADS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Shape:
    """A model, but for the number of heads, and what a step trains it on."""

    vocab_size: int
    dim: int
    n_layers: int
    attention_heads: int
    kv_heads: int
    ffn_dim: int
    batch: int
    length: int

    def model(self, n: int, n_layers: int | None = None) -> MTPTransformer:
        torch.manual_seed(0)
        layers = self.n_layers if n_layers is None else n_layers
        heads = (self.attention_heads, self.kv_heads)
        config = MTPConfig(
            self.vocab_size, self.dim, layers, *heads, n, self.ffn_dim, max_seq_len=self.length
        )
        return MTPTransformer(config).to(DEVICE)

    def tokens(self) -> Tensor:
        return torch.randint(0, self.vocab_size, (self.batch, self.length)).to(DEVICE)

    def flops_ratio(self, n: int) -> float:
        """Products of a step with `n` heads over those of a step with one."""
        head_dim = self.dim // self.attention_heads
        width = (2 * self.attention_heads + 2 * self.kv_heads) * head_dim
        block = self.dim * (width + 3 * self.ffn_dim)
        attention = self.dim * self.length  # two products over half of the positions
        blocks, unembedding = self.n_layers * (block + attention), self.dim * self.vocab_size
        return (blocks + n * unembedding) / (blocks + unembedding)


SHAPES = {
    # The command line's default model and batch.
    "bytes": Shape(256, 192, 16, 3, 1, 512, batch=8, length=256),
    # SmolLM2-135M's blocks and vocabulary.
    "smollm2": Shape(49_152, 576, 8, 9, 3, 1536, batch=1, length=512),
}
MEMORY_SHAPE = Shape(49_152, 576, 2, 9, 3, 1536, batch=1, length=1024)
QUICK_MEMORY_SHAPE = Shape(49_152, 128, 1, 2, 1, 352, batch=1, length=256)
SMALL = Shape(256, 64, 6, 2, 1, 128, batch=4, length=64)
QUICK_SHAPES = {"bytes": SMALL, "smollm2": Shape(49_152, 128, 6, 2, 1, 352, batch=1, length=128)}


def eager(model: MTPTransformer, tokens: Tensor) -> Tensor:
    """All heads' logits, then one backward."""
    losses = [
        F.cross_entropy(
            model.unembedding(hidden[:, : -1 - k]).float().flatten(0, 1),
            tokens[:, 1 + k :].flatten(),
        )
        for k, hidden in enumerate(model(tokens))
    ]
    return torch.stack(losses).sum()


LOSSES: dict[str, Callable[[MTPTransformer, Tensor], Tensor]] = {
    "eager, all heads": eager,
    "ours, all heads": lambda model, tokens: multi_token_loss(model, tokens),
    "ours, head by head": lambda model, tokens: multi_token_loss(model, tokens, route="headwise"),
}


def forward_backward(
    model: MTPTransformer, tokens: Tensor, loss: Callable[[MTPTransformer, Tensor], Tensor]
) -> list[Tensor]:
    """The loss, and every parameter's gradient."""
    model.zero_grad()
    value = loss(model, tokens)
    value.backward()
    return [value.detach(), *[p.grad for p in model.parameters()]]


class Step:
    """Forward, backward and AdamW with one of the losses; gives the loss and the gradients."""

    def __init__(self, shape: Shape, n: int, loss: str) -> None:
        self.model, self.tokens, self.loss = shape.model(n), shape.tokens(), LOSSES[loss]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def __call__(self) -> list[Tensor]:
        outputs = forward_backward(self.model, self.tokens, self.loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return outputs


def agreeing_steps(shape: Shape, n: int) -> Comparison:
    """A step with n heads by each of the losses that agree with eager's."""
    expected = Step(shape, n, "eager, all heads")()
    steps = {loss: Step(shape, n, loss) for loss in LOSSES}
    return agreeing(steps, expected, [1e-4] * len(expected))


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", ["bytes", "smollm2"])
@pytest.mark.parametrize("competitor", ["bound", "1 head", *LOSSES])
def test_step(compare: Any, quick: bool, competitor: str, name: str, n: int) -> None:
    """A step with n heads. Bound: one with 1, at equal parameters, and the other heads' GEMMs.

    With few tokens a step can be below it: one product for all heads reads the weight once.
    """
    shape = (QUICK_SHAPES if quick else SHAPES)[name]

    def build() -> Comparison:
        steps = agreeing_steps(shape, n)
        one = Step(shape, 1, "ours, all heads")
        more = Problem(
            (n - 1, shape.batch * shape.length, shape.dim, shape.vocab_size), torch.float32
        )
        rows = min(len(more.flat), 2048)  # all heads in one chunk, as the op has them
        runs = {"bound": lambda: (one(), more.gemms(rows)), "1 head": one, **steps.runs}
        return steps._replace(runs=runs, bounds={"bound": 1.0})

    compare(f"training step, {n} heads, {name}", competitor, build, heads=n)


@pytest.mark.parametrize("n", HEADS)
@pytest.mark.parametrize("competitor", LOSSES)
def test_memory(compare: Any, quick: bool, competitor: str, n: int) -> None:
    """Forward and backward with n heads on the same trunk: the peak of each in a fresh process."""
    if quick and n not in (1, 4):
        pytest.skip("not quick")
    shape = QUICK_MEMORY_SHAPE if quick else MEMORY_SHAPE

    def build() -> Comparison:
        model, tokens = shape.model(n, shape.n_layers + n), shape.tokens()
        expected = forward_backward(model, tokens, eager)
        runs = {
            name: lambda f=loss: forward_backward(model, tokens, f) for name, loss in LOSSES.items()
        }
        return agreeing(runs, expected, [1e-4] * len(expected))

    compare(
        f"training memory, {n} heads, V = {shape.vocab_size}, {shape.length} tokens",
        competitor,
        build,
        memory=lambda name: in_fresh_process(peak_memory, name, n, quick),
        heads=n,
    )


def peak_memory(loss: str, n: int, quick: bool) -> float:
    """MiB above weights and gradients, for a fresh process."""
    shape = QUICK_MEMORY_SHAPE if quick else MEMORY_SHAPE
    LOSSES[loss](SMALL.model(2), SMALL.tokens()).backward()  # what the first call sets up
    model, tokens = shape.model(n, shape.n_layers + n), shape.tokens()
    grown = peak_growth(lambda: LOSSES[loss](model, tokens).backward())
    return grown - sum(p.nbytes for p in model.parameters()) / MIB


def memory_report() -> dict[str, Any]:
    s = MEMORY_SHAPE
    return {
        "bench": "memory",
        "shape": {"V": s.vocab_size, "d": s.dim, "trunk layers": s.n_layers},
        "dtype": "float32",
        "notes": [
            f"{s.batch} x {s.length} tokens",
            "peak resident set above weights and gradients of one forward and backward, "
            "each in a fresh process",
        ],
        "columns": [f"n = {n}" for n in HEADS],
        "mib": {
            loss: [in_fresh_process(peak_memory, loss, n, False) for n in HEADS] for loss in LOSSES
        },
    }


def draw_memory(peaks: dict[str, list[float]], plot: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for loss, values in peaks.items():
        axes.plot(HEADS, values, marker="o", label=loss)
    axes.set(xlabel="heads", ylabel="peak MiB above weights and gradients", xticks=HEADS, ylim=0)
    axes.legend()
    FigureCanvasAgg(figure).print_png(plot)


def time_report(name: str, repeats: int) -> dict[str, Any]:
    shape = SHAPES[name]
    steps = {n: agreeing_steps(shape, n).runs for n in (1, 4)}
    runs = {f"{loss}, n = {n}": steps[n][loss] for loss in LOSSES for n in steps}
    seconds = interleaved(runs, repeats)
    return {
        "bench": "training",
        "shape": {"V": shape.vocab_size, "d": shape.dim, "layers": shape.n_layers},
        "dtype": "float32",
        "repeats": repeats,
        "notes": [f"{shape.batch} x {shape.length} tokens", "forward, backward and AdamW"],
        "seconds": {loss: [seconds[f"{loss}, n = {n}"] for n in (1, 4)] for loss in LOSSES},
        "bound": shape.flops_ratio(4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--memory", action="store_true")
    what.add_argument("--time", choices=SHAPES)
    parser.add_argument("--plot", type=Path, help="PNG of the memory")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="save the report there")
    arguments = parser.parse_args()
    if arguments.memory:
        report = memory_report()
        if arguments.plot is not None:
            draw_memory(report["mib"], arguments.plot)
    else:
        keep_freed_memory()
        report = time_report(arguments.time, arguments.repeats)
    finish(report, arguments.json)


if __name__ == "__main__":
    main()
