"""`mtp-fast bench`: run a checkout's benches, print ratios to bounds and peers, and draw."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from mtp_fast._build_info import machine_line


@dataclass(frozen=True)
class Row:
    """A competitor of a group.

    Attributes
    ----------
    bench : str
        The bench's name, as "cross_entropy".
    group, competitor : str
        Ours start with "ours".
    seconds : float
        Median of its runs, which took turns with those of the group's others.
    bound_factor : float or None
        Times this, its time is a bound of the group's; None if it is none.
    peak_mib : float or None
        Peak memory above weights and gradients, where it was measured.
    params, about : dict
        The bench's parameters, and what else it says (vocab, heads).
    """

    bench: str
    group: str
    competitor: str
    seconds: float
    bound_factor: float | None
    peak_mib: float | None
    params: dict[str, Any]
    about: dict[str, Any]


def run(out: Path, quick: bool) -> bool:
    """Run the benches; write `bench.json`, `bench.log` and `bench.png` into `out`.

    Returns
    -------
    bool
        False if a bench failed, as it does when our outputs are not the expected ones.

    Raises
    ------
    ModuleNotFoundError
        Without pytest-benchmark (extra `bench`).
    OSError
        If there is no checkout, or `out` cannot be written.
    """
    import_module("pytest_benchmark")
    benches = find_benches()
    out.mkdir(parents=True, exist_ok=True)
    report_file, log_file = out / "bench.json", out / "bench.log"
    report_file.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(benches.resolve()),
        "-v",
        "-rfE",
        "-p",
        "no:cacheprovider",
    ]
    command += ["--benchmark-only", f"--benchmark-json={report_file.resolve()}"]
    console = Console(soft_wrap=True)
    code = _run_logged([*command, "--quick"] if quick else command, benches, log_file, console)
    if code not in (0, 1) or not report_file.exists() or not report_file.stat().st_size:
        raise OSError(f"the benches ended with code {code} and no report; see {log_file}")
    report = json.loads(report_file.read_text())
    rows = read_rows(report)
    draw(rows, out / "bench.png")
    console.print(ratio_table(rows))
    for why in left_out(report):
        console.print(why, style="yellow")
    machine = {**report["machine_info"]["mtp_fast"], "date": report["datetime"][:10]}
    console.print(machine_line(machine), highlight=False)
    console.print(f"wrote {report_file}, {log_file} and {out / 'bench.png'}")
    for line in log_file.read_text().splitlines():
        if line.startswith(("FAILED", "ERROR")):
            console.print(line, style="red", markup=False)
    return code == 0


def find_benches() -> Path:
    """Return the directory of the benches: beside this package, or in the current directory."""
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        if (root / "bench" / "harness.py").exists():
            return root / "bench"
    raise FileNotFoundError(
        "the benches are in the source tree, not in the installed package: "
        "run mtp-fast bench in the root of a checkout of mtp_fast"
    )


def _run_logged(command: list[str], benches: Path, log_file: Path, console: Console) -> int:
    """Run pytest with its output in a file, and show how far it is; return its exit code."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "COLUMNS": "200"}  # pytest's summary gives the errors in full
    with (
        log_file.open("w", buffering=1) as log,  # by lines
        console.status("benches") as status,
        # Not in a checkout's root, where Python would find sources in place of what is installed.
        subprocess.Popen(command, cwd=benches, env=environment, **pipes) as p,
    ):
        assert p.stdout is not None
        for line in p.stdout:
            log.write(line)
            if done := re.search(r"\[ *(\d+%)\]", line):
                status.update(f"benches: {done[1]}")
        return p.wait()


def read_rows(report: dict[str, Any]) -> list[Row]:
    """Read the report of pytest-benchmark."""
    return [
        Row(
            bench=re.findall(r"::test_(\w+)", entry["fullname"])[0],
            group=entry["group"],
            competitor=entry["name"],
            seconds=entry["stats"]["median"],
            bound_factor=entry["extra_info"]["bound_factor"],
            peak_mib=entry["extra_info"]["peak_mib"],
            params=entry["params"],
            about=entry["extra_info"],
        )
        for entry in report["benchmarks"]
    ]


def left_out(report: dict[str, Any]) -> list[str]:
    """Say which competitors gave wrong outputs, and where."""
    reasons = {
        f"left out of {entry['group']}: {name}, {why}": None
        for entry in report["benchmarks"]
        for name, why in entry["extra_info"]["left_out"].items()
    }
    return list(reasons)


def ratio_table(rows: Iterable[Row]) -> Table:
    """Each competitor's time, over the bound and over ours, and its peak memory."""
    table = Table()
    table.add_column("medians of interleaved runs")
    for name in ("ms", "/ bound", "/ ours", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, group in _by_group(rows).items():
        bounds = [row.seconds * row.bound_factor for row in group if row.bound_factor is not None]
        ours = [row.seconds for row in group if row.competitor.startswith("ours")]
        table.add_section()
        table.add_row(f"[bold]{name}")
        for row in group:
            table.add_row(
                f"  {row.competitor}",
                f"{row.seconds * 1e3:.4g}",
                f"{row.seconds / min(bounds):.2f}" if bounds else "",
                f"{row.seconds / ours[0]:.2f}" if ours else "",
                f"{row.peak_mib:.0f}" if row.peak_mib is not None else "",
            )
    return table


def draw(rows: list[Row], file: Path) -> None:
    """Draw time against V, memory against heads and speedup against heads."""
    figure = Figure(figsize=(14, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    time_axes, memory_axes, speed_axes = figure.subplots(1, 3)

    losses = [r for r in rows if r.bench == "cross_entropy" and r.params["dtype"] == "float32"]
    _lines(time_axes, [(r.competitor, r.about["vocab"], r.seconds * 1e3) for r in losses])
    time_axes.set(
        title="cross_entropy, float32", xlabel="V", ylabel="ms", xscale="log", yscale="log"
    )
    peaks = [(r.competitor, r.about["heads"], r.peak_mib) for r in rows if r.bench == "memory"]
    _lines(memory_axes, peaks)
    memory_axes.set(
        title="training", xlabel="heads", ylabel="peak MiB above weights and gradients", ylim=0
    )
    points = [("ours", 1, 1.0), ("bound, by layers", 1, 1.0)]
    for group in _by_group(r for r in rows if r.bench == "periodic").values():
        by_name = {row.competitor: row for row in group}
        if len(by_name) == 2:
            one, ours = by_name["1 head"], by_name["ours"]
            heads = ours.about["heads"]
            points.append(("ours", heads, one.seconds / ours.seconds))
            points.append(("bound, by layers", heads, 1 / (one.bound_factor or 1.0)))
    _lines(speed_axes, points)
    speed_axes.set(
        title="decoding, every draft accepted", xlabel="heads used", ylabel="speedup", ylim=0
    )
    for axes in (memory_axes, speed_axes):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(file)


def _lines(axes: Axes, points: Iterable[tuple[str, float, float | None]]) -> None:
    """One line for each name, over the points (name, x, y); y is None where it was not measured."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, x, y in points:
        if y is not None:
            lines.setdefault(name, []).append((x, y))
    for name, line in lines.items():
        axes.plot(*zip(*sorted(line), strict=True), marker="o", label=name)
    if lines:
        axes.legend()


def _by_group(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return groups
