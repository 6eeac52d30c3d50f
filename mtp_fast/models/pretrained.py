"""Reading and writing models, whatever the layout: which file means which."""

from __future__ import annotations

from pathlib import Path

import torch

from mtp_fast.models import checkpoint, huggingface, meta
from mtp_fast.models.layout import read_json
from mtp_fast.models.transformer import MTPTransformer


def load(
    path: str | Path,
    n_future_tokens: int | None,
    max_seq_len: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> MTPTransformer:
    """See `MTPTransformer.from_pretrained`."""
    path = Path(path)
    config_file = path / checkpoint.CONFIG_FILE
    if config_file.is_file():
        is_ours = "model_type" not in read_json(config_file)
        read = checkpoint.load if is_ours else huggingface.load
    elif (path / meta.PARAMS_FILE).is_file():
        read = meta.load
    else:
        raise ValueError(
            f"{path} is not a checkpoint: no {config_file.name} and no {meta.PARAMS_FILE} in it"
        )
    return read(path, n_future_tokens, max_seq_len, dtype, device)


def save(model: MTPTransformer, path: str | Path, layout: str) -> None:
    """See `MTPTransformer.save_pretrained`."""
    if layout == "huggingface":
        huggingface.save(model, Path(path))
    elif layout == "meta":
        meta.save(model, Path(path))
    else:
        raise ValueError(f'layout must be "huggingface" or "meta", got {layout!r}')
