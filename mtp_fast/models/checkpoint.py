"""Checkpoints: a directory with `config.json` and `model.safetensors`, each written atomically."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from mtp_fast.models.config import MTPConfig
from mtp_fast.models.transformer import MTPTransformer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def save_checkpoint(model: MTPTransformer, path: str | Path) -> None:
    """Write `model` into the directory `path`, over an earlier checkpoint if there is one."""
    from safetensors.torch import save_file  # of the cli extra: the model alone does not need it

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().cpu().contiguous() for name, p in model.state_dict().items()}
    if model.config.tie_embeddings:
        del weights["unembedding.weight"]  # safetensors stores a shared tensor once
    write_atomically(path / WEIGHTS_FILE, lambda file: save_file(weights, file))
    write_atomically(path / CONFIG_FILE, lambda file: file.write_text(model.config.to_json()))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then rename it to `path`: whole, or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> MTPTransformer:
    """Read a model that `save_checkpoint` wrote.

    Raises
    ------
    ValueError
        If `path` is not a checkpoint, or its weights are damaged or of another shape than its
        configuration says.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not (path / CONFIG_FILE).is_file() or not (path / WEIGHTS_FILE).is_file():
        raise ValueError(f"{path} is not a checkpoint: no {CONFIG_FILE} and {WEIGHTS_FILE} in it")
    try:
        config = MTPConfig.from_json((path / CONFIG_FILE).read_text())
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path / CONFIG_FILE}: {error}") from error
    try:
        weights = load_file(path / WEIGHTS_FILE, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS_FILE} is damaged: {error}") from error
    model = MTPTransformer(config).to(device)
    if config.tie_embeddings and "embedding.weight" in weights:
        weights["unembedding.weight"] = weights["embedding.weight"]
    expected = model.state_dict()
    if names := sorted(weights.keys() ^ expected.keys()):
        raise ValueError(
            f"{path / WEIGHTS_FILE} does not hold the model of {CONFIG_FILE}: "
            f"{names[0]} is {'missing' if names[0] in expected else 'unknown'}"
        )
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise ValueError(
                f"{path / WEIGHTS_FILE} does not hold the model of {CONFIG_FILE}: {name} is "
                f"{tuple(weight.shape)}, expected {tuple(expected[name].shape)}"
            )
    model.load_state_dict(weights)
    return model
