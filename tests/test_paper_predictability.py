"""The study of predictability: its sources, its expectation, and the study itself."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench" / "paper"))
markov = importlib.import_module("markov")


@pytest.fixture
def source():
    return markov.MarkovSource.with_entropy(0.9, order=2, vocab=3, seed=1)


@pytest.mark.parametrize("bits", [0.1, 1.0, 1.9])
def test_a_source_has_the_entropy_that_it_was_asked_for(bits):
    source = markov.MarkovSource.with_entropy(bits, order=2, vocab=4, seed=0)
    symbols = source.sample(200, 2000, seed=1).astype(np.int64)
    state = 4 * symbols[:, :-2] + symbols[:, 1:-1]
    empirical = -np.log2(source.table[state, symbols[:, 2:]]).mean()
    assert empirical == pytest.approx(bits, rel=0.02)


def test_entropy_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"bits must be in \(0, 2\), got 2.5"):
        markov.MarkovSource.with_entropy(2.5, order=1, vocab=4, seed=0)


def test_the_law_of_a_later_symbol_is_that_of_samples(source):
    symbols = source.sample(400, 1000, seed=2).astype(np.int64)
    state = 3 * symbols[:, :-4] + symbols[:, 1:-3]
    later = symbols[:, 4:]  # head 2 of what the state predicts
    counts = np.zeros((9, 3))
    np.add.at(counts, (state.ravel(), later.ravel()), 1)
    assert np.abs(counts / counts.sum(1, keepdims=True) - source.ahead(2)).max() < 0.02


def simulate(source, heads, rule, steps, seed):
    """Speculative decoding, one symbol at a time: shares of forwards by accepted drafts."""
    rng = np.random.default_rng(seed)
    laws = [source.ahead(i) for i in range(heads)]
    vocab = source.vocab

    def draw(p):
        return int(rng.choice(vocab, p=p / p.sum()))

    state, counts = 0, np.zeros(heads - 1)
    emitted = draw(source.table[state])
    for _ in range(steps):
        drafts = [draw(laws[i][state]) for i in range(1, heads)]
        after = [int(source.next_state(state, emitted))]
        for draft in drafts:
            after.append(int(source.next_state(after[-1], draft)))
        p, q = [source.table[s] for s in after], [law[state] for law in laws[1:]]
        scale, ratio, kept = [1.0], 1.0, 0
        for i, draft in enumerate(drafts):
            ratio = min(1.0, ratio * p[i][draft] / q[i][draft])
            scale.append(ratio)
        if rule == "exact":
            scale = [1.0] * heads
            while kept < heads - 1 and rng.random() < p[kept][drafts[kept]] / q[kept][drafts[kept]]:
                kept += 1
        else:
            for i in range(1, heads):
                if i == heads - 1:
                    chance = scale[i]
                else:
                    z = np.maximum(scale[i] * p[i] - q[i], 0).sum()
                    chance = z / (z + 1 - scale[i]) if z + 1 - scale[i] > 0 else 1.0
                if rng.random() <= chance:
                    kept = i
        rest = p[kept] if kept == heads - 1 else np.maximum(scale[kept] * p[kept] - q[kept], 0)
        state, emitted = after[kept], draw(rest)
        counts[:kept] += 1
    return counts / steps


@pytest.mark.parametrize("rule", ["exact", "block"])
@pytest.mark.parametrize("heads", [2, 4])
def test_expected_acceptance_is_that_of_a_simulation(source, rule, heads):
    expected = markov.expected_acceptance(source, heads, rule)
    simulated = simulate(source, heads, rule, steps=20_000, seed=3)
    assert np.abs(simulated - expected).max() < 0.015
    assert (np.diff([1.0, *expected]) < 0).all()
    # Loose enough for chance, tight enough to tell the heads' law from the verifier's.
    assert expected[0] < 0.95


@pytest.mark.parametrize("rule", ["exact", "block"])
def test_expected_acceptance_is_that_of_the_op(source, rule):
    expected = markov.expected_acceptance(source, 4, rule)
    measured = markov.simulated_acceptance(source, 4, rule, sequences=1000, steps=40, seed=0)
    assert np.abs(measured - expected).max() < 0.015


def test_the_block_rule_is_expected_to_accept_more(source):
    token, block = (markov.expected_acceptance(source, 5, rule) for rule in ("exact", "block"))
    assert block.sum() > token.sum() + 0.01


def test_noise_and_certainty_are_accepted_whole():
    """What decides is how much the unknown symbol tells, not entropy."""
    uniform = markov.MarkovSource(1, np.full((3, 3), 1 / 3))
    assert markov.expected_acceptance(uniform, 4, "exact") == pytest.approx([1, 1, 1])
    # A cycle whose symbols are all but certain.
    cycle = markov.MarkovSource(1, np.roll(np.eye(3), 1, 1) * (1 - 3e-9) + 1e-9)
    assert markov.expected_acceptance(cycle, 4, "block") == pytest.approx([1, 1, 1], abs=1e-6)


def test_one_head_drafts_nothing(source):
    assert markov.expected_acceptance(source, 1, "exact").shape == (0,)


def test_an_unknown_rule_is_refused(source):
    with pytest.raises(ValueError, match='rule must be "exact" or "block", got \'typical\''):
        markov.expected_acceptance(source, 2, "typical")


def test_the_study_runs_from_end_to_end(monkeypatch, tmp_path):
    study = importlib.import_module("predictability")
    threads = torch.get_num_threads()
    for name, value in {
        "BITS": (0.3, 1.5),
        "TRAINED_BITS": (0.3,),
        "CASES": (("exact", 2), ("block", 4)),
        "SIMULATED_SEQUENCES": 500,
        "NEW_TOKENS": 12,
        "SEQUENCES": 4,
        "TRAINING": {**study.TRAINING, "batch_size": 2, "context": 16},
    }.items():
        monkeypatch.setattr(study, name, value)
    study.STUDY.main(["--budget", "0.01", "--seeds", "2", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    report = json.loads((tmp_path / "predictability.json").read_text())
    records = report["results"]["records"]
    assert len(records) == 2 * 2 * 2
    assert {r["bits"] for r in records if "trained" in r} == {0.3}
    assert all(1 <= r["trained"] <= r["heads"] for r in records if "trained" in r)
    table = study.rows(report)
    assert [len(row) for row in table] == [4] * 3
    assert "±" in table[1][1]
    assert (tmp_path / "predictability.png").read_bytes()[:4] == b"\x89PNG"


def test_the_study_refuses_to_report_what_it_did_not_expect(monkeypatch, tmp_path):
    study = importlib.import_module("predictability")
    monkeypatch.setattr(study, "BITS", (1.0,))
    monkeypatch.setattr(study, "expected_acceptance", lambda *_: np.array([0.5]))
    with pytest.raises(RuntimeError, match=r"tokens per forward where 1.500 are expected"):
        study.STUDY.main(["--budget", "0.01", "--seeds", "1", "--out", str(tmp_path)])
