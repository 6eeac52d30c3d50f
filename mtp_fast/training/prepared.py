"""Prepared corpora: files of token ids that training memory-maps, written in one streaming pass.

A prepared directory holds `tokens.bin` (little-endian ids, training first, then validation; every
document is closed by the separator), `tokens.json` (what they are) and, unless tokens are bytes,
the `tokenizer.json` that made them. It is written under another name and renamed at the end.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from mtp_fast.models.checkpoint import write_atomically
from mtp_fast.training.data import BYTE_VOCAB_SIZE, CORPUS_FILE, SEPARATOR, Corpus, Tokens

FORMAT = "mtp_fast tokens 1"
HEADER_FILE = "tokens.json"
TOKENS_FILE = "tokens.bin"
TOKENIZER_FILE = "tokenizer.json"
# What is read of a file at once, and how many pieces of text a tokenizer gets to share out.
PIECE = 1 << 16
BATCH = 16
# What the best-known tokenizers call the end of a document.
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


@dataclass(frozen=True)
class PreparedCorpus:
    """A prepared directory.

    Attributes
    ----------
    directory : Path
        Where it is.
    vocab_size : int
        One more than the largest token id.
    separator : int
        The id that closes every document.
    train_tokens, validation_tokens : int
        How many there are, separators included.
    """

    directory: Path
    vocab_size: int
    separator: int
    train_tokens: int
    validation_tokens: int

    @classmethod
    def open(cls, directory: Path) -> PreparedCorpus:
        """Read the header of `directory`.

        Raises
        ------
        ValueError
            If `directory` was not prepared, or is damaged.
        """
        header = directory / HEADER_FILE
        if not header.is_file():
            raise ValueError(f"{directory} is not a prepared corpus: it has no {HEADER_FILE}")
        try:
            fields = json.loads(header.read_text())
            if fields.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            if not all(isinstance(value, int) and value >= 0 for value in fields.values()):
                raise ValueError(f"its fields must be whole numbers, got {fields}")
            corpus = cls(directory, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{header} is damaged: {error}") from error
        tokens = directory / TOKENS_FILE
        count = corpus.train_tokens + corpus.validation_tokens
        if tokens.stat().st_size != count * corpus.dtype.itemsize:
            raise ValueError(
                f"{tokens} is damaged: {tokens.stat().st_size} bytes, expected {count} tokens of "
                f"{corpus.dtype.itemsize}"
            )
        return corpus

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The smallest unsigned type that holds every id."""
        size = 1 if self.vocab_size <= 1 << 8 else 2 if self.vocab_size <= 1 << 16 else 4
        return np.dtype(f"<u{size}")

    @property
    def tokenizer(self) -> Path | None:
        """The `tokenizer.json` that made the tokens; None if they are bytes."""
        file = self.directory / TOKENIZER_FILE
        return file if file.is_file() else None

    def read(self) -> tuple[Tokens, Tokens]:
        """Map the tokens of training and of validation into memory."""
        tokens = np.memmap(self.directory / TOKENS_FILE, self.dtype, mode="r")
        return tokens[: self.train_tokens], tokens[self.train_tokens :]

    def save(self, directory: Path) -> None:
        """Record in `directory` which corpus a run uses."""
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"prepared": str(self.directory.resolve())}) + "\n"
        write_atomically(directory / CORPUS_FILE, lambda file: file.write_text(text))


def load_corpus(directory: Path) -> Corpus | PreparedCorpus:
    """Return the corpus that `save` of either kind recorded in `directory`.

    Raises
    ------
    ValueError
        If there is none, or it is damaged.
    """
    file = directory / CORPUS_FILE
    if not file.is_file():
        raise ValueError(f"{directory} cannot be resumed: it has no {CORPUS_FILE}")
    try:
        fields = json.loads(file.read_text())
        prepared = fields.get("prepared")
        if prepared is None:
            files = tuple(Path(name) for name in fields["files"])
            return Corpus(files, fields["validation_share"], fields["seed"])
        prepared = Path(prepared)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return PreparedCorpus.open(prepared)


