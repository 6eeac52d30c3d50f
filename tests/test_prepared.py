"""Prepared corpora: what is in the files, streaming, errors, and training on them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from helpers import PEAK_MEMORY
from mtp_fast import cli
from mtp_fast.models import load_checkpoint
from mtp_fast.training import Corpus, PreparedCorpus, load_corpus, prepare, prepared, read_metrics

TEXT = "def square(x):\n    return x * x\n\n\nprint(square(3), 'naïve café')  # a comment \n"
SHAPE = "--heads 2 --layers 3 --dim 16 --attention-heads 2 --ffn-dim 16 --max-seq-len 64"
OPTIONS = f"{SHAPE} --context 16".split()


def new_tokenizer(file: Path, vocab_size: int = 300) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.enable_truncation(5)  # as files of models with a limit have it
    tokenizer.save(str(file))
    return file


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    return new_tokenizer(tmp_path / "tokenizer.json")


@pytest.fixture
def files(tmp_path) -> list[Path]:
    paths = [tmp_path / f"{i}.txt" for i in range(10)]
    for i, path in enumerate(paths):
        path.write_text(f"document {i}\n{TEXT * (i + 1)}")
    return paths


@pytest.mark.parametrize("count", [1, 10])
def test_bytes_are_those_of_the_files_themselves(files, tmp_path, count):
    files = files[-count:]
    corpus = prepare(files, tmp_path / "out", validation_share=0.2, seed=3)
    expected = Corpus(tuple(files), 0.2, seed=3).read()
    for got, want in zip(corpus.read(), expected, strict=True):
        assert isinstance(got, np.memmap)
        np.testing.assert_array_equal(got, want)
    assert corpus == PreparedCorpus.open(tmp_path / "out")
    assert corpus.vocab_size == 256
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["tokens.bin", "tokens.json"]


def test_a_tokenizers_tokens_decode_to_the_documents(files, tokenizer, tmp_path):
    corpus = prepare(files, tmp_path / "out", tokenizer=tokenizer, validation_share=0.2)
    assert corpus.dtype == np.uint16
    plain = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    train_files, validation_files = Corpus(tuple(files), 0.2).split_files()
    for tokens, paths in zip(corpus.read(), (train_files, validation_files), strict=True):
        *documents, end = np.split(tokens, np.flatnonzero(tokens == corpus.separator) + 1)
        assert len(end) == 0
        texts = [plain.decode(d[:-1].tolist(), skip_special_tokens=False) for d in documents]
        assert texts == [path.read_text() for path in paths]
    assert corpus.vocab_size == max(plain.get_vocab().values()) + 1
    assert corpus.separator == plain.token_to_id("<|endoftext|>")


def test_pieces_have_the_tokens_of_the_whole(files, tokenizer, tmp_path, monkeypatch):
    whole = prepare(files, tmp_path / "whole", tokenizer=tokenizer)
    monkeypatch.setattr(prepared, "PIECE", 64)
    pieces = prepare(files, tmp_path / "pieces", tokenizer=tokenizer)
    for a, b in zip(whole.read(), pieces.read(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("unit", ["日本語の文章。\n", "ü", "\n \n  ", "word "])
def test_any_text_survives_being_cut(tmp_path, tokenizer, monkeypatch, unit):
    monkeypatch.setattr(prepared, "PIECE", 7)
    file = tmp_path / "text"
    file.write_text(unit * 50)
    train, validation = prepare([file], tmp_path / "out", tokenizer=tokenizer).read()
    plain = Tokenizer.from_file(str(tokenizer))
    assert plain.decode([*train, *validation][:-1]) == unit * 50


def test_special_tokens_in_the_text_close_documents(tmp_path, tokenizer):
    file = tmp_path / "text"
    file.write_text("one<|endoftext|>two")
    train, validation = prepare([file], tmp_path / "out", tokenizer=tokenizer).read()
    assert [*train, *validation].count(0) == 2


@pytest.mark.parametrize(("vocab_size", "size"), [(256, 1), (257, 2), (65_536, 2), (65_537, 4)])
def test_ids_take_as_few_bytes_as_they_can(vocab_size, size, tmp_path):
    assert PreparedCorpus(tmp_path, vocab_size, 0, 1, 1).dtype.itemsize == size


@pytest.mark.parametrize("kind", ["bytes", "tokenizer"])
def test_memory_does_not_grow_with_the_corpus(kind, tokenizer, tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_text(TEXT * 60_000)  # 5 MB, so that buffers have their size
    large.write_text(TEXT * (600_000 if kind == "bytes" else 180_000))
    script = f"""{PEAK_MEMORY}
