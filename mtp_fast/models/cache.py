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

    Attributes
    ----------
    slot_stride : int
        Elements from a slot to the next one.
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
        self._storage = like.new_zeros(n_layers, batch, capacity, 2, n_kv_heads, head_dim)
        self._rows = [layer.flatten(2, 3).flatten(0, 1) for layer in self._storage]
        self.slot_stride = 2 * n_kv_heads * head_dim

    def write(self, layer: int, slots: Tensor, kv: Tensor) -> None:
        """Store `kv` (R, 2 * n_kv_heads, head_dim), keys first, at `slots` (R,).

        The slot of position t of sequence b is ``b * capacity + t``.
        """
        self._rows[layer].index_copy_(0, slots, kv)

    def read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, n_kv_heads, length, head_dim) of the first positions."""
        k, v = self._storage[layer, :, :length].unbind(2)
        return k.transpose(1, 2), v.transpose(1, 2)

    def first_slot(self, layer: int, first_head: int = 0) -> tuple[Tensor, Tensor]:
        """Return keys and values (heads, head_dim) in slot 0, of the heads from `first_head` on."""
        k, v = self._storage[layer, 0, 0, :, first_head:]
        return k, v
