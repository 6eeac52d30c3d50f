"""Renders the reports in results/ as the tables of the READMEs.

A bench saves its report with --json; the table between `<!-- table NAME -->` and
`<!-- end of table -->` is what render() makes of results/NAME.json.

    python bench/tables.py      # rewrites the tables
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mtp_fast._build_info import machine_line

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
READMES = (
    ROOT / "README.md",
    ROOT / "bench" / "README.md",
    ROOT / "mtp_fast" / "checkpoints" / "stdlib" / "README.md",
)
MARKED = re.compile(r"(?<=<!-- table )(\w+)( -->\n)(.*?)(?=<!-- end of table -->)", re.DOTALL)

Rows = list[list[str]]


def render(report: dict[str, Any]) -> str:
    """What was measured, on which machine, as a caption and a Markdown table."""
    caption = [*SETUP[report["bench"]](report), machine_line(report["machine"])]
    left_out = [f"Left out: {name}, {why}." for name, why in report.get("left_out", {}).items()]
    rows = ROWS[report["bench"]](report)
    return "\n\n".join(["; ".join(caption) + ".", table(rows), *left_out])


def table(rows: Rows) -> str:
    """A Markdown table; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def _setup(report: dict[str, Any]) -> Iterator[str]:
    """Shape, dtype and repeats."""
    yield ", ".join(f"{name} = {value}" for name, value in report["shape"].items())
    if "dtype" in report:
        yield report["dtype"]
    if "repeats" in report:
        yield f"medians of {report['repeats']} interleaved repeats"
    yield from report.get("notes", ())


def _demo_setup(report: dict[str, Any]) -> Iterator[str]:
    model, training = report["model"], report["training"]
    heads = model["n_future_tokens"]
    yield f"{report['parameters'] / 1e6:.1f} million parameters"
    yield f"{model['n_layers'] - heads} trunk layers and {heads} heads"
    yield f"trained for {training['minutes']:g} minutes"
    yield f"validation loss of head 0 {training['validation_loss'][0]:.3f} nats a byte"
    yield "greedy decoding of held-out prompts, batch 1"


def _demo(report: dict[str, Any]) -> Rows:
    rows = [["heads used", "tokens per forward", "tokens/s", "speedup", "identical to 1 head"]]
    for row in report["decoding"]:
        ties = f" ({row['ties']} ties)" if row["ties"] else ""
        numbers = [f"{row['tokens_per_forward']:.2f}", f"{row['tokens_per_second']:.0f}"]
        identical = ("yes" if row["identical"] else "NO") + ties
        rows.append([str(row["heads"]), *numbers, f"{row['speedup']:.2f}x", identical])
    return rows


def _cross_entropy(report: dict[str, Any]) -> Rows:
    runs = report["runs"]
    bound = min(run["median_s"] for name, run in runs.items() if name.startswith("bound"))
    rows = [[report["dtype"], "median ms", "fastest ms", "median over the bound"]]
    for name, run in sorted(runs.items(), key=lambda item: item[1]["median_s"]):
        times = [f"{run[which] * 1e3:.0f}" for which in ("median_s", "fastest_s")]
        rows.append([name, *times, f"{run['median_s'] / bound:.3f}"])
    return rows


def _memory(report: dict[str, Any]) -> Rows:
    """MiB of each case (a row) in each of the columns; None where it was not run."""
    rows = [["MiB", *report["columns"]]]
    for name, values in report["mib"].items():
        rows.append([name, *["" if value is None else f"{value:.0f}" for value in values]])
    return rows


def _acceptance(report: dict[str, Any]) -> Rows:
    peers = ("eager", "eager, topk", "transformers")
    rows = [["case", "bound ms", "ours ms", "over the bound", *[f"{p} / ours" for p in peers]]]
    for case, runs in report["cases"].items():
        bound, ours = runs["bound"], runs["ours"]
        times = [f"{bound * 1e3:.2f}", f"{ours * 1e3:.2f}", f"{ours / bound:.2f}"]
        ratios = [f"{runs['over_ours'][p]:.1f}" if p in runs["over_ours"] else "" for p in peers]
        rows.append([case, *times, *ratios])
    return rows


def _training(report: dict[str, Any]) -> Rows:
    rows = [["ms", "n = 1", "n = 4", "ratio"]]
    for loss, (one, four) in report["seconds"].items():
        rows.append([loss, f"{one * 1e3:.0f}", f"{four * 1e3:.0f}", f"{four / one:.3f}"])
    rows.append(["bound, by FLOPs", "", "", f"{report['bound']:.3f}"])
    return rows


def _decoding(report: dict[str, Any]) -> Rows:
    head = [
        "layers",
        "d, ffn",
        "weights",
        "1 head ms",
        "k heads ms",
        "efficiency",
        "ceiling",
        "of it",
    ]
    rows = [[*head, "in torch's ops: 1 head ms", "k heads ms"]]
    for run in report["runs"]:
        trunk, heads = run["trunk"], run["heads"]
        one, many, *torch = run["seconds"].values()
        ceiling = (trunk + 1) / (trunk + heads)
        numbers = [f"{one * 1e3:.2f}", f"{many * 1e3:.2f}", f"{one / many:.3f}"]
        shares = [f"{ceiling:.3f}", f"{one / many / ceiling:.3f}"]
        slower = [f"{seconds * 1e3:.2f}" for seconds in torch]
        shape = [f"{trunk} + {heads}", f"{run['d']}, {run['ffn']}", run["dtype"]]
        rows.append([*shape, *numbers, *shares, *slower])
    return rows


def _periodic(report: dict[str, Any]) -> Rows:
    rows = [["heads used", "tokens per forward", "tokens/s", "speedup"]]
    rate = {run["heads"]: run["tokens"] / run["seconds"] for run in report["runs"]}
    for run in report["runs"]:
        k = run["heads"]
        speedup = f"{rate[k] / rate[1]:.2f}x"
        rows.append([str(k), f"{run['tokens_per_forward']:.2f}", f"{rate[k]:.0f}", speedup])
    return rows


def _shipped(report: dict[str, Any]) -> Rows:
    drafts = range(1, max(run["heads"] for run in report["runs"]))
    rows = [["heads used", "tokens per forward", *[f"draft {i}" for i in drafts]]]
    for run in report["runs"]:
        shares = [f"{share:.2f}" for share in run["acceptance"]]
        shares += [""] * (len(drafts) - len(shares))
        rows.append([str(run["heads"]), f"{run['tokens_per_forward']:.2f}", *shares])
    return rows


ROWS: dict[str, Callable[[dict[str, Any]], Rows]] = {
    "acceptance": _acceptance,
    "cross_entropy": _cross_entropy,
    "decoding": _decoding,
    "decoding_periodic": _periodic,
    "decoding_shipped": _shipped,
    "demo": _demo,
    "memory": _memory,
    "training": _training,
}
SETUP = {name: _demo_setup if name == "demo" else _setup for name in ROWS}


def rewrite(text: str, results: Path = RESULTS) -> str:
    """The text of a README with each marked table that has a report rendered anew."""

    def replace(match: re.Match[str]) -> str:
        name, mark, _ = match.groups()
        file = results / f"{name}.json"
        if not file.exists():
            return match[0]
        return f"{name}{mark}{render(json.loads(file.read_text()))}\n"

    return MARKED.sub(replace, text)


def main() -> None:
    for readme in READMES:
        readme.write_text(rewrite(readme.read_text()))


if __name__ == "__main__":
    main()
