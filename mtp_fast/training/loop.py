"""The training loop: AdamW, warm-up and cosine, clipping, validation by head, checkpoints.

A run is a function of its configuration, corpus and seed: batches and dropout masks depend on the
step's number alone, so a run that was stopped and resumed has the same losses as one that was not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from mtp_fast.models import MTPTransformer, load_checkpoint, save_checkpoint
from mtp_fast.models.checkpoint import write_atomically
from mtp_fast.training.data import Tokens, Windows
from mtp_fast.training.loss import multi_token_loss

STATE_FILE = "training_state.pt"
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Parameters
    ----------
    steps : int, optional
        Optimizer steps of the whole run.
    minutes : float, optional
        Or its wall-clock budget, which the schedule then follows. One of the two must be given.
    batch_size, context : int
        Windows of a micro-batch, and tokens of a window.
    accumulation : int
        Micro-batches of an optimizer step.
    learning_rate, final_learning_rate : float
        Peak after the warm-up, and the cosine's end.
    warmup : float
        Share of the run in which the rate rises linearly.
    weight_decay, beta1, beta2 : float
        Of AdamW; matrices decay, norms do not.
    grad_clip : float
        Largest gradient norm.
    precision : {"bfloat16", "float32"}
        "bfloat16" runs the model under autocast; parameters stay float32.
    route : {"parallel", "headwise"}
        See `multi_token_loss`.
    freeze_next_token_model : bool
        Train heads 1, 2, ... only, see `MTPTransformer.freeze_next_token_model`.
    eval_every, eval_batches : int
        Steps between validations, and batches of one.
    checkpoint_every : int
        Steps between checkpoints.
    seed : int
        Of batches and dropout.
    """

    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 8
    context: int = 256
    accumulation: int = 1
    learning_rate: float = 3e-3
    final_learning_rate: float = 1e-4
    warmup: float = 0.05
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    precision: str = "float32"
    route: str = "parallel"
    freeze_next_token_model: bool = False
    eval_every: int = 100
    eval_batches: int = 8
    checkpoint_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give one of steps and minutes")
        positive = ("steps", "minutes", "batch_size", "context", "accumulation", "learning_rate")
        intervals = ("grad_clip", "eval_every", "eval_batches", "checkpoint_every")
        for name in positive + intervals:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.precision not in ("bfloat16", "float32"):
            raise ValueError(f'precision must be "bfloat16" or "float32", got {self.precision!r}')
        if self.route not in ("parallel", "headwise"):
            raise ValueError(f'route must be "parallel" or "headwise", got {self.route!r}')
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")

    def learning_rate_at(self, progress: float) -> float:
        """Return the rate at `progress` in [0, 1] of the run."""
        if progress < self.warmup:
            return self.learning_rate * progress / self.warmup
        cosine = 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))
        low = self.final_learning_rate
        return low + (self.learning_rate - low) * cosine


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