from mtp_fast.training import prepare
tokenizer = {f"Path({str(tokenizer)!r})" if kind == "tokenizer" else None}
prepare([Path({str(small)!r})], Path({str(tmp_path / "a")!r}), tokenizer=tokenizer)
before = reset_peak()
prepare([Path({str(large)!r})], Path({str(tmp_path / "b")!r}), tokenizer=tokenizer)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,  # the installed package, not the sources
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    # The bytes are 49 MB, and the tokenizer takes 60 bytes for one of the text that it is given.
    assert int(done.stdout) < 32e6


def run(*arguments: object) -> int:
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def test_train_takes_a_prepared_corpus(files, tokenizer, tmp_path, capsys):
    out, checkpoint = tmp_path / "tokens", tmp_path / "run"
    assert run("prepare", *files, "--out", out, "--tokenizer", tokenizer) == 0
    corpus = PreparedCorpus.open(out)
    assert f"vocabulary {corpus.vocab_size}" in capsys.readouterr().out
    assert run("train", out, "--out", checkpoint, "--steps", 2, *OPTIONS) == 0
    assert load_checkpoint(checkpoint).config.vocab_size == corpus.vocab_size
    assert load_corpus(checkpoint) == PreparedCorpus.open(out.resolve())
    assert run("train", "--resume", checkpoint) == 0
    assert len(read_metrics(checkpoint)) == 2
    assert run("generate", checkpoint, "--prompt", "def ", "--max-new-tokens", 4) == 0
    assert json.loads((checkpoint / "generation_config.json").read_text()) == {
        "eos_token_id": corpus.separator
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("FILE --out USED", "is in use"),
        ("FILE --out NEW --separator </s>", "goes with a tokenizer"),
        ("FILE --out NEW --tokenizer TOKENIZER --separator <s>", "lacks <s>"),
        ("FILE --out NEW --tokenizer FILE", "is not a tokenizer.json"),
        ("FILE --out NEW --tokenizer MISSING", "No such file"),
        ("MISSING --out NEW", "No such file"),
        ("EMPTY --out NEW", "the corpus is empty"),
        ("LATIN1 --out NEW --tokenizer TOKENIZER", "latin1.txt is not UTF-8"),
        ("FILE --out NEW --validation-share 2", "validation_share must be in (0, 1), got 2"),
        ("--out NEW", "files"),
    ],
)
def test_prepare_refuses_in_one_line(arguments, message, files, tokenizer, tmp_path, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thing").touch()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    places = {
        "FILE": files[0],
        "USED": tmp_path / "used",
        "NEW": tmp_path / "new",
        "TOKENIZER": tokenizer,
        "MISSING": tmp_path / "missing",
        "EMPTY": tmp_path / "empty.txt",
        "LATIN1": tmp_path / "latin1.txt",
    }
    before = sorted(tmp_path.iterdir())
    assert run("prepare", *[places.get(word, word) for word in arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "tokens.json").unlink(), "is not a prepared corpus"),
        (lambda d: (d / "tokens.json").write_text("{"), "tokens.json is damaged"),
        (lambda d: (d / "tokens.json").write_text('{"format": "other"}'), "its format is not"),
        (lambda d: change_header(d, vocab_size="many"), "must be whole numbers"),
        (lambda d: change_header(d, colour=1), "colour"),
        (lambda d: (d / "tokens.bin").write_bytes(b"12345"), "tokens.bin is damaged: 5 bytes"),
    ],
)
def test_train_refuses_a_damaged_corpus(damage, message, files, tmp_path, capsys):
    directory = tmp_path / "tokens"
    prepare(files, directory)
    damage(directory)
    assert run("train", directory, "--out", tmp_path / "run", "--steps", 1, *OPTIONS) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


def change_header(directory: Path, **changes: object) -> None:
    header = json.loads((directory / "tokens.json").read_text())
    (directory / "tokens.json").write_text(json.dumps({**header, **changes}))


def test_a_missing_tokenizers_package_is_named(files, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert run("prepare", files[0], "--out", tmp_path / "out", "--tokenizer", tokenizer) == 2
    assert "pip install 'mtp-fast[tokenizers]'" in capsys.readouterr().err
