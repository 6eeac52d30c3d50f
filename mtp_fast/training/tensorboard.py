"""Training metrics for TensorBoard, beside those in `metrics.jsonl`."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from mtp_fast.training.metrics import StepMetrics


class TensorBoardLog:
    """Writes each step's metrics as scalars.

    Parameters
    ----------
    directory : Path
        Log directory.
    step : int
        The step to go on from; what the directory has of later steps is hidden.
    """

    def __init__(self, directory: Path, step: int) -> None:
        self._writer = SummaryWriter(str(directory), purge_step=step + 1)

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer.close()

    def report(self, metrics: StepMetrics) -> None:
        """Write a step."""
        scalars = {"learning_rate": metrics.learning_rate, "grad_norm": metrics.grad_norm}
        for name, values in (("loss", metrics.loss), ("validation", metrics.validation_loss or [])):
            scalars |= {f"{name}/head_{k}": value for k, value in enumerate(values)}
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, metrics.step)
        # A killed run is to have logged what it trained.
        self._writer.flush()
