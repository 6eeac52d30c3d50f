"""Checkpoints: a directory with `config.json` and `model.safetensors`, each written atomically."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from mtp_fast.models.config import MTPConfig
from mtp_fast.models.layout import Layout, errors_of, open_safetensors
from mtp_fast.models.transformer import MTPTransformer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

LAYOUT = Layout(
    config_file=CONFIG_FILE,
    outer={name: name for name in ("embedding.weight", "norm.weight", "unembedding.weight")},
    block={
        name: (name,)
        for name in (
            "attention_norm.weight",
            "attention.qkv.weight",
            "attention.qkv.bias",
            "attention.q_norm.weight",
            "attention.k_norm.weight",
            "attention.out.weight",
            "ffn_norm.weight",
            "ffn.gate_up.weight",
            "ffn.down.weight",
        )
    },
    prefixes=lambda n_trunk, n_heads: [
        *(f"trunk.blocks.{i}" for i in range(n_trunk)),
        *(f"heads.{k}" for k in range(n_heads)),
    ],
)


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
    """Read a model that `save_checkpoint` wrote, in float32.

    Raises
    ------
    ValueError
        If `path` is not a checkpoint, or its weights are damaged or of another shape than its
        configuration says.
    """
    return load(Path(path), None, None, torch.float32, device)


def load(
    path: Path,
    n_future_tokens: int | None,
    max_seq_len: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> MTPTransformer:
    """Read the model in `path`, see `MTPTransformer.from_pretrained`."""
    if not (path / CONFIG_FILE).is_file() or not (path / WEIGHTS_FILE).is_file():
        raise ValueError(f"{path} is not a checkpoint: no {CONFIG_FILE} and {WEIGHTS_FILE} in it")
    with errors_of(path / CONFIG_FILE):
        config = stored = MTPConfig.from_json((path / CONFIG_FILE).read_text())
        if n_future_tokens is not None:
            n_layers = stored.n_trunk_layers + n_future_tokens
            config = replace(config, n_layers=n_layers, n_future_tokens=n_future_tokens)
        if max_seq_len is not None:
            config = replace(config, max_seq_len=max_seq_len)
    weights = path / WEIGHTS_FILE
    with open_safetensors([weights]) as tensors:
        return LAYOUT.read(config, stored.n_future_tokens, tensors, weights, dtype, device)
