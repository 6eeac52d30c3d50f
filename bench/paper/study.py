"""What the paper's studies share: arguments, training within a budget, results, tables.

A study is a file that ends in a `Study`. `python bench/paper/NAME.py` runs it and writes NAME.json
and NAME.png; `python bench/paper/study.py` writes the committed results' tables into README.md.

Budgets are processor time, not wall-clock: a loaded machine does not change what is learnt.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import math
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from mtp_fast.models import MTPConfig, MTPTransformer
from mtp_fast.training import TrainConfig, Trainer
from mtp_fast.training.data import Tokens

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
import harness  # noqa: E402
from tables import table  # noqa: E402

RESULTS, README = HERE / "results", HERE / "README.md"
Report = dict[str, Any]  # what NAME.json holds; a study's own part is under "results"
MARGIN = 1.15  # what work is given, over what it took before: neighbours on a machine come and go


def processor_time() -> float:
    """Seconds of processor time so far, of this process and of those that it has waited for."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class StudyProgress:
    """How far a study is: what is left of its budget, and a progress bar.

    Where the output is not a terminal, the bar is a line for each new note.
    """

    def __init__(self, name: str, seconds: float = math.inf) -> None:
        self._end = processor_time() + seconds
        columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._progress = Progress(
            TextColumn(f"[bold]{name}"), *columns, TextColumn("{task.description}")
        )
        self._progress.disable = not self._progress.console.is_terminal
        self._task = self._progress.add_task("", total=1.0)
        self._note = ""

    def __enter__(self) -> StudyProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @property
    def left(self) -> float:
        """Seconds of processor time that the study may still take."""
        return self._end - processor_time()

    def show(self, done: float, note: str) -> None:
        """Show the share `done`, in [0, 1], and what is under way."""
        self._progress.update(self._task, completed=done, description=note)
        if note != self._note and self._progress.disable:
            print(f"{done:4.0%}  {note}", flush=True)
        self._note = note


@dataclass(frozen=True)
class Study:
    """One study: how it runs, and how its report reads.

    Parameters
    ----------
    name : str
        The file's name without its suffix, and that of the results.
    budget : float
        Default budget, minutes of processor time.
    seeds : int
        Default number of seeds, which are 0, 1, ...
    run : callable
        ``run(arguments, progress) -> dict``, JSON's types alone; `arguments` has ``budget``,
        ``seeds``, ``threads`` and the study's own options.
    rows : callable
        ``rows(report) -> list of list of str``: the table, its head first.
    draw : callable
        ``draw(report, figure)``.
    add_options : callable
        Adds the study's own options to an ArgumentParser.
    threads : int
        Default of torch's threads.
    """

    name: str
    budget: float
    seeds: int
    run: Callable[[argparse.Namespace, StudyProgress], dict[str, Any]]
    rows: Callable[[Report], list[list[str]]]
    draw: Callable[[Report, Figure], None]
    add_options: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    threads: int = 1

    def main(self, argv: Sequence[str] | None = None) -> Report:
        """Run by the arguments `argv`, by default those of the command line."""
        parser = argparse.ArgumentParser(prog=f"{self.name}.py")
        parser.add_argument("--budget", type=float, default=self.budget, help="processor minutes")
        parser.add_argument("--seeds", type=int, default=self.seeds, help="number of seeds")
        parser.add_argument("--threads", type=int, default=self.threads)
        parser.add_argument("--out", type=Path, default=RESULTS, help="directory of JSON and PNG")
        self.add_options(parser)
        arguments = parser.parse_args(argv)
        for name in ("budget", "seeds", "threads"):
            if not getattr(arguments, name) > 0:
                parser.error(f"--{name} must be positive, got {getattr(arguments, name)}")
        out = arguments.out
        out.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(arguments.threads)
        wall, processor = time.perf_counter(), processor_time()
        with StudyProgress(self.name, 60 * arguments.budget) as progress:
            results = self.run(arguments, progress)
        report = {
            "study": self.name,
            "arguments": {k: v for k, v in vars(arguments).items() if k != "out"},
            "machine": harness.machine(),
            "minutes": {
                "wall": (time.perf_counter() - wall) / 60,
                "processor": (processor_time() - processor) / 60,
            },
            "results": results,
        }
        (out / f"{self.name}.json").write_text(json.dumps(report, indent=1) + "\n")
        figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
        self.draw(report, figure)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
        FigureCanvasAgg(figure).print_png(out / f"{self.name}.png")
        print(self.text(report))
        print(f"wrote {out / self.name}.json and .png")
        return report

    def text(self, report: Report) -> str:
        """The table of a report, and under it what its numbers belong to."""
        where, arguments = report["machine"], report["arguments"]
        threads = f"{arguments['threads']} thread" + "s" * (arguments["threads"] > 1)
        return (
            f"{table(self.rows(report))}\n\n"
            f"{where['date']}, {where['cpu']}, {threads}, torch {where['torch']}, mtp_fast "
            f"{where['mtp_fast']}; {report['minutes']['processor']:.1f} processor minutes; "
            + ", ".join(f"{k} {v}" for k, v in arguments.items() if k not in ("budget", "threads"))
            + "."
        )


@dataclass(frozen=True)
class Run:
    """One model to train.

    Parameters
    ----------
    labels : dict
        What sets it apart within the study, such as n; the seed is added.
    seed : int
        Of weights, batches and dropout.
    model : MTPConfig
        Shape of the model.
    training : dict
        Arguments of TrainConfig; the steps are what the budget allows.
    """

    labels: dict[str, Any]
    seed: int
    model: MTPConfig
    training: dict[str, Any]

    def trainer(self, corpus: tuple[Tokens, Tokens], steps: int, directory: str) -> Trainer:
        """Build the model and what trains it for `steps`."""
        torch.manual_seed(self.seed)
        config = TrainConfig(steps=steps, seed=self.seed, eval_every=steps, **self.training)
        return Trainer(MTPTransformer(self.model), config, *corpus, Path(directory))


