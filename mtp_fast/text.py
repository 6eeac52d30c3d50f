"""Text as token ids and back: bytes, or the `tokenizer.json` that lies beside a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mtp_fast.models.checkpoint import write_atomically
from mtp_fast.models.layout import read_json
from mtp_fast.training import BYTE_VOCAB_SIZE, SEPARATOR, Corpus, PreparedCorpus
from mtp_fast.training.prepared import TOKENIZER_FILE

GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class Codec:
    """How the text of a model becomes token ids.

    Attributes
    ----------
    encode, decode : callable
        From text, as UTF-8, to ids, and from ids to text.
    eos_token_id : int, optional
        The id that ends a text.
    """

    encode: Callable[[bytes], list[int]]
    decode: Callable[[list[int]], str]
    eos_token_id: int | None


def decode_bytes(tokens: list[int]) -> str:
    """Return the text of byte tokens, without the end of a document."""
    return bytes(tokens).decode(errors="replace").replace(chr(SEPARATOR), "")


def load_codec(directory: Path, vocab_size: int) -> Codec:
    """Return the codec of the checkpoint in `directory`.

    Raises
    ------
    ValueError
        If the vocabulary is not that of bytes and there is no tokenizer, or it is damaged.
    """
    file = directory / TOKENIZER_FILE
    if not file.is_file():
        _check_bytes(directory, vocab_size, "a prompt")
        return Codec(list, decode_bytes, SEPARATOR)
    from tokenizers import Tokenizer  # an extra

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # it raises no class of its own
        raise ValueError(f"{file} is not a tokenizer: {error}") from error
    return Codec(
        lambda text: [*tokenizer.encode(text.decode()).ids],
        lambda tokens: str(tokenizer.decode(tokens)),
        _eos_token_id(directory),
    )


def check_tokenizer(directory: Path, vocab_size: int, corpus: Corpus | PreparedCorpus) -> None:
    """Check that the tokens of `corpus` are those of the model in `directory`.

    Raises
    ------
    ValueError
        If another tokenizer made them, or they are bytes and the model's are not, or the other way
        round, or there are more of them than the model's `vocab_size`.
    """
    file = directory / TOKENIZER_FILE
    if file.is_file():
        if corpus.tokenizer is None or _vocabulary(file) != _vocabulary(corpus.tokenizer):
            raise ValueError(
                f"the corpus was not made with {file}; mtp-fast prepare takes it as --tokenizer"
            )
    elif corpus.tokenizer is None:
        _check_bytes(directory, vocab_size, "a corpus")
    if corpus.vocab_size > vocab_size:
        raise ValueError(
            f"the corpus has a vocabulary of {corpus.vocab_size}, "
            f"the model in {directory} one of {vocab_size}"
        )


def save_tokenizer(
    directory: Path, pretrained: Path | None, corpus: Corpus | PreparedCorpus
) -> None:
    """Store in `directory` what `load_codec` reads, so that a run can be generated with.

    It is the tokenizer of the model that the run began with, if there was one and it has any, or
    that of the corpus; nothing where tokens are bytes.
    """
    of_model = None if pretrained is None else pretrained / TOKENIZER_FILE
    tokenizer = of_model if of_model is not None and of_model.is_file() else corpus.tokenizer
    if tokenizer is None:
        return
    write_atomically(directory / TOKENIZER_FILE, lambda file: shutil.copyfile(tokenizer, file))
    end = None if pretrained is None else _eos_token_id(pretrained)
    text = json.dumps({"eos_token_id": corpus.separator if end is None else end}) + "\n"
    write_atomically(directory / GENERATION_FILE, lambda file: file.write_text(text))


def _check_bytes(directory: Path, vocab_size: int, what: str) -> None:
    if vocab_size != BYTE_VOCAB_SIZE:
        raise ValueError(
            f"{directory} has a vocabulary of {vocab_size} and no {TOKENIZER_FILE}; "
            f"without one {what} is bytes ({BYTE_VOCAB_SIZE})"
        )


def _vocabulary(file: Path) -> tuple[object, object]:
    """Return what makes two tokenizers one, whatever limits their files carry."""
    fields = read_json(file)
    return fields.get("model"), fields.get("added_tokens")


def _eos_token_id(directory: Path) -> int | None:
    """Return what transformers' files say, the first where they name several."""
    for name in (GENERATION_FILE, "config.json"):
        if (directory / name).is_file():
            ids = json.loads((directory / name).read_text()).get("eos_token_id")
            if ids is not None:
                first: int = ids[0] if isinstance(ids, list) else ids
                return first
    return None
