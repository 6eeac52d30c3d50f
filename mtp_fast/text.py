"""Text as token ids and back: bytes, or the `tokenizer.json` that lies beside a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mtp_fast.training import BYTE_VOCAB_SIZE, SEPARATOR

TOKENIZER_FILE = "tokenizer.json"


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
        if vocab_size != BYTE_VOCAB_SIZE:
            raise ValueError(
                f"{directory} has a vocabulary of {vocab_size} and no {TOKENIZER_FILE}; "
                f"without one a prompt is bytes ({BYTE_VOCAB_SIZE})"
            )
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


def _eos_token_id(directory: Path) -> int | None:
    """Return what transformers' files say, the first where they name several."""
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file():
            ids = json.loads((directory / name).read_text()).get("eos_token_id")
            if ids is not None:
                first: int = ids[0] if isinstance(ids, list) else ids
                return first
    return None
