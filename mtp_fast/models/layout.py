"""How a checkpoint stores a model: a table from our parameters to the tensors in its files.

A layout may cut what we keep as one matrix (query, key and value; gate and up) into several
tensors, and a checkpoint may hold fewer or more heads than the model that is made of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mtp_fast.models.config import MTPConfig
from mtp_fast.models.transformer import MTPTransformer, Trunk, rope_of

# By name, and read only when called: a model is in memory once.
Tensors: TypeAlias = Mapping[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Layout:
    """The names that a kind of checkpoint gives to our parameters.

    Parameters
    ----------
    config_file : str
        What describes the model.
    outer : mapping
        Our parameters outside the blocks, and the tensors that hold them.
    block : mapping
        The parameters of a `Block`, and the tensors that hold them, by rows.
    prefixes : callable
        From the numbers of trunk layers and of heads to the prefixes of their blocks, in order.
    ignored : str, optional
        Tensors whose names end so hold no parameters.
    """

    config_file: str
    outer: Mapping[str, str]
    block: Mapping[str, tuple[str, ...]]
    prefixes: Callable[[int, int], Sequence[str]]
    ignored: str | None = None

    def read(
        self,
        config: MTPConfig,
        stored_heads: int,
        tensors: Tensors,
        source: Path,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> MTPTransformer:
        """Make a model of `tensors`, which come from `source`; heads not stored are head 0.

        Raises
        ------
        ValueError
            If a tensor is missing, has another shape than `config` says, or is not known.
        """
        with torch.device("meta"):  # the weights are yet to come: initialise and allocate nothing
            model = MTPTransformer(config)
        wrong = f"{source} does not hold the model of {self.config_file}"
        names = self._names(config, stored_heads)
        used = set()
        weights = {}
        for ours, like in model.state_dict().items():
            if config.tie_embeddings and ours == "unembedding.weight":
                continue
            parts = []
            for name, part in zip(names[ours], _split(config, like, len(names[ours])), strict=True):
                if name not in tensors:
                    raise ValueError(f"{wrong}: {name} is missing")
                tensor = tensors[name]()
                if tensor.shape != part.shape:
                    raise ValueError(
                        f"{wrong}: {name} is {tuple(tensor.shape)}, expected {tuple(part.shape)}"
                    )
                parts.append(tensor.to(device, dtype))
                used.add(name)
            weights[ours] = torch.cat(parts)  # a copy always: heads start apart, not shared
        dropped = self.prefixes(config.n_trunk_layers, stored_heads)[config.n_layers :]
        for name in sorted(tensors.keys() - used):
            tied = config.tie_embeddings and name == self.outer["unembedding.weight"]
            ignored = self.ignored is not None and name.endswith(self.ignored)
            if not (tied or ignored or name.startswith(tuple(f"{head}." for head in dropped))):
                raise ValueError(f"{wrong}: {name} is unknown")
        return _assemble(model, weights, device)

    def write(self, model: MTPTransformer) -> dict[str, Tensor]:
        """Return the tensors of `model`, on the CPU."""
        if not isinstance(model.trunk, Trunk):
            raise TypeError(
                f"only a Trunk has a layout, the model has a {type(model.trunk).__name__}"
            )
        names = self._names(model.config, model.config.n_future_tokens)
        tensors = {}
        for ours, weight in model.state_dict().items():
            parts = _split(model.config, weight, len(names[ours]))
            for name, part in zip(names[ours], parts, strict=True):
                tensors[name] = part.detach().cpu().contiguous()
        return tensors

    def _names(self, config: MTPConfig, stored_heads: int) -> dict[str, tuple[str, ...]]:
        """Return the tensors of every parameter that a model may have."""
        n_trunk = config.n_trunk_layers
        prefixes = self.prefixes(n_trunk, stored_heads)
        blocks = {f"trunk.blocks.{i}": prefixes[i] for i in range(n_trunk)}
        for k in range(config.n_future_tokens):
            blocks[f"heads.{k}"] = prefixes[n_trunk + (k if k < stored_heads else 0)]
        names: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in self.outer.items()}
        for ours, theirs in blocks.items():
            for name, parts in self.block.items():
                names[f"{ours}.{name}"] = tuple(f"{theirs}.{part}" for part in parts)
        return names


def _split(config: MTPConfig, weight: Tensor, count: int) -> Sequence[Tensor]:
    """Cut a fused parameter into query, key and value, or into gate and up."""
    if count == 3:
        n_kv = config.n_kv_heads * config.head_dim
        return weight.tensor_split([len(weight) - 2 * n_kv, len(weight) - n_kv])
    return weight.chunk(count)


def _assemble(
    model: MTPTransformer, weights: dict[str, Tensor], device: torch.device | str
) -> MTPTransformer:
    """Let `model`, made on the meta device, take over `weights`."""
    tied = model.config.tie_embeddings
    if tied:
        weights["unembedding.weight"] = weights["embedding.weight"]
    model.load_state_dict(weights, assign=True)
    if tied:
        model.unembedding.weight = model.embedding.weight
    table = rope_of(model.config).to(device)
    for module in (model, model.trunk):
        module.register_buffer("rope", table, persistent=False)
    return model


@contextmanager
def open_safetensors(files: Sequence[Path]) -> Iterator[Tensors]:
    """Give the tensors of all `files`.

    Raises
    ------
    ValueError
        If a file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open  # an extra: the model alone needs it not

    with ExitStack() as stack:
        tensors: dict[str, Callable[[], Tensor]] = {}
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file} is missing")
            try:
                handle = stack.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged: {error}") from error
            names = handle.keys()
            tensors |= {name: partial(handle.get_tensor, name) for name in names}
        yield tensors


@contextmanager
def errors_of(source: Path) -> Iterator[None]:
    """Turn errors in what `source` says of a model into a ValueError that names it."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{source} lacks {error.args[0]}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    ValueError
        If `file` holds none.
    """
    try:
        fields: Any = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(fields).__name__}")
    return fields
