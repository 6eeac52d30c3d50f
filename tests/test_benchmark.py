"""`mtp-fast bench`: what it runs, prints and draws, and what it refuses to report."""

from __future__ import annotations

import json
import shutil
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from mtp_fast import benchmark, cli

BENCH = Path(__file__).parents[1] / "bench"
# Two groups: in one a peer is wrong, in the other it is ours.
MODULE = """
import pytest, torch
from harness import agreeing

def runs(ours, peer):
    tensors = {"ours": ours, "eager": torch.ones(3), "peer": peer}
    found = {name: lambda t=t: t.clone() for name, t in tensors.items()}
    return agreeing({"bound": lambda: None, **found}, [torch.ones(3)], [1e-3])

@pytest.mark.parametrize("competitor", ["bound", "ours", "eager", "peer"])
@pytest.mark.parametrize("ours", [1.0, 2.0])
def test_ones(compare, competitor, ours):
    build = lambda: runs(torch.full((3,), ours), torch.full((3,), 3.0))
    compare(f"ones, {ours}", competitor, build, memory=lambda name: 5.0, heads=4)
"""


def row(bench: str, group: str, competitor: str, ms: float, **extra: object) -> dict[str, object]:
    """An entry of pytest-benchmark's report."""
    extra = {"bound_factor": None, "left_out": {}, "peak_mib": None, **extra}
    return {
        "fullname": f"bench_x.py::test_{bench}[{competitor}]",
        "group": group,
        "name": competitor,
        "params": {"dtype": "float32"},
        "extra_info": extra,
        "stats": {"median": ms / 1e3},
    }


REPORT = {
    "benchmarks": [
        row("cross_entropy", "loss", "bound", 2.0, bound_factor=1.0, vocab=256),
        row("cross_entropy", "loss", "bound, 512 rows", 4.0, bound_factor=1.0, vocab=256),
        row("cross_entropy", "loss", "ours", 3.0, vocab=256, left_out={"peer": "errors"}),
        row("cross_entropy", "loss", "eager", 6.0, vocab=256, left_out={"peer": "errors"}),
        row("memory", "heads", "ours, all heads", 1.0, peak_mib=10.0, heads=4),
        row("memory", "heads", "eager, all heads", 1.5, peak_mib=40.0, heads=4),
        row("periodic", "decoding", "1 head", 8.0, bound_factor=0.25, heads=4),
        row("periodic", "decoding", "ours", 2.5, heads=4),
    ]
}


def printed(table: object) -> list[list[str]]:
    """The cells of a table's body."""
    console = Console(file=StringIO(), width=200)
    console.print(table)
    lines = console.file.getvalue().splitlines()
    return [[cell.strip() for cell in x.split("│")[1:-1]] for x in lines if x.startswith("│")]


def test_ratios() -> None:
    assert printed(benchmark.ratio_table(benchmark.read_rows(REPORT))) == [
        ["loss", "", "", "", ""],
        ["bound", "2", "1.00", "0.67", ""],
        ["bound, 512 rows", "4", "2.00", "1.33", ""],
        ["ours", "3", "1.50", "1.00", ""],
        ["eager", "6", "3.00", "2.00", ""],
        ["heads", "", "", "", ""],
        ["ours, all heads", "1", "", "1.00", "10"],
        ["eager, all heads", "1.5", "", "1.50", "40"],
        ["decoding", "", "", "", ""],
        ["1 head", "8", "4.00", "3.20", ""],
        ["ours", "2.5", "1.25", "1.00", ""],
    ]


def test_who_was_left_out_is_said_once() -> None:
    assert benchmark.left_out(REPORT) == ["left out of loss: peer, errors"]


def test_plots(tmp_path, monkeypatch) -> None:
    drawn = {}
    monkeypatch.setattr(benchmark, "_lines", lambda axes, points: drawn.update({axes: [*points]}))
    benchmark.draw(benchmark.read_rows(REPORT), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    times, memory, speedups = drawn.values()
    assert times[0] == ("bound", 256, 2.0)
    assert [x for x in memory if x[2] is not None] == [
        ("ours, all heads", 4, 10.0),
        ("eager, all heads", 4, 40.0),
    ]
    assert speedups[2:] == [("ours", 4, pytest.approx(3.2)), ("bound, by layers", 4, 4.0)]


def test_wrong_outputs_are_not_reported(tmp_path, monkeypatch, capsys) -> None:
    benches, out = tmp_path / "bench", tmp_path / "out"
    benches.mkdir()
    for name in ("conftest.py", "harness.py", "tables.py", "pytest.ini"):
        shutil.copy(BENCH / name, benches)
    (benches / "bench_ones.py").write_text(MODULE)
    monkeypatch.setattr(benchmark, "find_benches", lambda: benches)
    assert cli.main(["bench", "--quick", "--out", str(out)]) == 1
    shown = capsys.readouterr().out
    report = json.loads((out / "bench.json").read_text())
    reported = [(entry["group"], entry["name"]) for entry in report["benchmarks"]]
    assert reported == [("ones, 1.0", name) for name in ("bound", "ours", "eager")]
    assert all(entry["stats"]["rounds"] == 50 for entry in report["benchmarks"])
    assert "left out of ones, 1.0: peer, relative errors 2 where 0.001 are allowed" in shown
    failed = [line for line in shown.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 1
    assert "ours: relative errors 1 where 0.001" in failed[0]
    assert (out / "bench.png").exists()


def test_without_a_checkout(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(benchmark, "__file__", str(tmp_path / "site-packages/mtp_fast/x.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "in the root of a checkout" in error
    assert not (tmp_path / "out").exists()
    shutil.copytree(BENCH, tmp_path / "bench")
    assert benchmark.find_benches() == tmp_path / "bench"


def test_without_pytest_benchmark(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "pytest_benchmark", None)
    assert cli.main(["bench", "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'mtp-fast[bench]'" in capsys.readouterr().err


def test_the_log_can_be_followed(tmp_path) -> None:
    """What a run has said is in the file while it still runs."""
    log = tmp_path / "bench.log"
    program = f"""
import time, pathlib
print("test_first PASSED [  1%]", flush=True)
ends = time.monotonic() + 20
while "test_first" not in pathlib.Path({str(log)!r}).read_text():
    assert time.monotonic() < ends
    time.sleep(0.01)
"""
    command = [sys.executable, "-c", program]
    assert benchmark._run_logged(command, tmp_path, log, Console(file=StringIO())) == 0
