"""The READMEs' tables are what bench/tables.py makes of the committed reports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import tables

TABLES = [
    pytest.param(readme, match[1], match[3], id=match[1])
    for readme in tables.READMES
    for match in tables.MARKED.finditer(readme.read_text())
]
REPORT = {
    "bench": "training",
    "shape": {"V": 256, "d": 192},
    "dtype": "float32",
    "repeats": 5,
    "seconds": {"eager": [0.5, 1.0], "ours": [0.25, 0.375]},
    "bound": 1.25,
    "machine": {
        "cpu": "a processor",
        "gpu": None,
        "simd": "avx2",
        "threads": 2,
        "torch": "2.13.0",
        "mtp_fast": "0.1.0",
        "date": "2026-11-25",
    },
}


@pytest.mark.parametrize(("readme", "name", "text"), TABLES)
def test_table_is_its_report(readme: Path, name: str, text: str) -> None:
    file = tables.RESULTS / f"{name}.json"
    assert text == tables.render(json.loads(file.read_text())) + "\n", "run python bench/tables.py"


def test_every_report_has_a_table() -> None:
    names = [name for _, name, _ in (table.values for table in TABLES)]
    assert len(names) == len(set(names))
    assert {file.stem for file in tables.RESULTS.glob("*.json")} <= set(names)


@pytest.mark.parametrize("readme", tables.READMES, ids=lambda path: path.parent.name)
def test_numbers_are_in_marked_tables(readme: Path) -> None:
    rest = tables.MARKED.sub("", readme.read_text())
    cells = [
        cell.strip() for line in re.findall(r"^\|.*\|$", rest, re.M) for cell in line.split("|")
    ]
    assert [cell for cell in cells if re.fullmatch(r"[\d.,]+x?", cell)] == []


def test_rewrite(tmp_path: Path) -> None:
    text = "a\n<!-- table x -->\n| 1 |\n<!-- end of table -->\nb\n"
    assert tables.rewrite(text, tmp_path) == text
    (tmp_path / "x.json").write_text(json.dumps(REPORT))
    rewritten = tables.rewrite(text, tmp_path)
    assert rewritten == tables.rewrite(rewritten, tmp_path)
    assert rewritten == (
        """a
<!-- table x -->
V = 256, d = 192; float32; medians of 5 interleaved repeats; a processor, avx2, 2 threads, """
        """torch 2.13.0, mtp_fast 0.1.0, 2026-11-25.

| ms              | n = 1 | n = 4 | ratio |
|-----------------|-------|-------|-------|
| eager           | 500   | 1000  | 2.000 |
| ours            | 250   | 375   | 1.500 |
| bound, by FLOPs |       |       | 1.250 |
<!-- end of table -->
b
"""
    )
