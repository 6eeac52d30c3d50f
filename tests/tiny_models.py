"""Small models for the tests of decoding."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from mtp_fast.decoding.cpu_layers import CPULayers
from mtp_fast.decoding.incremental import IncrementalModel
from mtp_fast.decoding.rows import Rows
from mtp_fast.models import MTPConfig, MTPTransformer

CONFIG = MTPConfig(
    vocab_size=40,
    dim=32,
    n_layers=5,
    n_attention_heads=4,
    n_kv_heads=2,
    n_future_tokens=4,
    ffn_dim=48,
    max_seq_len=96,
)


def sharp_model(seed: int = 0, **changes) -> MTPTransformer:
    """A random model whose heads half agree, so that drafts are both accepted and rejected."""
    torch.manual_seed(seed)
    model = MTPTransformer(dataclasses.replace(CONFIG, **changes)).eval()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.RMSNorm)):
            norm.weight.uniform_(0.5, 1.5)  # so that a norm that is left out shows
        model.unembedding.weight.mul_(3)
    return model


@torch.no_grad()
def round_drafting_heads(model: MTPTransformer) -> MTPTransformer:
    """Round the drafting heads' matrices to int8 with a scale for each output, as decoding does."""
    for head in model.heads[1:]:
        for matrix in (p for p in head.parameters() if p.ndim == 2):
            weight = matrix.float()
            scale = weight.abs().amax(1, keepdim=True) / 127
            whole = (weight / scale).round().nan_to_num()  # a scale may be 0
            matrix.copy_(whole.to(matrix.dtype) * scale.to(matrix.dtype))
    return model


def close_drafts(cached: IncrementalModel) -> dict[str, float]:
    """Tolerances of float32 draft logits: the CPU's kernel multiplies rows of 16 bits."""
    rounded = isinstance(cached._layers, CPULayers)
    return dict.fromkeys(("rtol", "atol"), 5e-4 if rounded else 1e-4)


def cyclic_model(period: int) -> MTPTransformer:
    """A model whose every head is right on the sequence 0, 1, ..., period - 1, 0, 1, ..."""
    model = sharp_model(vocab_size=period, n_layers=4)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.embedding.weight.copy_(torch.eye(period, 32))
        model.norm.weight.fill_(1.0)
        model.unembedding.weight.copy_(torch.eye(period, 32))
    for k, head in enumerate(model.heads):
        shift = torch.zeros(32, 32)
        for token in range(period):
            shift[token, token] = -10.0
            shift[(token + 1 + k) % period, token] = 10.0
        with torch.no_grad():
            head.ffn_norm.weight.fill_(1.0)
            head.ffn.gate_up.weight[:32].copy_(10 * torch.eye(32))
            head.ffn.gate_up.weight[48 : 48 + 32].copy_(torch.eye(32))
            head.ffn.down.weight[:, :32].copy_(shift)
    return model


def ragged_prompts(*lengths: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, CONFIG.vocab_size, (n,)) for n in lengths]


def draft_logits(cached: IncrementalModel, trunk: torch.Tensor, row: Rows) -> torch.Tensor:
    """What the heads draft at the last of the rows whose `trunk` (B, S, dim) this is."""
    last = torch.full((len(trunk),), trunk.shape[1] - 1)
    return cached.draft_logits(trunk, last, row)
