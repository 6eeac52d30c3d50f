"""The linear cross-entropies against their bound and their peers, forward and backward.

Bound: the three GEMMs alone (logits, d(hidden), d(weight): 6 N d V FLOPs) at their best chunk of
rows, the logits' buffer allocated inside the timed part as the op does. What the op adds: one read
and one write of every logit and, per chunk, one pass over the float32 d(weight).

    pytest bench/bench_cross_entropy.py --benchmark-only      # small shapes
    python bench/bench_cross_entropy.py                       # the table, and memory (minutes)
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mtp_fast
from harness import interleaved, keep_freed_memory, machine, table

MIB = 1 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# (heads, rows a head, d, V)
TABLE_SHAPE = (4, 1024, 576, 49152)
SHAPES = {
    "bytes": (4, 1024, 256, 256),
    "gpt2": (4, 64, 768, 50257),
    "smollm2": (4, 64, 576, 49152),
    "llama3": (1, 32, 1024, 128256),
}


class Problem:
    """Heads (n, 1, T, d), weight and labels; `flat` is the same as one list of aligned rows."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, ignored: float = 0.0):
        heads, length, dim, vocab = shape
        torch.manual_seed(0)
        self.hidden = torch.randn(heads, 1, length, dim).to(dtype).requires_grad_()
        self.weight = (torch.randn(vocab, dim) * dim**-0.5).to(dtype).requires_grad_()
        self.labels = torch.randint(0, vocab, (1, length))
        self.flat = self.hidden.detach().reshape(-1, dim).requires_grad_()
        self.target = torch.randint(0, vocab, (heads * length,))
        self.target[torch.rand(heads * length) < ignored] = -100

    def step(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Forward and backward of loss(rows, weight, target)."""
        self.flat.grad = self.weight.grad = None
        value = loss(self.flat, self.weight, self.target)
        value.backward()
        return value.detach()

    def heads_step(self, chunk_bytes: int | None = None) -> Tensor:
        """Forward and backward of our multi-head loss."""
        self.hidden.grad = self.weight.grad = None
        value = mtp_fast.multi_token_cross_entropy(
            self.hidden, self.weight, self.labels, chunk_bytes=chunk_bytes
        )
        value.backward()
        return value.detach()

    def gemms(self, rows: int) -> None:
        """The bound: the three products in chunks of `rows`."""
        x, weight = self.flat.detach(), self.weight.detach()
        logits = x.new_empty((rows, len(weight)))
        d_x, d_weight = torch.empty_like(x), torch.empty_like(weight)
        for start in range(0, len(x), rows):
            piece = x[start : start + rows]
            z = logits[: len(piece)]
            torch.mm(piece, weight.t(), out=z)
            torch.mm(z, weight, out=d_x[start : start + rows])
            if x.dtype == torch.float32:
                d_weight.addmm_(z.t(), piece, beta=min(start, 1))
            else:
                torch.mm(z.t(), piece, out=d_weight)


def eager(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), target)


def ours(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return mtp_fast.linear_cross_entropy(x, weight, target)


def peers() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The competitors that are installed."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }
    if hasattr(F, "linear_cross_entropy"):
        from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

        for rows in (512, 1024, 2048):
            options = LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
            found[f"F.linear_cross_entropy, {rows} rows"] = lambda x, w, t, o=options: (
                F.linear_cross_entropy(x, w, t, options=o)
            )
        found["F.linear_cross_entropy, auto"] = lambda x, w, t: F.linear_cross_entropy(
            x, w, t, options=LinearCrossEntropyOptions()
        )
    try:
        from cut_cross_entropy import linear_cross_entropy as cce
    except ImportError:
        return found
    found["cut-cross-entropy, torch_compile"] = lambda x, w, t: cce(x, w, t, impl="torch_compile")
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("competitor", ["bound", "ours", "ours, heads", "eager"])
def test_forward_backward(benchmark: Any, competitor: str, shape: str, dtype: str) -> None:
    benchmark.group = f"cross-entropy {shape} {dtype}"
    problem = Problem(SHAPES[shape], DTYPES[dtype])
    torch.testing.assert_close(problem.step(ours), problem.step(eager), rtol=1e-3, atol=0.0)
    run = {
        "bound": lambda: problem.gemms(len(problem.flat)),
        "ours": lambda: problem.step(ours),
        "ours, heads": problem.heads_step,
        "eager": lambda: problem.step(eager),
    }[competitor]
    benchmark(run)


def time_table(dtype: str, repeats: int) -> dict[str, float]:
    """Seconds by competitor at the table's shape."""
    problem = Problem(TABLE_SHAPE, DTYPES[dtype])
    half = Problem(TABLE_SHAPE, DTYPES[dtype], ignored=0.5)
    losses = {"ours": ours, **peers()}
    truth = float(problem.step(eager))
    compared: dict[str, Callable[[], Any]] = {
        f"bound, {rows} rows": lambda r=rows: problem.gemms(r) for rows in (512, 1024, 2048)
    }
    for name, loss in losses.items():
        value = float(problem.step(loss))
        if math.isclose(value, truth, rel_tol=2e-3):
            compared[name] = lambda f=loss: problem.step(f)
        else:
            print(f"{name}: loss {value:.4f} where eager has {truth:.4f}; left out")
    compared["ours, 4 heads"] = problem.heads_step
    compared["ours, half of the rows ignored"] = lambda: half.step(ours)
    return interleaved(compared, repeats)


MEMORY = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import bench_cross_entropy as bench
name, dtype, rows = sys.argv[2], sys.argv[3], int(sys.argv[4])
heads, _, dim, vocab = bench.TABLE_SHAPE
loss = {"ours": bench.ours, **bench.peers()}[name] if name != "ours, 4 heads" else None
warm = bench.Problem((heads, 8, dim, 512), bench.DTYPES[dtype])
warm.heads_step() if loss is None else warm.step(loss)
problem = bench.Problem((heads, rows // heads, dim, vocab), bench.DTYPES[dtype])
def peak():  # MiB
    status = Path("/proc/self/status").read_text()
    return int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1]) / 1024
Path("/proc/self/clear_refs").write_text("5")  # resets it
before = peak()
problem.heads_step() if loss is None else problem.step(loss)
gradients = (problem.weight.nbytes + problem.flat.nbytes) / bench.MIB
print(peak() - before - gradients)
"""


def peak_memory(name: str, dtype: str, rows: int) -> float:
    """MiB above inputs and gradients, in a fresh process."""
    arguments = [str(Path(__file__).parent), name, dtype, str(rows)]
    out = subprocess.run(
        [sys.executable, "-c", MEMORY, *arguments], check=True, capture_output=True, text=True
    )
    return float(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--memory", action="store_true", help="memory instead of time")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    heads, length, dim, vocab = TABLE_SHAPE
    print(f"N = {heads * length} rows, d = {dim}, V = {vocab}, forward + backward; {machine()}")
    results: dict[str, Any] = {"machine": machine(), "shape": TABLE_SHAPE}
    if arguments.memory:
        _, _, dim, vocab = TABLE_SHAPE
        rows = [["MiB above inputs and gradients", "4096 rows", "65536 rows"]]
        for dtype in arguments.dtypes:
            for name in ("ours", "ours, 4 heads", "eager"):
                large = peak_memory(name, dtype, 65536) if name != "eager" else math.nan
                values = [peak_memory(name, dtype, 4096), large]
                results[f"{name} {dtype}"] = values
                rows.append([f"{name}, {dtype}", *[f"{v:.0f}" for v in values]])
        bound = 256 + vocab * dim * 4 / MIB + 64
        rows.append(["bound: chunk + 4 V d + 64 MiB", f"{bound:.0f}", f"{bound:.0f}"])
        print(table(rows))
    else:
        for dtype in arguments.dtypes:
            seconds = time_table(dtype, arguments.repeats)
            results[dtype] = seconds
            bound = min(value for name, value in seconds.items() if name.startswith("bound"))
            rows = [[dtype, "ms", "over the bound"]]
            rows += [[k, f"{v * 1e3:.0f}", f"{v / bound:.3f}"] for k, v in seconds.items()]
            print(table(rows), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
