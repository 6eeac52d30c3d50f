"""The benches: who may be compared, and that every report is made, saved and rendered."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

import bench_acceptance
import bench_cross_entropy
import bench_decoding
import bench_training
import harness
import tables
from mtp_fast import demo
from mtp_fast.models import MTPConfig


def test_a_wrong_competitor_is_left_out() -> None:
    truth = (torch.tensor(2.0), torch.arange(4.0))
    runs = {
        "bound": lambda: None,
        "ours": lambda: truth,
        "close": lambda: (truth[0] * 1.0005, truth[1]),
        "wrong loss": lambda: (truth[0] * 1.002, truth[1]),
        "wrong gradient": lambda: (truth[0], truth[1] * 2),
        "other shape": lambda: (truth[0], truth[1][:1]),
        "not a number": lambda: (truth[0] * torch.nan, truth[1]),
    }
    kept, left_out, bounds = harness.agreeing(runs, truth, [1e-3, 1e-3])
    assert list(kept) == ["bound", "ours", "close"]
    assert bounds == {"bound": 1.0}
    assert list(left_out) == ["wrong loss", "wrong gradient", "other shape", "not a number"]
    assert left_out["wrong gradient"] == "relative errors 0, 1 where 0.001, 0.001 are allowed"


def test_wrong_outputs_of_ours_end_the_bench() -> None:
    with pytest.raises(RuntimeError, match=r"ours, 4 heads: relative errors 1 where 0\.01"):
        harness.agreeing({"ours, 4 heads": lambda: torch.ones(2) * 2}, [torch.ones(2)], [0.01])


def test_a_planted_error_ends_the_bench(monkeypatch) -> None:
    """A loss whose gradient alone is wrong: it must not be timed."""

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            return x.clone()

        @staticmethod
        def backward(_, gradient):
            return gradient * 1.01

    right = bench_cross_entropy.eager
    wrong = lambda x, w, t: right(WrongGradient.apply(x), w, t)  # noqa: E731
    comparison = bench_cross_entropy.comparison
    kept, left_out, _ = comparison((2, 8, 16, 64), "float32", {"eager": right, "wrong": wrong})
    assert "eager" in kept
    assert list(left_out) == ["wrong"]
    monkeypatch.setattr(bench_cross_entropy, "ours", wrong)
    with pytest.raises(RuntimeError, match="ours: relative errors"):
        comparison((2, 8, 16, 64), "float32", {})


def test_in_turn() -> None:
    order = []
    seconds = harness.timings({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3  # the first round warms up
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_in_fresh_process() -> None:
    rows = [["a", "b"], ["'\"", "2"]]
    assert harness.in_fresh_process(tables.table, rows) == tables.table(rows)


def growth_of_64_mib() -> float:
    return harness.peak_growth(lambda: torch.ones(64 << 18))


def test_peak_growth() -> None:
    # In a process whose allocator keeps nothing that earlier tests have freed.
    assert 60 < harness.in_fresh_process(growth_of_64_mib) < 80


@pytest.mark.parametrize(
    ("bench", "arguments"),
    [
        (bench_acceptance, ""),
        (bench_cross_entropy, "--dtype float32"),
        (bench_cross_entropy, "--dtype bfloat16"),
        (bench_cross_entropy, "--memory"),
        (bench_training, "--memory"),
        (bench_training, "--time bytes"),
        (bench_decoding, ""),
        (bench_decoding, "--periodic"),
    ],
)
def test_report(bench, arguments, monkeypatch, tmp_path, capsys) -> None:
    """Each script prints the table of the report that it saves; at small shapes."""
    monkeypatch.setattr(bench_acceptance, "SHAPE", (2, 3, 512))
    monkeypatch.setattr(bench_cross_entropy, "TABLE_SHAPE", (4, 8, 16, 512))
    monkeypatch.setattr(bench_cross_entropy, "peers", lambda: {"eager": bench_cross_entropy.eager})
    monkeypatch.setattr(bench_training, "SHAPES", {"bytes": bench_training.SMALL})
    monkeypatch.setattr(bench_decoding, "SHAPES", ((2, 2, 64, 176),))
    monkeypatch.setattr(bench_decoding, "PERIODIC_SHAPE", (2, 2, 64, 176))
    for module in (bench_cross_entropy, bench_training):
        monkeypatch.setattr(module, "in_fresh_process", lambda *_: 12.5)
        monkeypatch.setattr(module, "keep_freed_memory", lambda: None)
    file = tmp_path / "report.json"
    command = ["bench", *arguments.split(), "--json", str(file)]
    if arguments != "--memory":
        command += ["--repeats", "1"]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    report = json.loads(file.read_text())
    assert report["machine"]["torch"] == torch.__version__
    assert tables.render(report) in capsys.readouterr().out


def test_demo_report(monkeypatch, tmp_path) -> None:
    """What `mtp-fast demo` saves is what README.md's table is made of."""
    files = demo.standard_library()[:30]
    monkeypatch.setattr(demo, "standard_library", lambda: files)
    monkeypatch.setattr(demo, "MODEL", MTPConfig(256, 16, 3, 2, 1, 2, 16, 256))
    monkeypatch.setattr(demo, "N_PROMPTS", 1)
    monkeypatch.setattr(demo, "NEW_TOKENS", 4)
    assert demo.run(tmp_path, 0.01, torch.device("cpu"), 0)
    table = tables.render(json.loads((tmp_path / "report.json").read_text()))
    assert "1 trunk layers and 2 heads; trained for 0.01 minutes; validation loss" in table
    assert len(re.findall(r"^\| [12] +\| \d\.\d\d +\| \d+ +\| \d\.\d\dx", table, re.M)) == 2
