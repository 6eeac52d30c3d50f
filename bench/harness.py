"""What the benches share: who runs, how time is compared, what the machine is.

Machines are noisy. Competitors run in one process, in turn, and are compared by ratios of medians.
"""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import mtp_fast


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


def interleaved(
    competitors: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1
) -> dict[str, float]:
    """Median seconds of each competitor, run in turn `repeats` times."""
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for repeat in range(warmup + repeats):
        for name, run in competitors.items():
            start = time.perf_counter()
            run()
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> dict[str, Any]:
    """The machine and the versions that a number belongs to."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    info = mtp_fast.build_info()
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "simd": info["simd"],
        "torch": info["torch"],
        "mtp_fast": info["mtp_fast"],
        "date": time.strftime("%Y-%m-%d"),
    }


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
