"""The study of speculation: what it expects, and the study itself on a small model."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from mtp_fast.decoding import generate
from mtp_fast.models import MTPTransformer, save_checkpoint
from tiny_models import CONFIG, cyclic_model, ragged_prompts, sharp_model

sys.path.append(str(Path(__file__).parents[1] / "bench" / "paper"))
study = importlib.import_module("speculation")


def test_expected_acceptance_is_that_of_counting_position_by_position():
    model, prompts = sharp_model(), torch.stack(ragged_prompts(7, 7, 7))
    count, n = 30, CONFIG.n_future_tokens
    texts = generate(model, prompts, count, n_heads=1).tokens
    right = [0] * (n - 1)
    positions = 0
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = torch.cat([prompt, text])
        with torch.no_grad():
            drafts = [model.logits(tokens[None], head=k)[0].argmax(-1) for k in range(n)]
        for t in range(len(prompt) - 1, len(tokens) - n):
            positions += 1
            for k in range(1, n):
                if drafts[k][t] != tokens[t + 1 + k]:
                    break
                right[k - 1] += 1
    expected = study.expected_acceptance(model, prompts, texts)
    assert expected == pytest.approx([x / positions for x in right])
    assert 0 < expected[0] < 1  # or the model would test nothing


def test_heads_that_are_always_right_are_expected_to_be():
    model, prompts = cyclic_model(7), torch.arange(5)[None]
    texts = generate(model, prompts, 30, n_heads=1).tokens
    assert study.expected_acceptance(model, prompts, texts) == [1.0, 1.0, 1.0]


def test_a_case_counts_the_steps_after_the_prompt(monkeypatch):
    monkeypatch.setattr(study, "NEW_TOKENS", 21)
    model = cyclic_model(7)
    case = study.Case(2, 5, 4, 0, torch.arange(5).expand(3, 5))
    case.run(model)
    assert case.acceptance == [1.0, 1.0, 1.0]
    assert case.steps == 2 * 5  # of 20 tokens after the prompt's own, 4 a step; two batches
    assert len(case.tokens) == 3
    assert len(case.seconds) == 1


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 256, "n_layers": 4, "n_future_tokens": 3, "max_seq_len": 768}
    save_checkpoint(MTPTransformer(dataclasses.replace(CONFIG, **shape)), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def small(monkeypatch, checkpoint, tmp_path):
    monkeypatch.setattr(study, "NEW_TOKENS", 6)
    monkeypatch.setattr(study, "ALONE", 2)
    arguments = ["--budget", "0.001", "--seeds", "2", "--threads", "1"]
    return [*arguments, "--checkpoint", str(checkpoint), "--out", str(tmp_path)]


def test_the_study_runs_from_end_to_end(small, tmp_path):
    threads = torch.get_num_threads()
    study.STUDY.main(small)
    torch.set_num_threads(threads)
    report = json.loads((tmp_path / "speculation.json").read_text())
    records = report["results"]["records"]
    assert len(records) == 2 * len(study.SETTINGS) * 3
    for record in records:
        assert 1 <= record["tokens_per_forward"] <= record["heads"]
        assert 1 <= record["expected_tokens_per_forward"] <= record["heads"]
        assert 0 < record["tokens_per_second"] < 1e6
        if record["heads"] == 1:
            for name in ("speedup", "speedup_by_bytes", "speedup_by_flops", "tokens_per_forward"):
                assert record[name] == 1
        else:  # a block costs the FLOPs of its rows, and hardly more bytes
            assert record["speedup_by_flops"] < record["speedup_by_bytes"]
    table = study.rows(report)
    assert len({len(row) for row in table}) == 1
    assert [row[0] for row in table[1:]] == ["1", "2", "3"]
    assert table[2][1] == "1.94 / 1.98"
    assert (tmp_path / "speculation.png").read_bytes()[:4] == b"\x89PNG"


def test_the_study_refuses_to_time_texts_that_differ(small, monkeypatch):
    monkeypatch.setattr(study, "_gap", lambda *_: 1.0)
    with pytest.raises(RuntimeError, match=r"differs from that with 1 where logits are 1 apart"):
        study.STUDY.main(small)
