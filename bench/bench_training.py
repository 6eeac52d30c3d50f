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
import os
import subprocess
import sys
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

from harness import interleaved, keep_freed_memory, machine, table
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
        return MTPTransformer(config)

    def tokens(self) -> Tensor:
        return torch.randint(0, self.vocab_size, (self.batch, self.length))

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
SMALL = Shape(256, 64, 6, 2, 1, 128, batch=4, length=64)


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


class Step:
    """Forward, backward and AdamW with one of the losses."""

    def __init__(self, shape: Shape, n: int, loss: str) -> None:
        self.model, self.tokens, self.loss = shape.model(n), shape.tokens(), LOSSES[loss]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def __call__(self) -> Tensor:
        loss = self.loss(self.model, self.tokens)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_step(benchmark: Any, loss: str, n: int) -> None:
    benchmark.group = f"training step, {n} heads"
    step, reference = Step(SMALL, n, loss), Step(SMALL, n, "eager, all heads")
    torch.testing.assert_close(step(), reference())
    benchmark(step)


MEMORY = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import bench_training as bench
loss, n, shape = bench.LOSSES[sys.argv[2]], int(sys.argv[3]), bench.MEMORY_SHAPE
loss(bench.SMALL.model(2), bench.SMALL.tokens()).backward()  # what the first call sets up
model, tokens = shape.model(n, shape.n_layers + n), shape.tokens()
def peak():  # MiB
    status = Path("/proc/self/status").read_text()
    return int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1]) / 1024
Path("/proc/self/clear_refs").write_text("5")  # resets it
before = peak()
loss(model, tokens).backward()
print(peak() - before - sum(p.nbytes for p in model.parameters()) / bench.MIB)
"""


def peak_memory(loss: str, n: int) -> float:
    """MiB above weights and gradients, in a fresh process."""
    arguments = [str(Path(__file__).parent), loss, str(n)]
    # glibc gives a mapped block back when it is freed; others may stay, resident and unused.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    command = [sys.executable, "-c", MEMORY, *arguments]
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(out.stdout.splitlines()[-1])


def memory_table(plot: Path | None) -> None:
    s = MEMORY_SHAPE
    print(f"V = {s.vocab_size}, d = {s.dim}, {s.batch} x {s.length} tokens, float32")
    print(f"{s.n_layers} trunk layers and n heads; MiB above weights and gradients")
    peaks = {loss: [peak_memory(loss, n) for n in HEADS] for loss in LOSSES}
    rows = [["MiB", *[f"n = {n}" for n in HEADS]]]
    rows += [[loss, *[f"{peak:.0f}" for peak in values]] for loss, values in peaks.items()]
    print(table(rows))
    if plot is None:
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for loss, values in peaks.items():
        axes.plot(HEADS, values, marker="o", label=loss)
    axes.set(xlabel="heads", ylabel="peak MiB above weights and gradients", xticks=HEADS, ylim=0)
    axes.legend()
    FigureCanvasAgg(figure).print_png(plot)


def time_table(name: str, repeats: int) -> None:
    shape = SHAPES[name]
    print(f"{name}: {shape}, float32")
    steps = {f"{loss}, n = {n}": Step(shape, n, loss) for loss in LOSSES for n in (1, 4)}
    seconds = interleaved(steps, repeats)
    rows = [["ms", "n = 1", "n = 4", "ratio"]]
    for loss in LOSSES:
        one, four = (seconds[f"{loss}, n = {n}"] for n in (1, 4))
        rows.append([loss, f"{one * 1e3:.0f}", f"{four * 1e3:.0f}", f"{four / one:.3f}"])
    rows.append(["bound, by FLOPs", "", "", f"{shape.flops_ratio(4):.3f}"])
    print(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--memory", action="store_true")
    what.add_argument("--time", choices=SHAPES)
    parser.add_argument("--plot", type=Path, help="PNG of the memory")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(machine())
    if arguments.memory:
        memory_table(arguments.plot)
    else:
        keep_freed_memory()
        time_table(arguments.time, arguments.repeats)


if __name__ == "__main__":
    main()
