"""Models of the Llama family as Hugging Face's transformers saves them.

A directory with `config.json` and `model.safetensors`, or shards of it with an index. What
transformers has no place for stands beside it: heads 1, 2, ... in `extra_heads.safetensors`, and
the fields of ours that `config.json` lacks under its key `mtp_fast`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mtp_fast.models.checkpoint import CONFIG_FILE, WEIGHTS_FILE, write_atomically
from mtp_fast.models.config import MTPConfig
from mtp_fast.models.layout import Layout, errors_of, open_safetensors, read_json
from mtp_fast.models.transformer import MTPTransformer

INDEX_FILE = "model.safetensors.index.json"
EXTRA_HEADS_FILE = "extra_heads.safetensors"

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_EXTRA_HEAD = "extra_heads."

LAYOUT = Layout(
    config_file=CONFIG_FILE,
    outer={
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "unembedding.weight": "lm_head.weight",
    },
    block={
        "attention_norm.weight": ("input_layernorm.weight",),
        "attention.qkv.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
        "attention.qkv.bias": tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
        "attention.q_norm.weight": ("self_attn.q_norm.weight",),
        "attention.k_norm.weight": ("self_attn.k_norm.weight",),
        "attention.out.weight": ("self_attn.o_proj.weight",),
        "ffn_norm.weight": ("post_attention_layernorm.weight",),
        "ffn.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "ffn.down.weight": ("mlp.down_proj.weight",),
    },
    prefixes=lambda n_trunk, n_heads: [
        *(f"model.layers.{i}" for i in range(n_trunk + 1)),
        *(f"{_EXTRA_HEAD}{k}" for k in range(n_heads - 1)),
    ],
    ignored="rotary_emb.inv_freq",
)


def load(
    path: Path,
    n_future_tokens: int | None,
    max_seq_len: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> MTPTransformer:
    """Read the model in `path`, see `MTPTransformer.from_pretrained`."""
    fields = read_json(path / CONFIG_FILE)
    with errors_of(path / CONFIG_FILE):
        ours = fields.get("mtp_fast", {"n_future_tokens": 1, "dropout": 0.0})
        stored_heads, dropout = ours["n_future_tokens"], ours["dropout"]
        heads = stored_heads if n_future_tokens is None else n_future_tokens
        config = _config(fields, heads, max_seq_len, dropout)
    files = _weight_files(path)
    if stored_heads > 1:
        files.append(path / EXTRA_HEADS_FILE)
    with open_safetensors(files) as tensors:
        return LAYOUT.read(config, stored_heads, tensors, path, dtype, device)


def save(model: MTPTransformer, path: Path) -> None:
    """Write `model` into `path`, see `MTPTransformer.save_pretrained`."""
    from safetensors.torch import save_file

    fields, tensors = _fields(model), LAYOUT.write(model)
    if model.config.tie_embeddings:
        del tensors["lm_head.weight"]
    extra = {name: tensors.pop(name) for name in [*tensors] if name.startswith(_EXTRA_HEAD)}
    path.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"}  # transformers asks for it
    write_atomically(path / WEIGHTS_FILE, lambda file: save_file(tensors, file, metadata))
    if extra:
        write_atomically(path / EXTRA_HEADS_FILE, lambda file: save_file(extra, file, metadata))
    else:
        (path / EXTRA_HEADS_FILE).unlink(missing_ok=True)  # an earlier model's
    text = json.dumps(fields, indent=2) + "\n"
    write_atomically(path / CONFIG_FILE, lambda file: file.write_text(text))


def _weight_files(path: Path) -> list[Path]:
    if (path / WEIGHTS_FILE).is_file():
        return [path / WEIGHTS_FILE]
    if not (path / INDEX_FILE).is_file():
        raise ValueError(f"{path} is not a checkpoint: no {WEIGHTS_FILE} and no {INDEX_FILE} in it")
    shards = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{path / INDEX_FILE} has no weight_map")
    return [path / name for name in sorted(set(shards.values()))]


def _config(
    fields: dict[str, Any], n_future_tokens: int, max_seq_len: int | None, dropout: float
) -> MTPConfig:
    """Translate the fields of `config.json`; KeyError if one is missing."""
    if (kind := fields.get("model_type")) not in MODEL_TYPES:
        raise ValueError(f"model_type must be one of {MODEL_TYPES}, got {kind!r}")
    max_seq_len = fields["max_position_embeddings"] if max_seq_len is None else max_seq_len
    _refuse_unsupported(fields, max_seq_len)
    dim, n_heads = fields["hidden_size"], fields["num_attention_heads"]
    head_dim = fields.get("head_dim")
    theta, scaling = _rope(fields)
    return MTPConfig(
        vocab_size=fields["vocab_size"],
        dim=dim,
        n_layers=fields["num_hidden_layers"] + n_future_tokens - 1,
        n_attention_heads=n_heads,
        n_kv_heads=fields.get("num_key_value_heads") or n_heads,
        n_future_tokens=n_future_tokens,
        ffn_dim=fields["intermediate_size"],
        max_seq_len=max_seq_len,
        rope_theta=theta,
        norm_eps=fields["rms_norm_eps"],
        tie_embeddings=fields.get("tie_word_embeddings", False),
        dropout=dropout,
        attention_head_dim=None if head_dim is None or head_dim * n_heads == dim else head_dim,
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        rope_scaling=scaling,
    )


def _refuse_unsupported(fields: dict[str, Any], max_seq_len: int) -> None:
    """Raise ValueError where the model computes what ours does not."""
    if (activation := fields.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"hidden_act must be 'silu', got {activation!r}")
    for name in ("attention_bias", "mlp_bias", "quantization_config"):
        if fields.get(name):
            raise ValueError(f"{name} is not supported, got {fields[name]!r}")
    # Qwen has a window that only use_sliding_window turns on; Mistral's is on if it is there.
    in_use = fields.get("use_sliding_window", fields["model_type"] == "mistral")
    window = fields.get("sliding_window") if in_use else None
    if window is not None and max_seq_len > window:
        raise ValueError(
            f"sliding_window={window} is not supported beyond its width; "
            f"read the model with max_seq_len={window} or less, got {max_seq_len}"
        )


def _rope(fields: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Return theta and scaling, of `rope_parameters` or of the older `rope_scaling`."""
    given = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    rope = {name: value for name, value in given.items() if value is not None}
    theta = rope.pop("rope_theta", fields.get("rope_theta", 10_000.0))
    rope["rope_type"] = rope.pop("rope_type", rope.pop("type", "default"))
    share = rope.pop("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if share != 1.0:
        raise ValueError(f"partial_rotary_factor must be 1, got {share}")
    if rope["rope_type"] == "default":
        if unknown := sorted(rope.keys() - {"rope_type"}):
            raise ValueError(f"rope_parameters has unknown fields {', '.join(unknown)}")
        return theta, None
    if rope["rope_type"] in ("llama3", "yarn"):
        length = rope.get("original_max_position_embeddings", fields["max_position_embeddings"])
        rope["original_max_position_embeddings"] = fields.get(
            "original_max_position_embeddings", length
        )
    return theta, rope


def _fields(model: MTPTransformer) -> dict[str, Any]:
    """Return the fields of `config.json`."""
    config = model.config
    if config.qkv_bias and config.qk_norm:
        raise ValueError('layout "huggingface" has no model with both qkv_bias and qk_norm')
    kind = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    if kind == "llama" and config.dim % config.n_attention_heads:
        kind = "mistral"  # the same arithmetic, but transformers demands the division of a Llama
    architecture = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    return {
        "architectures": [f"{architecture[kind]}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_trunk_layers + 1,
        "num_attention_heads": config.n_attention_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        # Unknown to the model; transformers' defaults would be another model's.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "mtp_fast": {"n_future_tokens": config.n_future_tokens, "dropout": config.dropout},
    }