def train_all(
    runs: Sequence[Run],
    corpus: tuple[Tokens, Tokens],
    seconds: float,
    progress: StudyProgress,
    evaluate: Callable[[Trainer], dict[str, Any]],
    evaluations: int = 5,
) -> list[dict[str, Any]]:
    """Train every run for the same number of steps, as many as fit into the budget with a margin.

    Parameters
    ----------
    runs : sequence of Run
        What to train, in this order.
    corpus : (ndarray, ndarray)
        Tokens of training and of validation.
    seconds : float
        Budget of processor time for all runs together.
    progress : StudyProgress
        Where to show how far it is.
    evaluate : callable
        ``evaluate(trainer) -> dict``, its model in evaluation mode; called `evaluations` times in
        each run, the last time at its end.

    Returns
    -------
    list of dict
        For each run its labels, ``seed``, ``parameters``, ``steps``, ``step_ms`` (median, processor
        time) and ``history``: ``tokens`` seen so far and what `evaluate` returned.
    """
    started = processor_time()
    costs = _costs(runs, corpus, evaluate, progress)
    left = (seconds - (processor_time() - started)) / MARGIN
    left -= evaluations * sum(c[1] for c in costs)
    steps = max(evaluations, int(left / sum(c[0] for c in costs)))
    marks = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    shares = [steps * step + evaluations * evaluation for step, evaluation in costs]
    records = []
    for i, run in enumerate(runs):
        labels = {**run.labels, "seed": run.seed}
        note = f"{steps} steps: " + ", ".join(f"{k} {v}" for k, v in labels.items())
        history, times = [], []
        with tempfile.TemporaryDirectory() as directory:
            trainer = run.trainer(corpus, steps, directory)
            while trainer.step < steps:
                before = processor_time()
                tokens = trainer.train_step().tokens
                times.append(processor_time() - before)
                if trainer.step in marks:
                    trainer.model.eval()
                    history.append({"tokens": tokens, **evaluate(trainer)})
                done = sum(shares[:i]) + shares[i] * trainer.step / steps
                progress.show(done / sum(shares), note)
        records.append(
            {
                **labels,
                "parameters": sum(p.numel() for p in trainer.model.parameters()),
                "steps": steps,
                "step_ms": 1e3 * statistics.median(times),
                "history": history,
            }
        )
    return records


def repeats(seconds: float, least: int = 1) -> Iterator[int]:
    """Count repeats of what a caller does: `least`, and more while one fits into the budget.

    Parameters
    ----------
    seconds : float
        Budget of processor time for all of them.
    least : int
        How many there are whatever they take.
    """
    started, longest = processor_time(), 0.0
    for repeat in itertools.count():
        before = processor_time()
        if repeat >= least and before - started + MARGIN * longest > seconds:
            return
        yield repeat
        longest = max(longest, processor_time() - before)


def _costs(
    runs: Sequence[Run],
    corpus: tuple[Tokens, Tokens],
    evaluate: Callable[[Trainer], dict[str, Any]],
    progress: StudyProgress,
) -> list[tuple[float, float]]:
    """Seconds of a step and of an evaluation of each run; equal labels, equal cost."""
    progress.show(0.0, "measuring what a step costs")
    known: dict[str, tuple[float, float]] = {}
    for run in runs:
        if str(run.labels) in known:
            continue
        with tempfile.TemporaryDirectory() as directory:
            trainer = run.trainer(corpus, 1 << 30, directory)
            trainer.train_step()
            step = statistics.median(_processor_seconds(trainer.train_step) for _ in range(3))
        trainer.model.eval()
        evaluation = _processor_seconds(functools.partial(evaluate, trainer))
        known[str(run.labels)] = step, evaluation
    return [known[str(run.labels)] for run in runs]


def _processor_seconds(work: Callable[[], object]) -> float:
    before = processor_time()
    work()
    return processor_time() - before


def over_seeds(
    records: Iterable[dict[str, Any]], keys: Sequence[str], value: Callable[[dict[str, Any]], float]
) -> dict[tuple[Any, ...], tuple[float, float]]:
    """Mean and standard error over seeds of a value of the records that agree in `keys`.

    The error of a single seed is NaN.
    """
    groups: dict[tuple[Any, ...], list[float]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(value(record))
    return {
        key: (
            statistics.mean(values),
            statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan,
        )
        for key, values in groups.items()
    }


def plus_minus(mean_and_error: tuple[float, float], digits: int = 3, scale: float = 1.0) -> str:
    """Write a mean and its standard error, the latter left out where there is one seed."""
    mean, error = (scale * x for x in mean_and_error)
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def rendered(text: str) -> str:
    """Return `text` with the table of each committed report between the markers of its study.

    The markers are the lines ``<!-- NAME -->`` and ``<!-- /NAME -->``; NAME is a file's in the
    results, DIRECTORY/STUDY for a study that was run with ``--out`` below them.
    """

    def block(match: re.Match[str]) -> str:
        name = match[1]
        report = json.loads((RESULTS / f"{name}.json").read_text())
        study: Study = importlib.import_module(report["study"]).STUDY
        return f"<!-- {name} -->\n\n{study.text(report)}\n\n<!-- /{name} -->"

    return re.sub(r"<!-- (\w+(?:/\w+)?) -->.*?<!-- /\1 -->", block, text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(rendered(README.read_text()))