def prepare(
    files: Sequence[Path],
    directory: Path,
    *,
    tokenizer: Path | None = None,
    separator: str | None = None,
    validation_share: float = 0.05,
    seed: int = 0,
) -> PreparedCorpus:
    """Write text files as a prepared corpus; memory does not grow with their size.

    Parameters
    ----------
    files : sequence of Path
        The documents. They are split into training and validation as `Corpus` does.
    directory : Path
        What to make; it must not exist, or be empty.
    tokenizer : Path, optional
        A Hugging Face `tokenizer.json`, for UTF-8 text; without one, tokens are bytes. Special
        tokens in the text become their ids. Large files are tokenized in pieces that begin with a
        space, across which byte-level tokenizers never merge.
    separator : str, optional
        The tokenizer's token that closes a document; by default the one of the usual names that
        it has. Bytes are closed by NUL.
    validation_share : float
        Share that is held out, in (0, 1).
    seed : int
        Of the split.

    Raises
    ------
    ValueError
        If an argument is out of range, a file is not UTF-8, the tokenizer is none or lacks the
        separator, `directory` is in use, or there is no text.
    OSError
        If a file cannot be read or written.
    """
    corpus = Corpus(tuple(files), validation_share, seed)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} is in use")
    if tokenizer is None and separator is not None:
        raise ValueError(f"separator={separator!r} goes with a tokenizer; bytes are closed by NUL")
    encoder = _Bytes() if tokenizer is None else _HuggingFace(tokenizer, separator)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        done = PreparedCorpus(temporary, encoder.vocab_size, encoder.separator, 0, 0)
        train_files, validation_files = corpus.split_files()
        with (temporary / TOKENS_FILE).open("wb") as out:
            train = _write(out, train_files, encoder, done.dtype)
            if len(files) > 1:
                validation = _write(out, validation_files, encoder, done.dtype)
            else:
                validation = max(1, round(validation_share * train))
                train -= validation
            os.fsync(out.fileno())
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / TOKENIZER_FILE)
        done = dataclasses.replace(
            done, directory=directory, train_tokens=train, validation_tokens=validation
        )
        header = {"format": FORMAT, **dataclasses.asdict(done)}
        del header["directory"]
        (temporary / HEADER_FILE).write_text(json.dumps(header, indent=1) + "\n")
        temporary.replace(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return done


class _Encoder(Protocol):
    vocab_size: int
    separator: int

    def encode(self, file: Path) -> Iterator[Tokens]:
        """Yield the tokens of a file, in pieces."""


class _Bytes:
    vocab_size = BYTE_VOCAB_SIZE
    separator = SEPARATOR

    def encode(self, file: Path) -> Iterator[Tokens]:
        with file.open("rb") as handle:
            while piece := handle.read(PIECE):
                yield np.frombuffer(piece, np.uint8)


class _HuggingFace:
    def __init__(self, file: Path, separator: str | None) -> None:
        from tokenizers import Tokenizer  # of the tokenizers extra

        text = file.read_text()
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"{file} is not a tokenizer.json: {error}") from error
        # A file may carry the limits of the model that it was made for.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        names = SEPARATORS if separator is None else (separator,)
        found = [ids[name] for name in names if name in ids]
        if not found:
            raise ValueError(f"separator must be a token of {file}, which lacks {' '.join(names)}")
        self.separator = found[0]

    def encode(self, file: Path) -> Iterator[Tokens]:
        pieces = _pieces(file)
        while batch := list(islice(pieces, BATCH)):
            for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                yield np.array(encoding.ids, np.uint32)


def _pieces(file: Path) -> Iterator[str]:
    """Yield the text of a file in pieces of about PIECE characters."""
    rest = ""
    try:
        with file.open(encoding="utf-8", newline="") as handle:
            while block := handle.read(PIECE):
                rest += block
                cut = _cut(rest)
                yield rest[:cut]
                rest = rest[cut:]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error
    yield rest


def _cut(text: str) -> int:
    """Where to cut: before the last space that follows a word, or after a line, or at the end."""
    space = text.rfind(" ")
    while space > 0 and text[space - 1].isspace():
        space = text.rfind(" ", 0, space)
    return space if space > 0 else text.rfind("\n") + 1 or len(text)


def _write(
    out: BinaryIO, files: Sequence[Path], encoder: _Encoder, dtype: np.dtype[np.unsignedinteger]
) -> int:
    """Append the documents to `out` and return how many tokens they have, separators included."""
    count = 0
    for file in files:
        for tokens in encoder.encode(file):
            out.write(tokens.astype(dtype, copy=False).tobytes())
            count += len(tokens)
        out.write(np.array(encoder.separator, dtype).tobytes())
    if count == 0:
        raise ValueError(f"the corpus is empty: no text in {', '.join(map(str, files[:3]))}")
    return count + len(files)
