"""The layout of Meta's multi-token prediction release: `params.json` and `consolidated.pth`.

Names are those of a Llama. `layers` holds the trunk and, as its last entry, head 0; `extra_heads`
holds the others. ``n_layers`` counts them all, as ours does. Rotary pairs are neighbours there and
halves apart here, so that rows of query and key change places.
"""

from __future__ import annotations

import json
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_fast.models.checkpoint import write_atomically
from mtp_fast.models.config import MTPConfig
from mtp_fast.models.layout import Layout, errors_of, read_json
from mtp_fast.models.transformer import MTPTransformer

PARAMS_FILE = "params.json"
WEIGHTS_FILE = "consolidated.pth"
# The file does not say how long a sequence may be; this is the default of the code that reads it.
DEFAULT_MAX_SEQ_LEN = 2048

LAYOUT = Layout(
    config_file=PARAMS_FILE,
    outer={
        "embedding.weight": "tok_embeddings.weight",
        "norm.weight": "norm.weight",
        "unembedding.weight": "output.weight",
    },
    block={
        "attention_norm.weight": ("attention_norm.weight",),
        "attention.qkv.weight": tuple(f"attention.w{x}.weight" for x in "qkv"),
        "attention.out.weight": ("attention.wo.weight",),
        "ffn_norm.weight": ("ffn_norm.weight",),
        "ffn.gate_up.weight": ("feed_forward.w1.weight", "feed_forward.w3.weight"),
        "ffn.down.weight": ("feed_forward.w2.weight",),
    },
    prefixes=lambda n_trunk, n_heads: [
        *(f"layers.{i}" for i in range(n_trunk + 1)),
        *(f"extra_heads.{k}" for k in range(n_heads - 1)),
    ],
    ignored="rope.freqs",
)


def load(
    path: Path,
    n_future_tokens: int | None,
    max_seq_len: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> MTPTransformer:
    """Read the model in `path`, see `MTPTransformer.from_pretrained`."""
    params, weights = read_json(path / PARAMS_FILE), _read_weights(path)
    # Files may leave the vocabulary to the tokenizer (-1), and give the width as a rule.
    with errors_of(path):
        vocab_size = len(weights["tok_embeddings.weight"])
        ffn_dim = len(weights["layers.0.feed_forward.w1.weight"])
    with errors_of(path / PARAMS_FILE):
        stored_heads = params.get("n_future_tokens", 1)
        heads = stored_heads if n_future_tokens is None else n_future_tokens
        config = _config(params, heads, max_seq_len, vocab_size, ffn_dim)
    tensors = {name: partial(_to_halves, name, w, config.head_dim) for name, w in weights.items()}
    return LAYOUT.read(config, stored_heads, tensors, path, dtype, device)


def save(model: MTPTransformer, path: Path) -> None:
    """Write `model` into `path`, see `MTPTransformer.save_pretrained`."""
    params = _params(model.config)
    weights = {
        name: _to_neighbours(name, weight, model.config.head_dim)
        for name, weight in LAYOUT.write(model).items()
    }
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(path / WEIGHTS_FILE, lambda file: torch.save(weights, file))
    text = json.dumps(params, indent=2) + "\n"
    write_atomically(path / PARAMS_FILE, lambda file: file.write_text(text))


def _read_weights(path: Path) -> dict[str, Tensor]:
    files = sorted(path.glob("consolidated*.pth"))
    if len(files) != 1:
        raise ValueError(f"{path} must hold one consolidated*.pth (no shards), found {len(files)}")
    try:
        weights = torch.load(files[0], map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{files[0]} is damaged ({type(error).__name__})") from error
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise ValueError(f"{files[0]} is not a dict of tensors")
    return weights


def _config(
    params: dict[str, Any],
    n_future_tokens: int,
    max_seq_len: int | None,
    vocab_size: int,
    ffn_dim: int,
) -> MTPConfig:
    """Translate `params.json`; KeyError if a field is missing."""
    if params.get("use_scaled_rope"):
        raise ValueError("use_scaled_rope is not supported")
    n_heads = params["n_heads"]
    return MTPConfig(
        vocab_size=vocab_size,
        dim=params["dim"],
        n_layers=params["n_layers"] - params.get("n_future_tokens", 1) + n_future_tokens,
        n_attention_heads=n_heads,
        n_kv_heads=params.get("n_kv_heads") or n_heads,
        n_future_tokens=n_future_tokens,
        ffn_dim=ffn_dim,
        max_seq_len=DEFAULT_MAX_SEQ_LEN if max_seq_len is None else max_seq_len,
        rope_theta=params.get("rope_theta", 10_000.0),
        norm_eps=params.get("norm_eps", 1e-5),
    )


def _params(config: MTPConfig) -> dict[str, Any]:
    """Return the fields of `params.json`."""
    for name in ("attention_head_dim", "qkv_bias", "qk_norm", "rope_scaling"):
        if value := getattr(config, name):
            raise ValueError(f'layout "meta" cannot express {name}={value!r}')
    params = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_attention_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "n_future_tokens": config.n_future_tokens,
        # The width is a rule: 8/3 dim, times the multiplier, rounded up to this multiple.
        "multiple_of": config.ffn_dim,
    }
    # Not every version of the code that reads this knows all fields: those at a default stay out.
    if config.n_kv_heads != config.n_attention_heads:
        params["n_kv_heads"] = config.n_kv_heads
    if config.rope_theta != 10_000.0:
        params["rope_theta"] = config.rope_theta
    if (width := int(8 * config.dim / 3)) > config.ffn_dim:
        params["ffn_dim_multiplier"] = config.ffn_dim / width
    return params


def _to_halves(name: str, weight: Tensor, head_dim: int) -> Tensor:
    """Order the rows of a query or key weight (heads * head_dim, dim) as ours; leave others."""
    if not name.endswith(("attention.wq.weight", "attention.wk.weight")):
        return weight
    return weight.view(-1, head_dim // 2, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def _to_neighbours(name: str, weight: Tensor, head_dim: int) -> Tensor:
    """Undo `_to_halves`."""
    if not name.endswith(("attention.wq.weight", "attention.wk.weight")):
        return weight
    return weight.view(-1, 2, head_dim // 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
