"""What a run logs: one line of JSON for each optimizer step."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from mtp_fast.models.checkpoint import write_atomically

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, as written to `metrics.jsonl`.

    Attributes
    ----------
    step, tokens : int
        Steps and tokens so far, this one included.
    loss : list of float
        Training loss of each head, nats per token.
    validation_loss : list of float, optional
        The same on validation windows, in the steps that measure it.
    learning_rate, grad_norm : float
        Of this step; the norm before clipping.
    seconds : float
        Time spent in steps so far, without validation.
    """

    step: int
    tokens: int
    loss: list[float]
    validation_loss: list[float] | None
    learning_rate: float
    grad_norm: float
    seconds: float


def read_metrics(directory: Path) -> list[StepMetrics]:
    """Read the metrics that a run in `directory` has logged; none if there is no log."""
    file = directory / METRICS_FILE
    if not file.exists():
        return []
    # A killed run may leave half a line.
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [StepMetrics(**json.loads(line)) for line in lines]


def append_metrics(directory: Path, metrics: StepMetrics) -> None:
    """Log a step in `directory`; the first step begins a new log."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / METRICS_FILE).open("w" if metrics.step == 1 else "a") as file:
        file.write(_json_line(metrics))


def forget_later_steps(directory: Path, step: int) -> None:
    """Take the steps after `step` out of the log in `directory`."""
    kept = [metrics for metrics in read_metrics(directory) if metrics.step <= step]
    text = "".join(map(_json_line, kept))
    write_atomically(directory / METRICS_FILE, lambda file: file.write_text(text))


def _json_line(metrics: StepMetrics) -> str:
    return json.dumps(dataclasses.asdict(metrics)) + "\n"
