"""The training loop: AdamW, warm-up and cosine, clipping, validation by head, checkpoints.

A run is a function of its configuration, corpus and seed: windows and dropout masks depend on the
micro-batch's number alone, so a run that was stopped and resumed has the same losses as one that
was not. Under torchrun every process takes micro-batches of its own.
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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from mtp_fast.models import Block, MTPTransformer, load_checkpoint, save_checkpoint
from mtp_fast.models.checkpoint import CONFIG_FILE, WEIGHTS_FILE, write_atomically
from mtp_fast.training.data import Tokens, Windows
from mtp_fast.training.distributed import (
    data_parallel,
    gradients_stay_local,
    mean_over_processes,
    process_count,
    process_rank,
)
from mtp_fast.training.loss import MultiTokenLoss, multi_token_loss

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
        Micro-batches of an optimizer step in each process.
    learning_rate, final_learning_rate : float
        Peak after the warm-up, and the cosine's end.
    warmup : float
        Share of the run in which the rate rises linearly.
    head_weights : tuple of float, optional
        (n,) weight of each head's loss; default all 1.
    head_weights_warmup : float
        Share of the run in which the weights of heads 1.. rise linearly from 0.
    head_dropout : tuple of float, optional
        (n,) dropout in each head; default the model's.
    dropout_warmup : float
        Share of the run in which all dropout rises linearly from 0.
    weight_decay, beta1, beta2 : float
        Of AdamW; matrices decay, norms do not.
    grad_clip : float
        Largest gradient norm.
    precision : {"bfloat16", "float32"}
        "bfloat16" runs the model under autocast; parameters stay float32.
    route : {"parallel", "headwise"}
        See `multi_token_loss`.
    compile : bool
        Whether trunk and heads go through torch.compile.
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
    head_weights: tuple[float, ...] | None = None
    head_weights_warmup: float = 0.0
    head_dropout: tuple[float, ...] | None = None
    dropout_warmup: float = 0.0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    precision: str = "float32"
    route: str = "parallel"
    compile: bool = False
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
        for name in ("head_weights_warmup", "dropout_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        weights = self.head_weights
        if weights is not None and not all(0 <= w < math.inf for w in weights):
            raise ValueError(f"head_weights must be finite and not negative, got {weights}")
        if self.compile and self.dropout_warmup:
            raise ValueError("compile goes with constant dropout: dropout_warmup must be 0")
        if self.head_dropout is not None and not all(0 <= p < 1 for p in self.head_dropout):
            raise ValueError(f"head_dropout must be in [0, 1), got {self.head_dropout}")

    def learning_rate_at(self, progress: float) -> float:
        """Return the rate at `progress` in [0, 1] of the run."""
        if progress < self.warmup:
            return self.learning_rate * _warm_in(progress, self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))
        low = self.final_learning_rate
        return low + (self.learning_rate - low) * cosine

    def head_weights_at(self, progress: float, n: int) -> list[float]:
        """Return the weights of `n` heads' losses at `progress` in [0, 1] of the run."""
        first, *later = self.head_weights or [1.0] * n
        factor = _warm_in(progress, self.head_weights_warmup)
        return [first, *[factor * weight for weight in later]]


