"""What the benches share: how time is compared, who may be compared, what a report holds.

Machines are noisy. Competitors run in one process, in turn, and are compared by ratios of medians;
one whose outputs are not the expected ones is not timed at all.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp_fast._build_info import machine
from tables import render

Run = Callable[[], Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Vocabulary and width of models that people use; on a GPU, of their large sizes too.
MODELS = {
    "SmolLM2-135M": (49_152, 576),
    "GPT-2": (50_257, 768),
    "Llama-3.2-1B": (128_256, 2048),
    "Qwen3-0.6B": (151_936, 1024),
    "Gemma-3-1B": (262_144, 1152),
}
QUICK_MODELS = ("SmolLM2-135M", "Llama-3.2-1B")
if DEVICE == "cuda":
    MODELS |= {
        "Llama-3-8B": (128_256, 4096),
        "Qwen3-8B": (151_936, 4096),
        "Gemma-2-9B": (256_000, 3584),
    }


def keep_freed_memory() -> None:
    """Make glibc keep the memory it is given back, so that every competitor finds warm pages.

    Otherwise each large buffer is mapped anew, and who pays for cold pages depends on who ran
    before; on a virtual machine whose host takes freed pages back that is more than the difference
    between the competitors.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


class Comparison(NamedTuple):
    """Competitors that may be compared, and why others may not.

    The bound of their times is the least time of a run in `bounds`, each times its factor.
    """

    runs: dict[str, Run]
    left_out: dict[str, str]
    bounds: dict[str, float]


def agreeing(
    runs: Mapping[str, Run], expected: Sequence[Tensor], tolerances: Sequence[float]
) -> Comparison:
    """Leave out the competitors that do not give the expected outputs.

    Parameters
    ----------
    runs : mapping of str to callable
        Competitors by name; each returns as many tensors as are expected (one alone, or a tuple).
        A bound, whose name starts with "bound", computes something else and is kept.
    expected : sequence of Tensor
        The true outputs.
    tolerances : sequence of float
        For each, the largest |output - expected| / |expected|, in the Frobenius norm.

    Raises
    ------
    RuntimeError
        If one of ours, whose name starts with "ours", is wrong.
    """
    bounds = {name: 1.0 for name in runs if name.startswith("bound")}
    comparison = Comparison({}, {}, bounds)
    for name, run in runs.items():
        if not name.startswith("bound"):
            outputs = run()
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            errors = [_error(got, want) for got, want in zip(outputs, expected, strict=True)]
            if not all(e <= allowed for e, allowed in zip(errors, tolerances, strict=True)):
                shown = [", ".join(f"{x:.2g}" for x in xs) for xs in (errors, tolerances)]
                why = "relative errors {} where {} are allowed".format(*shown)
                if name.startswith("ours"):
                    raise RuntimeError(f"{name}: {why}; times would mean nothing")
                comparison.left_out[name] = why
                continue
        comparison.runs[name] = run
    return comparison


def _error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    difference = torch.linalg.vector_norm(got.float() - want.float())
    return float(difference / torch.linalg.vector_norm(want.float()).clamp_min(1e-30))


def timings(
    competitors: Mapping[str, Run], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every run of each competitor, run in turn `repeats` times."""
    synchronize = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for repeat in range(warmup + repeats):
        for name, run in competitors.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def interleaved(competitors: Mapping[str, Run], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each competitor, run in turn `repeats` times."""
    seconds = timings(competitors, repeats, warmup)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_growth(run: Run) -> float:
    """MiB by which a run raises the peak of the resident set, or of what a GPU has allocated."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def peak() -> float:
        status = Path("/proc/self/status").read_text()
        return int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # resets it
    before = peak()
    run()
    return peak() - before


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What function(*arguments) of a bench returns; arguments and result are of JSON's types."""
    module = Path(inspect.getfile(function)).stem
    code = (
        f"import json, {module}; arguments = json.loads({json.dumps(json.dumps(arguments))}); "
        f"print(json.dumps({module}.{function.__name__}(*arguments)))"
    )
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, *filter(None, sys.path)])
    # glibc gives a mapped block back when it is freed; others may stay, resident and unused.
    environment = {**os.environ, "PYTHONPATH": path, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    command = [sys.executable, "-c", code]
    # Not in a checkout's root, where Python would find sources in place of what is installed.
    out = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=here
    )
    return json.loads(out.stdout.splitlines()[-1])


def finish(report: dict[str, Any], file: Path | None) -> None:
    """Print a report as its table, and save it with the machine's description."""
    report = {**report, "machine": machine()}
    print(render(report))
    if file is not None:
        file.write_text(json.dumps(report, indent=1) + "\n")
