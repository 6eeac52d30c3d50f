"""The paper's studies: each runs from end to end, and its data are what it says they are."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch

PAPER = Path(__file__).parents[1] / "bench" / "paper"
# What makes a study small enough for a test.
SMALL_TRAINING = {"batch_size": 2, "context": 32, "learning_rate": 3e-3, "eval_batches": 1}
SMALL = {"baseline": {"TRAINING": SMALL_TRAINING, "HEADS": (1, 2)}}


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PAPER))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_tables_are_those_of_the_committed_results():
    study = importlib.import_module("study")
    text = study.README.read_text()
    assert study.rendered(text) == text
    for report in study.RESULTS.glob("*.json"):
        assert f"<!-- {report.stem} -->" in text, f"{report.name} has no table in README.md"


def test_rendering_replaces_what_was_there(monkeypatch, tmp_path):
    study, baseline = map(importlib.import_module, ("study", "baseline"))
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    record = {"history": [{"tokens": 1, "loss": [2.0, 2.25, 2.5, 2.5, 3, 3, 3, 3]}], "step_ms": 5.0}
    runs = [{"n": n, "seed": 0, **record} for n in baseline.HEADS]
    report = {
        "arguments": {"budget": 1, "seeds": 1, "threads": 2},
        "machine": {"date": "today", "cpu": "c", "torch": "t", "mtp_fast": "m"},
        "minutes": {"processor": 1.0},
        "results": {"runs": runs, "memory_mib": {str(n): 10 * n for n in baseline.HEADS}},
    }
    (tmp_path / "baseline.json").write_text(json.dumps(report))
    text = study.rendered("a\n<!-- baseline -->\nstale\n<!-- /baseline -->\nb")
    assert "stale" not in text
    assert text.startswith("a\n<!-- baseline -->")
    assert text.endswith("<!-- /baseline -->\nb")
    assert "| 2 | 2.000" in text
    assert "2 threads" in text
    assert study.rendered(text) == text


def test_mean_and_standard_error_over_seeds():
    study = importlib.import_module("study")
    records = [{"n": 1, "x": 1.0}, {"n": 1, "x": 3.0}, {"n": 2, "x": 5.0}]
    groups = study.over_seeds(records, ["n"], lambda r: r["x"])
    assert groups[1,] == (2.0, 1.0)
    assert groups[2,][0] == 5.0
    assert math.isnan(groups[2,][1])
    assert study.plus_minus(groups[1,], digits=1) == "2.0 ± 1.0"
    assert study.plus_minus(groups[2,], digits=1) == "5.0"


@pytest.mark.parametrize("name", SMALL)
def test_a_study_runs_from_end_to_end(name, monkeypatch, tmp_path):
    module = importlib.import_module(name)
    for variable, value in SMALL[name].items():
        monkeypatch.setattr(module, variable, value)
    report = module.STUDY.main(["--budget", "0.001", "--seeds", "2", "--out", str(tmp_path)])
    saved = json.loads((tmp_path / f"{name}.json").read_text())
    assert saved == json.loads(json.dumps(report))
    assert saved["machine"]["torch"] == torch.__version__
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    runs = saved["results"]["runs"]
    assert {run["seed"] for run in runs} == {0, 1}
    for run in runs:
        assert run["history"][-1]["tokens"] > run["history"][0]["tokens"]
        assert run["step_ms"] > 0
    assert len({run["steps"] for run in runs}) == 1
    assert len(module.rows(saved)) > 1
