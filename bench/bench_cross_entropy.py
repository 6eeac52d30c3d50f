"""The linear cross-entropies against their bound and their peers, forward and backward.

Bound: the three GEMMs alone (logits, d(hidden), d(weight): 6 N d V FLOPs) at their best chunk of
rows, the logits' buffer allocated inside the timed part as the op does. What the op adds: one read
and one write of every logit and, per chunk, one pass over the float32 d(weight). With AMX, where it
makes products itself, it can take less.

    pytest bench/bench_cross_entropy.py --benchmark-only      # small shapes
    python bench/bench_cross_entropy.py --dtype float32       # the large shape (minutes)
    python bench/bench_cross_entropy.py --memory
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mtp_fast
from harness import (
    DEVICE,
    MODELS,
    QUICK_MODELS,
    Comparison,
    agreeing,
    finish,
    in_fresh_process,
    keep_freed_memory,
    peak_growth,
    timings,
)
from mtp_fast.ops.gemm import torch_multiplies

MIB = 1 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What eager PyTorch's loss, d(hidden) and d(weight) may differ by.
TOLERANCES = {"float32": (1e-5, 1e-4, 1e-4), "bfloat16": (2e-3, 2e-2, 2e-2)}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
RowLoss = Callable[[Tensor, Tensor], Tensor]
COMPETITORS = (
    "bound",
    "bound, 512 rows",
    "bound, 1024 rows",
    "bound, 2048 rows",
    "ours",
    "ours, 4 heads",
    "ours, half of the rows ignored",
    "eager",
    "torch.compile",
    "F.linear_cross_entropy, 512 rows",
    "F.linear_cross_entropy, auto",
    "cut-cross-entropy, torch_compile",
)
# (heads, rows a head, d, V)
TABLE_SHAPE = (4, 1024, 576, 49152)


class Problem:
    """Heads (n, 1, T, d), weight and labels; `flat` is the same as one list of aligned rows."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        heads, length, dim, vocab = shape
        torch.manual_seed(0)
        options = {"device": DEVICE, "dtype": dtype}
        self.hidden = torch.randn(heads, 1, length, dim, **options).requires_grad_()
        self.weight = torch.randn(vocab, dim, **options).mul_(dim**-0.5).requires_grad_()
        self.labels = torch.randint(0, vocab, (1, length), device=DEVICE)
        self.flat = self.hidden.detach().reshape(-1, dim).requires_grad_()
        self.target = torch.randint(0, vocab, (heads * length,), device=DEVICE)
        self.half = self.target.where(torch.rand_like(self.flat[:, 0]) < 0.5, -100)

    def step(self, loss: Loss, target: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward of loss(rows, weight, target): the loss and both gradients."""
        self.flat.grad = self.weight.grad = None
        value = loss(self.flat, self.weight, self.target if target is None else target)
        value.backward()
        return value.detach(), self.flat.grad, self.weight.grad

    def heads_step(self, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
        """The same for a multi-head loss(hidden, weight, labels)."""
        self.hidden.grad = self.weight.grad = None
        value = loss(self.hidden, self.weight, self.labels)
        value.backward()
        return value.detach(), self.hidden.grad, self.weight.grad

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


def eager_rows(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile for one shape: what it knows of others' is dropped, or it would give up."""
    torch.compiler.reset()
    return torch.compile(function)


def eager_heads(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    length, dim = hidden.shape[-2:]
    rows = [head[:, : length - 1 - k].reshape(-1, dim) for k, head in enumerate(hidden)]
    return torch.stack(
        [eager(x, weight, labels[:, 1 + k :].reshape(-1)) for k, x in enumerate(rows)]
    ).sum()


def ours(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return mtp_fast.linear_cross_entropy(x, weight, target)


def peers() -> dict[str, Loss]:
    """The competitors that are installed."""
    found: dict[str, Loss] = {
        "eager": eager,
        "torch.compile": compiled(eager),
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


def comparison(shape: tuple[int, int, int, int], dtype: str, losses: dict[str, Loss]) -> Comparison:
    """The bound at several chunks, our losses, and those of the others that agree with eager."""
    problem = Problem(shape, DTYPES[dtype])
    tolerances = TOLERANCES[dtype]
    rows = len(problem.flat)
    chunks = {f"bound, {r} rows": r for r in (512, 1024, 2048) if r < rows} or {"bound": rows}
    runs: dict[str, Callable[[], Any]] = {
        name: lambda r=r: problem.gemms(r) for name, r in chunks.items()
    }
    runs |= {name: lambda f=loss: problem.step(f) for name, loss in losses.items()}
    flat = agreeing({**runs, "ours": lambda: problem.step(ours)}, problem.step(eager), tolerances)
    heads = agreeing(
        {"ours, 4 heads": lambda: problem.heads_step(mtp_fast.multi_token_cross_entropy)},
        problem.heads_step(eager_heads),
        tolerances,
    )
    ignoring = agreeing(
        {"ours, half of the rows ignored": lambda: problem.step(ours, problem.half)},
        problem.step(eager, problem.half),
        tolerances,
    )
    return flat._replace(runs={**flat.runs, **heads.runs, **ignoring.runs})


def row_comparison(rows: int, vocab: int, dtype: str, losses: dict[str, RowLoss]) -> Comparison:
    """The row kernel alone. Bound: one read of the logits, and one write of as many numbers."""
    torch.manual_seed(0)
    logits = torch.randn(rows, vocab, device=DEVICE, dtype=DTYPES[dtype])
    target = torch.randint(0, vocab, (rows,), device=DEVICE)

    def step(loss: RowLoss) -> tuple[Tensor, Tensor]:
        z = logits.detach().requires_grad_()
        value = loss(z, target)
        value.backward()
        return value.detach(), z.grad

    losses = {"ours": mtp_fast.cross_entropy, **losses}
    runs: dict[str, Callable[[], Any]] = {"bound": logits.clone}
    runs |= {name: lambda f=loss: step(f) for name, loss in losses.items()}
    return agreeing(runs, step(eager_rows), TOLERANCES[dtype][:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("competitor", ["bound", "ours", "eager", "torch.compile"])
def test_cross_entropy(compare: Any, quick: bool, competitor: str, model: str, dtype: str) -> None:
    if quick and dtype != "float32":
        pytest.skip("not quick")
    vocab, _ = MODELS[model]
    rows = 8192 if DEVICE == "cuda" else 64 if quick else 256

    def build() -> Comparison:
        compiling = {} if quick else {"torch.compile": compiled(eager_rows)}
        return row_comparison(rows, vocab, dtype, {"eager": eager_rows, **compiling})

    group = f"cross_entropy {dtype}, {rows} x {vocab} ({model})"
    compare(group, competitor, build, vocab=vocab)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("competitor", COMPETITORS)
def test_linear_cross_entropy(
    compare: Any, quick: bool, competitor: str, model: str, dtype: str
) -> None:
    if quick and (dtype != "float32" or model not in QUICK_MODELS):
        pytest.skip("not quick")
    if DEVICE == "cpu" and not torch_multiplies(DTYPES[dtype]):
        pytest.skip("torch has only loops for these products here: minutes a step")
    vocab, dim = MODELS[model]
    dim = min(dim, 128) if quick else dim
    length = 2048 if DEVICE == "cuda" else 16 if quick else 32

    def build() -> Comparison:
        losses = {"eager": eager} if quick else peers()
        losses = {name: loss for name, loss in losses.items() if name in COMPETITORS}
        return comparison((4, length, dim, vocab), dtype, losses)

    group = f"linear_cross_entropy {dtype}, 4 x {length} x {dim} x {vocab} ({model})"
    compare(group, competitor, build, vocab=vocab)


def time_report(dtype: str, repeats: int) -> dict[str, Any]:
    heads, length, dim, vocab = TABLE_SHAPE
    comparing = comparison(TABLE_SHAPE, dtype, peers())
    seconds = timings(comparing.runs, repeats)
    return {
        "bench": "cross_entropy",
        "shape": {"N": heads * length, "d": dim, "V": vocab},
        "dtype": dtype,
        "repeats": repeats,
        "notes": ["forward and backward", "bound: the three products alone"],
        "runs": {
            name: {"median_s": statistics.median(values), "fastest_s": min(values)}
            for name, values in seconds.items()
        },
        "left_out": comparing.left_out,
    }


def peak_memory(name: str, dtype: str, rows: int) -> float:
    """MiB above inputs and gradients, for a fresh process."""
    heads, _, dim, vocab = TABLE_SHAPE

    def step(problem: Problem) -> None:
        if name == "ours, 4 heads":
            problem.heads_step(mtp_fast.multi_token_cross_entropy)
        else:
            problem.step(eager if name == "eager" else ours)

    step(Problem((heads, 8, dim, 512), DTYPES[dtype]))  # what the first call sets up
    problem = Problem((heads, rows // heads, dim, vocab), DTYPES[dtype])
    return peak_growth(lambda: step(problem)) - (problem.weight.nbytes + problem.flat.nbytes) / MIB


def memory_report() -> dict[str, Any]:
    _, _, dim, vocab = TABLE_SHAPE
    mib: dict[str, list[float | None]] = {}
    for dtype in DTYPES:
        for name in ("ours", "ours, 4 heads"):
            cases = [in_fresh_process(peak_memory, name, dtype, rows) for rows in (4096, 65536)]
            mib[f"{name}, {dtype}"] = cases
        mib[f"eager, {dtype}"] = [in_fresh_process(peak_memory, "eager", dtype, 4096), None]
    mib["bound: chunk + 4 V d + 64 MiB"] = [256 + 4 * vocab * dim / MIB + 64] * 2
    return {
        "bench": "memory",
        "shape": {"d": dim, "V": vocab},
        "notes": [
            "peak resident set above inputs and gradients of one forward and backward, "
            "each in a fresh process"
        ],
        "columns": ["4096 rows", "65536 rows"],
        "mib": mib,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--memory", action="store_true", help="memory instead of time")
    parser.add_argument("--json", type=Path, help="save the report there")
    arguments = parser.parse_args()
    if arguments.memory:
        report = memory_report()
    else:
        keep_freed_memory()
        report = time_report(arguments.dtype, arguments.repeats)
    finish(report, arguments.json)


if __name__ == "__main__":
    main()
