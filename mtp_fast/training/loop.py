"""The training loop: AdamW, warm-up and cosine, clipping, validation by head, checkpoints.

A run is a function of its configuration, corpus and seed: windows and dropout masks depend on the
micro-batch's number alone, so a run that was stopped and resumed has the same losses as one that
was not. Under torchrun every process takes micro-batches of its own.
"""

from __future__ import annotations

import dataclasses
import pickle
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtp_fast.models import Block, MTPTransformer, load_checkpoint, save_checkpoint
from mtp_fast.models.checkpoint import CONFIG_FILE, WEIGHTS_FILE, write_atomically
from mtp_fast.training.config import TrainConfig, warm_in
from mtp_fast.training.data import Tokens, Windows, document_ids
from mtp_fast.training.distributed import (
    data_parallel,
    gradients_stay_local,
    mean_over_processes,
    process_count,
    process_rank,
)
from mtp_fast.training.loss import MultiTokenLoss, multi_token_loss
from mtp_fast.training.metrics import METRICS_FILE, StepMetrics, append_metrics, forget_later_steps
from mtp_fast.training.signals import stop_signals

STATE_FILE = "training_state.pt"


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
        vocab_size = model.config.vocab_size
        if config.separator is not None and config.separator >= vocab_size:
            raise ValueError(
                f"separator={config.separator} is not in the vocabulary of {vocab_size}"
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
        with stop_signals() as stopped:
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
                    loss, stats = self._loss(tokens, weights, self._document_ids(tokens))
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
        if process_rank() == 0:
            append_metrics(self.directory, metrics)
        return metrics

    def _set_dropout(self) -> None:
        factor = warm_in(self.progress, self.config.dropout_warmup)
        of_head = dict(zip(self.model.heads, self.config.head_dropout or (), strict=False))
        for module in self.model.modules():
            if isinstance(module, (MTPTransformer, Block)):
                module.dropout = factor * of_head.get(module, self.model.config.dropout)

    def _document_ids(self, tokens: Tensor) -> Tensor | None:
        separator = self.config.separator
        return None if separator is None else document_ids(tokens, separator)

    @torch.no_grad()
    def validate(self) -> list[float]:
        """Return the loss of each head over the same validation windows each time."""
        self.model.eval()
        config, total = self.config, torch.zeros(len(self.model.heads), device=self.device)
        for index in range(process_rank(), config.eval_batches, process_count()):
            tokens = self._validation.batch(index).to(self.device)
            with self._autocast():
                _, stats = multi_token_loss(
                    self.model, tokens, document_ids=self._document_ids(tokens), return_stats=True
                )
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
        forget_later_steps(self.directory, self.step)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"
        )


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
