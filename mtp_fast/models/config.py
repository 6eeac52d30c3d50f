"""The shape of a multi-token prediction transformer, validated and stored as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from mtp_fast.models.rope_scaling import check_rope_scaling


@dataclass(frozen=True)
class MTPConfig:
    """Shape of an `MTPTransformer`.

    Parameters
    ----------
    vocab_size : int
        Number of token ids.
    dim : int
        Width of the residual stream.
    n_layers : int
        Transformer blocks in all, heads included: the trunk has ``n_layers - n_future_tokens``
        and each head one, so the parameter count does not change with ``n_future_tokens``.
    n_attention_heads, n_kv_heads : int
        Query heads, and the key/value heads they share (grouped-query attention).
    n_future_tokens : int
        Prediction heads; head k at position t predicts token t + 1 + k.
    ffn_dim : int
        Hidden width of the SwiGLU feed-forward.
    max_seq_len : int
        Longest sequence, prompt and continuation together.
    rope_theta : float
        Base of the rotary position embedding.
    norm_eps : float
        Added to the mean square in RMSNorm.
    tie_embeddings : bool
        Whether the unembedding is the token embedding.
    dropout : float
        Probability of dropping an element of the embedding and of each branch's output.
    attention_head_dim : int, optional
        Width of one attention head; ``dim / n_attention_heads`` by default.
    qkv_bias : bool
        Whether query, key and value have a bias, as in Qwen2.
    qk_norm : bool
        Whether queries and keys are normalised head by head before they are rotated, as in Qwen3.
    rope_scaling : dict, optional
        How the rotary frequencies are scaled, in the terms of a Hugging Face `config.json`:
        ``{"rope_type": "linear" | "llama3" | "yarn", "factor": ..., ...}``.

    Raises
    ------
    TypeError, ValueError
        If a field has another type, is out of range, or does not divide another as it must.
    """

    vocab_size: int
    dim: int
    n_layers: int
    n_attention_heads: int
    n_kv_heads: int
    n_future_tokens: int
    ffn_dim: int
    max_seq_len: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    dropout: float = 0.0
    attention_head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_scaling: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" or (field.type == "int | None" and value is not None):
                _check_positive_int(field.name, value)
            elif field.type == "float" and (
                isinstance(value, bool) or not isinstance(value, (int, float))
            ):
                raise TypeError(f"{field.name} must be a number, got {value!r}")
            elif field.type == "bool" and not isinstance(value, bool):
                raise TypeError(f"{field.name} must be true or false, got {value!r}")
        if self.attention_head_dim is not None:
            if self.attention_head_dim % 2:
                raise ValueError(f"attention_head_dim must be even, got {self.attention_head_dim}")
        elif self.dim % self.n_attention_heads or self.head_dim % 2:
            raise ValueError(
                "dim must be n_attention_heads times an even number, "
                f"got dim={self.dim} and n_attention_heads={self.n_attention_heads}"
            )
        if self.n_attention_heads % self.n_kv_heads:
            raise ValueError(
                "n_attention_heads must be a multiple of n_kv_heads, "
                f"got {self.n_attention_heads} and {self.n_kv_heads}"
            )
        if self.n_future_tokens > self.n_layers:
            raise ValueError(
                f"n_layers counts the heads too: n_layers={self.n_layers} leaves none for "
                f"n_future_tokens={self.n_future_tokens}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.rope_scaling is not None:
            check_rope_scaling(self.rope_scaling)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.attention_head_dim or self.dim // self.n_attention_heads

    @property
    def n_trunk_layers(self) -> int:
        """Blocks shared by all heads."""
        return self.n_layers - self.n_future_tokens

    def to_json(self) -> str:
        """Return the fields as a JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> MTPConfig:
        """Read what `to_json` wrote.

        Raises
        ------
        ValueError
            If `text` is not JSON, or lacks a field, or has one that is not known.
        """
        fields: Any = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError(f"a model configuration is a JSON object, got {type(fields).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(fields.keys() - known):
            raise ValueError(f"unknown fields in the model configuration: {', '.join(unknown)}")
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if missing := sorted(required - fields.keys()):
            raise ValueError(f"the model configuration lacks {', '.join(missing)}")
        return cls(**fields)


def _check_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