def _warm_in(progress: float, share: float) -> float:
    """Factor that rises linearly from 0 to 1 over the first `share` of a run."""
    return min(1.0, progress / share) if share else 1.0


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
        for name in ("head_weights", "head_dropout"):
            values = getattr(config, name)
            if values is not None and len(values) != len(model.heads):
                raise ValueError(
                    f"{name} must have one value for each of {len(model.heads)} heads, "
                    f"got {len(values)}"
                )
        self.model, self.config, self.directory = model, config, directory
        self.device = model.unembedding.weight.device
        if config.freeze_next_token_model:
            model.freeze_next_token_model()
        self._train = Windows(train_tokens, config.batch_size, config.context, config.seed)
        self._validation = Windows(validation_tokens, config.batch_size, config.context, 0)
        if config.compile:
            for module in (model.trunk, *model.heads):
                module.compile()
        self._loss = data_parallel(MultiTokenLoss(model, config.route), self.device)
        self._optimizer = _adamw(model, config)
        self.step = 0
        self.seconds = 0.0

    @property
    def _tokens_per_step(self) -> int:
        config = self.config
        return config.accumulation * config.batch_size * config.context * process_count()

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
            if self.step == 0:
                self.save()  # so that a run killed before its first checkpoint can be resumed
            # Any process's signal stops all of them after the same step.
            while self.progress < 1 and not any(mean_over_processes([stopped()], self.device)):
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
        weights = config.head_weights_at(self.progress, len(self.model.heads))
        self._set_dropout()
        self.model.train()
        losses = []
        for micro in range(config.accumulation):
            index = self.step * config.accumulation + micro
            index = index * process_count() + process_rank()
            # Dropout, like the windows, depends on the index alone: resuming needs no generator's
            # state.
            torch.manual_seed(config.seed + index)
            tokens = self._train.batch(index).to(self.device)
            last = micro == config.accumulation - 1
            with nullcontext() if last else gradients_stay_local(self._loss):
                with self._autocast():
                    loss, stats = self._loss(tokens, weights)
                torch.autograd.backward(loss / config.accumulation)
            losses.append(stats.loss)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.step += 1
        # The clock of the budget stops for validation, so that it buys training only.
        *head_losses, seconds = mean_over_processes(
            [*torch.stack(losses).mean(0).tolist(), time.perf_counter() - started], self.device
        )
        self.seconds += seconds
        due = self.step % config.eval_every == 0 or self.progress >= 1
        validation = self.validate() if due else None
        metrics = StepMetrics(
            step=self.step,
            tokens=self.step * self._tokens_per_step,
            loss=head_losses,
            validation_loss=validation,
            learning_rate=learning_rate,
            grad_norm=float(norm),
            seconds=self.seconds,
        )
        self._append(metrics)
        return metrics

    def _set_dropout(self) -> None:
        factor = _warm_in(self.progress, self.config.dropout_warmup)
        of_head = dict(zip(self.model.heads, self.config.head_dropout or (), strict=False))
        for module in self.model.modules():
            if isinstance(module, (MTPTransformer, Block)):
                module.dropout = factor * of_head.get(module, self.model.config.dropout)

    @torch.no_grad()
    def validate(self) -> list[float]:
        """Return the loss of each head over the same validation windows each time."""
        self.model.eval()
        config, total = self.config, torch.zeros(len(self.model.heads), device=self.device)
        for index in range(process_rank(), config.eval_batches, process_count()):
            tokens = self._validation.batch(index).to(self.device)
            with self._autocast():
                _, stats = multi_token_loss(self.model, tokens, return_stats=True)
            total += stats.loss
        share = total * (process_count() / config.eval_batches)
        return mean_over_processes(share.tolist(), self.device)

    def save(self) -> None:
        """Write the checkpoint, and beside it all that `resume` needs."""
        if process_rank() != 0:
            return
        save_checkpoint(self.model, self.directory)
        state = {
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "seconds": self.seconds,
            # What a step's windows depend on beside the configuration.
            "train_tokens": len(self._train),
            "processes": process_count(),
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
            If `directory` is not a checkpoint of a training run, or is damaged, or if corpus or
            number of processes are not those of the run.
        """
        file = directory / STATE_FILE
        state = _read_state(file)
        model = load_checkpoint(directory, device)
        try:
            weights, optimizer = state["model"], state["optimizer"]
            step, seconds = state["step"], state["seconds"]
            run = {name: state[name] for name in ("train_tokens", "processes")}
            config = TrainConfig(**state["config"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} is not of this version: {error}") from error
        for name, value in (("train_tokens", len(train_tokens)), ("processes", process_count())):
            if run[name] != value:
                raise ValueError(f"{directory} was trained with {name}={run[name]}, not {value}")
        trainer = cls(model, config, train_tokens, validation_tokens, directory)
        try:
            model.load_state_dict(weights)
            trainer._optimizer.load_state_dict(optimizer)
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{file} does not fit the model of {CONFIG_FILE}") from error
        trainer.step, trainer.seconds = step, seconds
        if process_rank() == 0:
            trainer._clean_up()
        return trainer

    def _clean_up(self) -> None:
        """Remove what a killed run left behind."""
        for name in (CONFIG_FILE, WEIGHTS_FILE, STATE_FILE, METRICS_FILE):
            for half_written in self.directory.glob(f".{name}.*"):
                half_written.unlink()
        # Steps logged after the last checkpoint are run again.
        kept = [m for m in read_metrics(self.directory) if m.step <= self.step]
        log = self.directory / METRICS_FILE
        write_atomically(log, lambda file: file.write_text("".join(map(_json_line, kept))))

    def _append(self, metrics: StepMetrics) -> None:
        if process_rank() != 0:
            return
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
