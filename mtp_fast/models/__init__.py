"""Multi-token prediction transformers: configuration, model, KV cache, checkpoints."""

from mtp_fast.models.cache import KVCache
from mtp_fast.models.checkpoint import load_checkpoint, save_checkpoint
from mtp_fast.models.config import MTPConfig
from mtp_fast.models.transformer import Block, MTPTransformer, Trunk

__all__ = [
    "Block",
    "KVCache",
    "MTPConfig",
    "MTPTransformer",
    "Trunk",
    "load_checkpoint",
    "save_checkpoint",
]
