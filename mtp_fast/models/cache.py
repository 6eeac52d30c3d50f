"""The static key/value cache of incremental decoding."""

from __future__ import annotations

from torch import Tensor


class KVCache:
    """Keys and values of `n_layers` attention layers for a ragged batch.

    Storage is allocated once. A sequence's length is not kept here: whoever decodes knows how many
    positions are committed, and rewinding is writing there again.

    Parameters
    ----------
    n_layers, batch, capacity, n_kv_heads, head_dim : int
        Extents; `capacity` is in positions.
    like : Tensor
        Gives dtype and device.
    """

    def __init__(
        self,
        n_layers: int,
        batch: int,
        capacity: int,
        n_kv_heads: int,
        head_dim: int,
        like: Tensor,
    ) -> None:
        # Zeros, not empty: a NaN at a masked position would survive attention as 0 * NaN.
        # A head's positions lie one behind the other: attention reads them as one stream.
        self._storage = like.new_zeros(n_layers, batch, 2, n_kv_heads, capacity, head_dim)
        self._heads = [layer.flatten(1, 2) for layer in self._storage]

    def write(self, layer: int, sequence: Tensor, position: Tensor, kv: Tensor) -> None:
        """Store `kv` (R, 2 * n_kv_heads, head_dim), keys first; row r is ``sequence[r]``'s."""
        self._heads[layer][sequence, :, position] = kv

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, n_kv_heads, length, head_dim) of the first positions."""
        k, v = self._storage[layer, :, :, :, :length].unbind(1)
        return k, v
