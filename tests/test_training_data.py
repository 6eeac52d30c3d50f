"""Byte corpora and the windows that training draws from token arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtp_fast.training import Corpus, Windows, load_corpus
from mtp_fast.training.data import document_ids


def test_windows_depend_on_seed_and_number_alone():
    tokens = np.arange(100, dtype=np.uint16)
    windows = Windows(tokens, 5, 10, seed=3)
    third = windows.batch(2)
    assert third.shape == (5, 10)
    assert third.dtype == torch.int64
    assert torch.equal(third - third[:, :1], torch.arange(10).expand(5, -1))
    assert torch.equal(third, Windows(tokens, 5, 10, seed=3).batch(2))
    assert not torch.equal(third, windows.batch(3))
    assert not torch.equal(third, Windows(tokens, 5, 10, seed=4).batch(2))


def test_windows_reach_both_ends():
    windows = Windows(np.arange(12, dtype=np.uint8), 64, 10, seed=0)
    assert set(windows.batch(0)[:, 0].tolist()) == {0, 1, 2}
    with pytest.raises(ValueError, match="12 tokens, fewer than one window of 13"):
        Windows(np.arange(12, dtype=np.uint8), 1, 13, seed=0)


def test_a_separator_belongs_to_the_document_that_it_closes():
    tokens = torch.tensor([[5, 9, 6, 6, 9, 9, 5], [9, 5, 5, 5, 5, 5, 9]])
    expected = [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    assert document_ids(tokens, 9).tolist() == expected


def test_corpus_splits_by_file_and_closes_documents(tmp_path):
    files = []
    for i in range(20):
        files.append(tmp_path / f"{i}.txt")
        files[-1].write_text(f"text {i}")
    corpus = Corpus(tuple(files), validation_share=0.1, seed=1)
    train, validation = corpus.split_files()
    assert len(validation) == 2
    assert sorted(train + validation) == sorted(files)
    assert Corpus(tuple(files), validation_share=0.1, seed=2).split_files()[1] != validation
    documents = bytes(corpus.read()[1]).split(b"\0")
    assert documents == [*(file.read_bytes() for file in validation), b""]

    corpus.save(tmp_path / "run")
    assert load_corpus(tmp_path / "run").split_files() == (train, validation)
    (tmp_path / "run" / "corpus.json").write_text("{}")
    with pytest.raises(ValueError, match=r"corpus\.json is damaged"):
        load_corpus(tmp_path / "run")


def test_a_single_file_is_validated_on_its_end(tmp_path):
    file = tmp_path / "one.txt"
    file.write_bytes(bytes(range(1, 100)))
    train, validation = Corpus((file,), validation_share=0.1).read()
    assert bytes(train) == bytes(range(1, 91))
    assert bytes(validation) == bytes(range(91, 100)) + b"\0"


def test_an_empty_corpus_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no files"):
        Corpus(())
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match=r"0 bytes in .*empty"):
        Corpus((tmp_path / "empty",)).read()
