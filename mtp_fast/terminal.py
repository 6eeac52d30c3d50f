"""What the command line shows: training progress, tables, continuations with drafts in colour."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text
from torch import Tensor

from mtp_fast.training import StepMetrics, Trainer

DRAFT_STYLE = "bold green"
# Share of a new step in the shown averages.
SMOOTHING = 0.05


class TrainingProgress:
    """A progress bar: loss by head, tokens per second, time left.

    Where the output is not a terminal, one line a validation instead.
    """

    def __init__(self, trainer: Trainer, console: Console | None = None) -> None:
        self._trainer = trainer
        self._console = console or Console()
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("loss by head [cyan]{task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TextColumn("{task.fields[left]} left"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=1.0, loss="", rate="-", left="-")
        self._loss: list[float] = []
        self._first: StepMetrics | None = None
        self._first_progress = trainer.progress

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def report(self, metrics: StepMetrics) -> None:
        """Show a step."""
        if self._first is None:
            self._first, self._loss = metrics, metrics.loss
            self._first_progress = self._trainer.progress
        self._loss = [
            old + SMOOTHING * (new - old) for old, new in zip(self._loss, metrics.loss, strict=True)
        ]
        loss = _losses(self._loss)
        seconds = metrics.seconds - self._first.seconds
        rate, left = "-", "-"
        if seconds > 0:
            rate = f"{(metrics.tokens - self._first.tokens) / seconds:,.0f}"
            gained = self._trainer.progress - self._first_progress
            if gained > 0:
                left = _clock(seconds / gained * (1 - self._trainer.progress))
        self._progress.update(
            self._task, completed=self._trainer.progress, loss=loss, rate=rate, left=left
        )
        if metrics.validation_loss is not None and not self._console.is_terminal:
            self._console.print(
                f"{self._trainer.progress:4.0%}  step {metrics.step}  loss by head {loss}  "
                f"validation {_losses(metrics.validation_loss)}  {rate} tokens/s  {left} left",
                highlight=False,
                soft_wrap=True,
            )


def print_continuation(
    prompt: Tensor, tokens: Tensor, drafted: Tensor, decode: Callable[[list[int]], str]
) -> None:
    """Print a prompt and its continuation; accepted drafts stand out in colour."""
    ids = [*prompt.tolist(), *tokens.tolist()]
    styles = [*["dim"] * len(prompt), *[DRAFT_STYLE if draft else "" for draft in drafted.tolist()]]
    # A character may take several tokens: decode all of them, then colour by the length of a part.
    whole, text, shown = decode(ids), Text(), 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or styles[end] != styles[end - 1]:
            reached = max(shown, len(decode(ids[:end])))
            text.append(whole[shown:reached], style=styles[end - 1])
            shown = reached
    Console().print(text, soft_wrap=True)


class TextStream:
    """Prints text as its tokens come, each character once it is complete."""

    def __init__(self, prompt: Tensor, decode: Callable[[list[int]], str]) -> None:
        self._ids, self._decode, self._shown = prompt.tolist(), decode, 0
        self._print(self._decode(self._ids).rstrip("\ufffd"))

    def write(self, _: int, tokens: Tensor) -> None:
        """Print new tokens; the first argument is the sequence, of which there is one."""
        self._ids += tokens.tolist()
        self._print(self._decode(self._ids).rstrip("\ufffd"))

    def close(self) -> None:
        """Print what is left, complete or not, and end the line."""
        self._print(self._decode(self._ids))
        print()

    def _print(self, text: str) -> None:
        print(text[self._shown :], end="", flush=True)
        self._shown = max(self._shown, len(text))


def _losses(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
