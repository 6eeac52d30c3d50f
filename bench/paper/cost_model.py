"""What multi-token prediction costs, by a model's shape alone: FLOPs, memory, traffic, time.

Counted are matrix products, and the bytes that must move or stay; a product of (a, b) by (b, c)
is 2 a b c FLOPs. `scale.py` checks the counts against measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from mtp_fast.models import MTPConfig

CHUNK_BYTES = 256 << 20  # of logits, in mtp_fast.multi_token_cross_entropy
ROUTES = ("eager", "parallel", "headwise")


@dataclass(frozen=True)
class Device:
    """Published peaks of an accelerator.

    Parameters
    ----------
    flops : float
        Matrix products, 16 bits, FLOP/s.
    bandwidth : float
        Of its memory, bytes/s.
    network : float
        To the other devices, bytes/s.
    """

    flops: float
    bandwidth: float
    network: float


# H100 SXM: dense bfloat16, HBM3, one 400 Gbit/s port a device.
H100 = Device(989e12, 3.35e12, 50e9)


def block_weights(c: MTPConfig) -> int:
    """Weights in the products of a block."""
    return c.dim * (2 * _query_width(c) + _kv_width(c) + 3 * c.ffn_dim)


def parameters(c: MTPConfig) -> int:
    """Parameters of a model without biases and norms of queries and keys."""
    embeddings = (1 if c.tie_embeddings else 2) * c.vocab_size * c.dim
    return c.n_layers * (block_weights(c) + 2 * c.dim) + c.dim + embeddings


def training_flops(c: MTPConfig, length: int, *, causal: bool = True) -> int:
    """FLOPs of forward and backward over one sequence of `length` tokens.

    `causal`: attention skips what it masks, as fused kernels do.
    """
    attention = 4 * length**2 * _query_width(c) // (2 if causal else 1)
    blocks = c.n_layers * (2 * length * block_weights(c) + attention)
    return 3 * blocks + unembedding_flops(c, length)


def unembedding_flops(c: MTPConfig, length: int) -> int:
    """Of these, what the heads' losses take: products with the unembedding."""
    return 3 * c.n_future_tokens * 2 * length * c.vocab_size * c.dim


def training_memory(
    c: MTPConfig, tokens: int, route: str, value_bytes: int, chunk_bytes: int = CHUNK_BYTES
) -> dict[str, int]:
    """Bytes that a step holds at its peak, beside weights, gradients and optimizer.

    Parameters
    ----------
    c : MTPConfig
        Shape of the model.
    tokens : int
        Tokens of the micro-batch.
    route : {"eager", "parallel", "headwise"}
        All heads' float32 logits at once; or ours, see `mtp_fast.training.multi_token_loss`.
    value_bytes : int
        Of an activation.
    chunk_bytes : int
        Of our losses' buffer.

    Returns
    -------
    dict
        ``blocks``: what blocks keep for the backward; ``logits``: logits, their gradient and what
        goes with them; ``waiting``: gradients of finished heads, which wait for the backward.
    """
    if route not in ROUTES:
        raise ValueError(f"route must be one of {ROUTES}, got {route!r}")
    heads = 1 if route == "headwise" else c.n_future_tokens
    # Of a token: both norms' inputs, normalised, and times their weights (a fused norm keeps less);
    # queries, keys and values, queries and keys rotated, the attention's output; gate, up,
    # silu(gate), and its product with up.
    block = 6 * c.dim + 3 * _query_width(c) + 3 * _kv_width(c) // 2 + 4 * c.ffn_dim
    ends = 3 * heads * c.dim  # of the final norm
    blocks = value_bytes * tokens * ((c.n_trunk_layers + heads) * block + ends)
    row, unembedding = tokens * c.vocab_size, c.vocab_size * c.dim
    if route == "eager":
        # Every head's log-probabilities and, of one head, two gradients in float32; d(weight).
        logits = 4 * (heads + 2) * row + value_bytes * unembedding
    else:
        # The buffer, d(hidden), and d(weight) in float32; head by head, also that of heads before.
        logits = min(chunk_bytes, value_bytes * heads * row) + value_bytes * heads * tokens * c.dim
        logits += 4 * unembedding * (2 if heads < c.n_future_tokens else 1)
    waiting = value_bytes * (c.n_future_tokens - heads) * block_weights(c)
    return {"blocks": blocks, "logits": logits, "waiting": waiting}


def communication(c: MTPConfig, devices: int, route: str) -> float:
    """Bytes that a device receives in a step of fully sharded data parallelism, in 16 bits.

    Parameters are gathered for the forward and for the backward, and gradients are scattered. Head
    by head the unembedding is gathered for each head anew.
    """
    values = 3 * parameters(c)
    if route == "headwise":
        values += (c.n_future_tokens - 1) * c.vocab_size * c.dim
    return 2 * values * (devices - 1) / devices


def kv_cache(c: MTPConfig, heads: int, context: int, value_bytes: int = 2) -> int:
    """Bytes of a sequence's keys and values when `heads` heads are used."""
    return value_bytes * (c.n_trunk_layers + heads) * context * _kv_width(c)


def decode_flops(c: MTPConfig, heads: int, batch: int, context: int) -> int:
    """FLOPs of a decode step with `heads` heads: trunk and head 0 on every row of the block.

    Drafting heads have keys and values of every row, and the rest of their block at one.
    """
    rows, drafting = batch * heads, heads - 1
    attention = 4 * context * _query_width(c)
    full = (c.n_trunk_layers + 1) * rows * (2 * block_weights(c) + attention)
    keys = 2 * c.dim * _kv_width(c)
    drafts = drafting * (rows * keys + batch * (2 * block_weights(c) - keys + attention))
    unembedding = (rows + batch * drafting) * 2 * c.vocab_size * c.dim
    return full + drafts + unembedding


def decode_weights(c: MTPConfig, heads: int) -> int:
    """Weights that a decode step reads with `heads` heads, each counted once."""
    return (c.n_trunk_layers + heads) * block_weights(c) + c.vocab_size * c.dim


def decode_bytes(c: MTPConfig, heads: int, batch: int, context: int, value_bytes: int = 2) -> int:
    """Bytes that a decode step reads: weights, keys and values; to draft, the unembedding again."""
    again = c.vocab_size * c.dim if heads > 1 else 0
    weights = value_bytes * (decode_weights(c, heads) + again)
    return weights + batch * kv_cache(c, heads, context, value_bytes)


def decode_seconds(
    c: MTPConfig, heads: int, batch: int, context: int, device: Device
) -> tuple[float, float]:
    """Least and most time of a decode step: its FLOPs beside its bytes, or one after the other."""
    flops = decode_flops(c, heads, batch, context) / device.flops
    transfers = decode_bytes(c, heads, batch, context) / device.bandwidth
    return max(flops, transfers), flops + transfers


def _query_width(c: MTPConfig) -> int:
    return c.n_attention_heads * c.head_dim


def _kv_width(c: MTPConfig) -> int:
    """Keys and values."""
    return 2 * c.n_kv_heads * c.head_dim
