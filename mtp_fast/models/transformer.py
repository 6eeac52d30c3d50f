"""The model: a shared trunk, n one-block heads on its output, one shared unembedding.

Head k at position t predicts token t + 1 + k (arXiv 2404.19737). Blocks are pre-norm with RMSNorm,
rotary positions, grouped-query attention and SwiGLU; query, key and value are one matrix, and so
are gate and up, because a small batch pays by the call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_fast.models.config import MTPConfig
from mtp_fast.models.rope_scaling import scale_frequencies


def rope_table(
    head_dim: int, length: int, theta: float, scaling: Mapping[str, Any] | None = None
) -> Tensor:
    """Cosines and signed sines of the rotary embedding, `scaling` as in `MTPConfig`.

    Returns
    -------
    Tensor
        (length, 2, 1, head_dim) float32, for `apply_rope`: ``[:, 0]`` multiplies the vector, and
        ``[:, 1]``, its first half negated, the vector with its halves swapped.
    """
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    factor = 1.0
    if scaling is not None:
        frequencies, factor = scale_frequencies(frequencies, theta, scaling)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequencies).unsqueeze(1)
    cos, sin = factor * angle.cos(), factor * angle.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], 1).float()


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate `x` (..., heads, head_dim) by rows of `rope_table` (..., 2, 1 or heads, head_dim)."""
    cos, sin = rope.unbind(-3)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of `q` (B, H, T, D) over `k` and `v` (B, H / group, T, D)."""
    batch, heads, length, width = q.shape
    if q.device.type != "cpu" or length > 512:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # On a CPU torch's fused attention is slow in bfloat16 and at short lengths: forward and
    # backward of 8 x 256 tokens, 4 heads of 32, take 11.5 ms there and 4.0 ms as two products.
    group = heads // k.shape[1]
    mask = torch.full((length, length), -torch.inf, dtype=q.dtype).triu(1).repeat(group, 1)
    q, k, v = q.reshape(-1, group * length, width), k.flatten(0, 1), v.flatten(0, 1)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=width**-0.5)
    return (scores.softmax(-1) @ v).view(batch, heads, length, width)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_attention_heads, config.n_kv_heads
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(
            config.dim,
            (self.n_heads + 2 * self.n_kv_heads) * self.head_dim,
            bias=config.qkv_bias,
        )
        self.q_norm = nn.RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else None
        self.out = nn.Linear(self.n_heads * self.head_dim, config.dim, bias=False)

    def normalize(self, qkv: Tensor) -> Tensor:
        """Normalise queries and keys of `qkv` (..., heads, head_dim), if this model does so."""
        if self.q_norm is None or self.k_norm is None:
            return qkv
        q, k, v = qkv.tensor_split([self.n_heads, self.n_heads + self.n_kv_heads], -2)
        return torch.cat([self.q_norm(q), self.k_norm(k), v], -2)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Map (B, T, dim) to (B, T, dim); `rope` is (T, 2, 1, head_dim)."""
        qkv = self.normalize(self.qkv(x).unflatten(-1, (-1, self.head_dim)))
        qk, v = qkv.tensor_split([self.n_heads + self.n_kv_heads], -2)
        q, k = apply_rope(qk, rope.to(qk.dtype)).tensor_split([self.n_heads], -2)
        y = causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        out: Tensor = self.out(y.transpose(1, 2).flatten(-2))
        return out


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., dim)."""
        gate, up = self.gate_up(x).chunk(2, -1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class Block(nn.Module):
    """One pre-norm transformer block: a layer of the trunk, or a head."""

    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Map (B, T, dim) to (B, T, dim); `rope` is (T, 2, 1, head_dim)."""
        x = x + self._drop(self.attention(self.attention_norm(x), rope))
        return x + self._drop(self.ffn(self.ffn_norm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Trunk(nn.Module):
    """The blocks that every head shares."""

    rope: Tensor

    def __init__(self, config: MTPConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_trunk_layers))
        self.register_buffer("rope", rope_of(config), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map embeddings (B, T, dim) to the heads' input (B, T, dim)."""
        for block in self.blocks:
            x = block(x, self.rope[: x.shape[1]])
        return x


class MTPTransformer(nn.Module):
    """A transformer that predicts the next n tokens at every position.

    Parameters
    ----------
    config : MTPConfig
        Shape of the model.
    trunk : nn.Module, optional
        Any module that maps (B, T, dim) to (B, T, dim), used in place of our own trunk.

    Attributes
    ----------
    embedding, unembedding : nn.Module
        Token embedding, and the (vocab_size, dim) matrix that all heads share (one tensor if tied).
    trunk : nn.Module
        What every head builds on.
    heads : nn.ModuleList
        ``n_future_tokens`` blocks; head 0 is the ordinary next-token model.
    norm : nn.RMSNorm
        Shared by all heads, before the unembedding.
    """

    rope: Tensor

    def __init__(self, config: MTPConfig, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.trunk = Trunk(config) if trunk is None else trunk
        self.heads = nn.ModuleList(Block(config) for _ in range(config.n_future_tokens))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.unembedding = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.dropout = config.dropout
        self.register_buffer("rope", rope_of(config), persistent=False)
        for module in self.modules():
            if isinstance(module, Block):
                _init_block(module, config)
        nn.init.normal_(self.embedding.weight, std=config.dim**-0.5)
        nn.init.normal_(self.unembedding.weight, std=config.dim**-0.5)
        if config.tie_embeddings:
            self.unembedding.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Return each head's hidden states, ready for the unembedding.

        Parameters
        ----------
        tokens : Tensor
            (B, T) int64.

        Returns
        -------
        list of Tensor
            n tensors (B, T, dim); entry k at position t belongs to token t + 1 + k.

        Raises
        ------
        ValueError
            If `tokens` is not (B, T) or T exceeds ``max_seq_len``.
        """
        x = self.trunk_output(tokens)
        return [self.head(x, k) for k in range(len(self.heads))]

    def logits(self, tokens: Tensor, head: int = 0) -> Tensor:
        """Return one head's logits (B, T, vocab_size) for `tokens` (B, T)."""
        out: Tensor = self.unembedding(self.head(self.trunk_output(tokens), head))
        return out

    def trunk_output(self, tokens: Tensor) -> Tensor:
        """Embed `tokens` (B, T) and run the trunk: the input (B, T, dim) of every head."""
        if tokens.ndim != 2:
            raise ValueError(f"tokens must be (B, T), got shape {tuple(tokens.shape)}")
        if tokens.shape[1] > self.config.max_seq_len:
            raise ValueError(
                f"tokens has {tokens.shape[1]} positions, max_seq_len is {self.config.max_seq_len}"
            )
        x = self.embedding(tokens)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        out: Tensor = self.trunk(x)
        return out

    def head(self, x: Tensor, k: int) -> Tensor:
        """Run head `k` and the final norm on the trunk's output `x` (B, T, dim)."""
        out: Tensor = self.norm(self.heads[k](x, self.rope[: x.shape[1]]))
        return out

    def freeze_next_token_model(self) -> None:
        """Take all that head 0's output depends on out of training.

        What is left to train are heads 1, 2, ...: they learn to draft for a model that stays, bit
        for bit, the one it was.

        Raises
        ------
        ValueError
            If head 0 is the only one.
        """
        if len(self.heads) == 1:
            raise ValueError("the model has one head: nothing would be left to train")
        for module in (self.embedding, self.trunk, self.heads[0], self.norm, self.unembedding):
            module.requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        n_future_tokens: int | None = None,
        *,
        max_seq_len: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> MTPTransformer:
        """Read a model from a directory, whoever wrote it.

        The directory holds a Hugging Face model of the Llama family (Llama, Mistral, Qwen2, Qwen3;
        safetensors), a model in the layout of Meta's multi-token release, or a checkpoint of ours.

        Parameters
        ----------
        path : str or Path
            The directory.
        n_future_tokens : int, optional
            Heads of the model that is returned; as many as are stored by default. Head 0 is the
            stored model's last layer. Stored heads beyond `n_future_tokens` are left out, and
            heads that are not stored start as copies of head 0.
        max_seq_len : int, optional
            Longest sequence; what the stored model says by default.
        dtype, device
            Of the parameters.

        Raises
        ------
        ValueError
            If there is no model in `path`, it is damaged, or it has something we do not support;
            the message says what.
        """
        from mtp_fast.models.pretrained import load  # it builds on this file

        return load(path, n_future_tokens, max_seq_len, dtype, device)

    def save_pretrained(self, path: str | Path, layout: str = "huggingface") -> None:
        """Write the model for others to read, into the directory `path`.

        Parameters
        ----------
        path : str or Path
            The directory; it is made if need be, and files of the same names are replaced.
        layout : {"huggingface", "meta"}
            "huggingface": trunk and head 0 as an ordinary model that transformers loads, and the
            other heads beside it in `extra_heads.safetensors`. "meta": `consolidated.pth` and
            `params.json` as in Meta's multi-token release.

        Raises
        ------
        ValueError
            If the layout cannot express this model.
        TypeError
            If the trunk is not our `Trunk`.
        """
        from mtp_fast.models.pretrained import save

        save(self, path, layout)


def rope_of(config: MTPConfig) -> Tensor:
    """Return the rotations of every position of a model."""
    return rope_table(config.head_dim, config.max_seq_len, config.rope_theta, config.rope_scaling)


def _init_block(block: Block, config: MTPConfig) -> None:
    """Normal with fan-in scale; what writes to the residual stream is divided by its depth."""
    for linear in (block.attention.qkv, block.ffn.gate_up):
        nn.init.normal_(linear.weight, std=config.dim**-0.5)
    if block.attention.qkv.bias is not None:
        nn.init.zeros_(block.attention.qkv.bias)
    # Depth as a token sees it: the trunk and one head, two branches each.
    depth = 2 * (config.n_trunk_layers + 1)
    for linear in (block.attention.out, block.ffn.down):
        nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features * depth))