class Trainer:
    """Trains a model and keeps its checkpoint directory.

    Parameters
    ----------
    model : MTPTransformer
        The model, on the device to train on, in float32.
    config : TrainConfig
        How to train.
    train_tokens, validation_tokens : ndarray
        (N,) token ids.
    directory : Path
        Checkpoint directory.
    """

    def __init__(
        self,
        model: MTPTransformer,
        config: TrainConfig,
        train_tokens: Tokens,
        validation_tokens: Tokens,
        directory: Path,
    ) -> None:
        if config.context > model.config.max_seq_len:
            raise ValueError(
                f"context={config.context} exceeds the model's max_seq_len="
                f"{model.config.max_seq_len}"
            )
        self.model, self.config, self.directory = model, config, directory
        self.device = model.unembedding.weight.device
        if config.freeze_next_token_model:
            model.freeze_next_token_model()
        self._train = Windows(train_tokens, config.batch_size, config.context, config.seed)
        self._validation = Windows(validation_tokens, config.batch_size, config.context, 0)
        self._optimizer = _adamw(model, config)
        self.step = 0
        self.seconds = 0.0

    @property
    def progress(self) -> float:
        """Share of the run that is done, at most 1."""
        if self.config.steps is not None:
            return min(1.0, self.step / self.config.steps)
        return min(1.0, self.seconds / (60 * (self.config.minutes or 0)))

    def run(self, report: Callable[[StepMetrics], None] = lambda metrics: None) -> bool:
        """Train to the end of the run, or until SIGINT or SIGTERM, and save a checkpoint.

        Parameters
        ----------
        report : callable
            Called after every step.

        Returns
        -------
        bool
            True if the run is complete, False if a signal stopped it after a step.
        """
        with _stop_signals() as stopped:
            while self.progress < 1 and not stopped():
                report(self.train_step())
                if self.step % self.config.checkpoint_every == 0:
                    self.save()
            self.save()
        return self.progress >= 1

    def train_step(self) -> StepMetrics:
        """Run one optimizer step, and a validation where one is due."""
        config, started = self.config, time.perf_counter()
        learning_rate = config.learning_rate_at(self.progress)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        # Dropout, like the batches, depends on the step alone: resuming needs no generator's state.
        torch.manual_seed(config.seed + self.step)
        losses = []
        for micro in range(config.accumulation):
            tokens = self._train.batch(self.step * config.accumulation + micro).to(self.device)
            with self._autocast():
                loss, stats = multi_token_loss(
                    self.model, tokens, route=config.route, return_stats=True
                )
            torch.autograd.backward(loss / config.accumulation)
            losses.append(stats.loss)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        # The clock of the budget stops for validation, so that it buys training only.
        self.seconds += time.perf_counter() - started
        due = self.step % config.eval_every == 0 or self.progress >= 1
        validation = self.validate() if due else None
        metrics = StepMetrics(
            step=self.step,
            tokens=self.step * config.accumulation * config.batch_size * config.context,
            loss=torch.stack(losses).mean(0).tolist(),
            validation_loss=validation,
            learning_rate=learning_rate,
            grad_norm=float(norm),
            seconds=self.seconds,
        )
        self._append(metrics)
        return metrics

    @torch.no_grad()
    def validate(self) -> list[float]:
        """Return the loss of each head over the same validation windows each time."""
        self.model.eval()
        losses = []
        for index in range(self.config.eval_batches):
            tokens = self._validation.batch(index).to(self.device)
            with self._autocast():
                _, stats = multi_token_loss(self.model, tokens, return_stats=True)
            losses.append(stats.loss)
        mean: list[float] = torch.stack(losses).mean(0).tolist()
        return mean

    def save(self) -> None:
        """Write the checkpoint, and beside it all that `resume` needs."""
        save_checkpoint(self.model, self.directory)
        state = {
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "seconds": self.seconds,
            # The weights once more: a kill between two renames must not pair two steps' files.
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        write_atomically(self.directory / STATE_FILE, lambda file: torch.save(state, file))

    @classmethod
    def resume(
        cls,
        directory: Path,
        train_tokens: Tokens,
        validation_tokens: Tokens,
        device: torch.device | str = "cpu",
    ) -> Trainer:
        """Return the trainer whose checkpoint is in `directory`, as it was when it saved.

        Raises
        ------
        ValueError
            If `directory` is not a checkpoint of a training run, or is damaged.
        """
        state = _read_state(directory / STATE_FILE)
        model = load_checkpoint(directory, device)
        try:
            model.load_state_dict(state["model"])
            config = TrainConfig(**state["config"])
            trainer = cls(model, config, train_tokens, validation_tokens, directory)
            trainer._optimizer.load_state_dict(state["optimizer"])
            trainer.step, trainer.seconds = state["step"], state["seconds"]
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{directory / STATE_FILE} is not of this version: {error}") from error
        # A killed run may have logged steps after its last checkpoint; they are run again.
        kept = [m for m in read_metrics(directory) if m.step <= trainer.step]
        write_atomically(
            directory / METRICS_FILE, lambda file: file.write_text("".join(map(_json_line, kept)))
        )
        return trainer

    def _append(self, metrics: StepMetrics) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        mode = "w" if metrics.step == 1 else "a"
        with (self.directory / METRICS_FILE).open(mode) as file:
            file.write(_json_line(metrics))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"
        )


def read_metrics(directory: Path) -> list[StepMetrics]:
    """Read the metrics that a run in `directory` has logged; none if there is no log."""
    file = directory / METRICS_FILE
    if not file.exists():
        return []
    # A killed run may leave half a line.
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [StepMetrics(**json.loads(line)) for line in lines]


def default_precision(device: torch.device) -> str:
    """Return "bfloat16" where the device multiplies it faster than float32, else "float32"."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def _adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW in which matrices decay and vectors (the norms) do not."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True
    )


def _json_line(metrics: StepMetrics) -> str:
    return json.dumps(dataclasses.asdict(metrics)) + "\n"


def _read_state(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file.parent} cannot be resumed: it has no {file.name}")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file} is not a training state")
    return state


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a flag; a second one acts as it always did."""
    received: list[int] = []
    previous: dict[int, Any] = {}
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # Python delivers signals to the main thread only
        return

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in map(int, (signal.SIGINT, signal.SIGTERM)):
        previous[number] = signal.signal(number, stop)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
