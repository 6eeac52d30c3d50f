"""Byte corpora: text files as arrays of token ids, and random windows of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mtp_fast.models.checkpoint import write_atomically

Tokens: TypeAlias = npt.NDArray[np.unsignedinteger[npt.NBitBase]]

BYTE_VOCAB_SIZE = 256
CORPUS_FILE = "corpus.json"
# Closes every document; NUL does not occur in text.
SEPARATOR = 0


@dataclass(frozen=True)
class Corpus:
    """Text files, and how they are split into training and validation.

    With two files or more, validation is a random share of the files; of a single file it is the
    end.

    Parameters
    ----------
    files : tuple of Path
        The files.
    validation_share : float
        Share that is held out, in (0, 1).
    seed : int
        Of the split.

    Raises
    ------
    ValueError
        If there is no file, or `validation_share` is out of range.
    """

    vocab_size: ClassVar[int] = BYTE_VOCAB_SIZE
    separator: ClassVar[int] = SEPARATOR
    tokenizer: ClassVar[Path | None] = None

    files: tuple[Path, ...]
    validation_share: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("the corpus is empty: no files")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must be in (0, 1), got {self.validation_share}")

    def split_files(self) -> tuple[list[Path], list[Path]]:
        """Return the files of training and of validation; a single file is in both."""
        if len(self.files) == 1:
            return [*self.files], [*self.files]
        order = np.random.default_rng(self.seed).permutation(len(self.files))
        shuffled = [self.files[i] for i in order]
        held_out = min(max(1, round(self.validation_share * len(shuffled))), len(shuffled) - 1)
        return shuffled[held_out:], shuffled[:held_out]

    def read(self) -> tuple[Tokens, Tokens]:
        """Return the bytes of training and of validation, every document closed by a NUL.

        Raises
        ------
        ValueError
            If either holds no byte.
        OSError
            If a file cannot be read.
        """
        train_files, validation_files = self.split_files()
        train = _read_bytes(train_files)
        if len(self.files) > 1:
            return train, _read_bytes(validation_files)
        cut = len(train) - max(1, round(self.validation_share * len(train)))
        return train[:cut], train[cut:]

    def save(self, directory: Path) -> None:
        """Record in `directory` which files a run uses."""
        fields = {
            "files": [str(file.resolve()) for file in self.files],
            "validation_share": self.validation_share,
            "seed": self.seed,
        }
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(fields, indent=1) + "\n"
        write_atomically(directory / CORPUS_FILE, lambda file: file.write_text(text))


class Windows:
    """Random windows of a token array, each batch a function of the seed and its number alone.

    Parameters
    ----------
    tokens : ndarray
        (N,) token ids of any unsigned dtype.
    batch_size, length : int
        Windows a batch, and tokens a window.
    seed : int
        Of the draw.

    Raises
    ------
    ValueError
        If the corpus is shorter than one window.
    """

    def __init__(self, tokens: Tokens, batch_size: int, length: int, seed: int) -> None:
        if len(tokens) < length:
            raise ValueError(
                f"the corpus has {len(tokens)} tokens, fewer than one window of {length}"
            )
        self._tokens, self._batch_size, self._length = tokens, batch_size, length
        self._seed = seed

    def __len__(self) -> int:
        """Return how many tokens the windows are drawn from."""
        return len(self._tokens)

    def batch(self, index: int) -> Tensor:
        """Return batch number `index`: (batch_size, length) int64."""
        # A generator a batch, so that a resumed run needs no generator's state.
        rng = np.random.default_rng((self._seed, index))
        starts = rng.integers(len(self._tokens) - self._length + 1, size=self._batch_size)
        windows = self._tokens[starts[:, None] + np.arange(self._length)]
        return torch.from_numpy(windows.astype(np.int64))


def document_ids(tokens: Tensor, separator: int) -> Tensor:
    """Number the documents in each row of `tokens` (B, T) from 0; a separator ends its own."""
    closed = tokens == separator
    return closed.cumsum(1) - closed.long()


def _read_bytes(files: Sequence[Path]) -> Tokens:
    documents = [file.read_bytes() for file in files]
    if not any(documents):
        raise ValueError(f"the corpus is empty: 0 bytes in {', '.join(map(str, files[:3]))}")
    closing = bytes([SEPARATOR])
    return np.frombuffer(closing.join(documents) + closing, np.uint8)
