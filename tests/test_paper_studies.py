"""The paper's studies: each runs from end to end, and its data are what it says they are."""

from __future__ import annotations

import importlib
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from torch import Tensor

from mtp_fast.decoding import generate
from mtp_fast.models import MTPConfig, MTPTransformer

PAPER = Path(__file__).parents[1] / "bench" / "paper"
# What makes a study small enough for a test.
TRAINING = {"batch_size": 2, "context": 32, "learning_rate": 3e-3, "eval_batches": 1}
SMALL = {
    "baseline": {"TRAINING": TRAINING, "HEADS": (1, 2)},
    "induction": {
        "TRAINING": TRAINING,
        "DIMS": (16, 32),
        "TRAINING_STORIES": 100,
        "TEST_STORIES": 5,
    },
    "arithmetic": {
        "TRAINING": TRAINING,
        "HEADS": (1, 2),
        "TRAINING_PROBLEMS": 500,
        "TEST_PROBLEMS": 10,
    },
    "ablation": {"TRAINING": TRAINING},
}


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(PAPER))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the studies do: processor time counts every thread's
    yield
    torch.set_num_threads(threads)


def test_tables_are_those_of_the_committed_results():
    study = importlib.import_module("study")
    text = study.README.read_text()
    assert study.rendered(text) == text
    for report in study.RESULTS.rglob("*.json"):
        name = report.relative_to(study.RESULTS).with_suffix("")
        assert f"<!-- {name} -->" in text, f"{name}.json has no table in README.md"


def test_rendering_replaces_what_was_there(monkeypatch, tmp_path):
    study, baseline = map(importlib.import_module, ("study", "baseline"))
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    record = {"history": [{"tokens": 1, "loss": [2.0, 2.25, 2.5, 2.5, 3, 3, 3, 3]}], "step_ms": 5.0}
    runs = [{"n": n, "seed": 0, **record} for n in baseline.HEADS]
    report = {
        "study": "baseline",
        "arguments": {"budget": 1, "seeds": 1, "threads": 2},
        "machine": {"date": "today", "cpu": "c", "torch": "t", "mtp_fast": "m"},
        "minutes": {"processor": 1.0},
        "results": {"runs": runs, "memory_mib": {str(n): 10 * n for n in baseline.HEADS}},
    }
    (tmp_path / "baseline.json").write_text(json.dumps(report))
    text = study.rendered("a\n<!-- baseline -->\nstale\n<!-- /baseline -->\nb")
    assert "stale" not in text
    assert text.startswith("a\n<!-- baseline -->")
    assert text.endswith("<!-- /baseline -->\nb")
    assert "| 2 | 2.000" in text
    assert "2 threads" in text
    assert study.rendered(text) == text
    (tmp_path / "longer").mkdir()
    (tmp_path / "baseline.json").rename(tmp_path / "longer" / "baseline.json")
    moved = "a\n<!-- longer/baseline -->\nstale\n<!-- /longer/baseline -->\nb"
    assert study.rendered(moved) == text.replace("baseline", "longer/baseline")


def test_mean_and_standard_error_over_seeds():
    study = importlib.import_module("study")
    records = [{"n": 1, "x": 1.0}, {"n": 1, "x": 3.0}, {"n": 2, "x": 5.0}]
    groups = study.over_seeds(records, ["n"], lambda r: r["x"])
    assert groups[1,] == (2.0, 1.0)
    assert groups[2,][0] == 5.0
    assert math.isnan(groups[2,][1])
    assert study.plus_minus(groups[1,], digits=1) == "2.0 ± 1.0"
    assert study.plus_minus(groups[2,], digits=1) == "5.0"


@pytest.mark.parametrize("name", SMALL)
def test_a_study_runs_from_end_to_end(name, monkeypatch, tmp_path):
    module = importlib.import_module(name)
    for variable, value in SMALL[name].items():
        monkeypatch.setattr(module, variable, value)
    report = module.STUDY.main(["--budget", "0.001", "--seeds", "2", "--out", str(tmp_path)])
    saved = json.loads((tmp_path / f"{name}.json").read_text())
    assert saved == json.loads(json.dumps(report))
    assert saved["machine"]["torch"] == torch.__version__
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    runs = saved["results"]["runs"]
    assert {run["seed"] for run in runs} == {0, 1}
    for run in runs:
        assert run["history"][-1]["tokens"] > run["history"][0]["tokens"]
        assert run["step_ms"] > 0
    assert len({run["steps"] for run in runs}) == 1
    assert len(module.rows(saved)) > 1


def test_training_keeps_to_the_budget():
    study = importlib.import_module("study")
    config = MTPConfig(16, 16, 2, 2, 1, 1, ffn_dim=16, max_seq_len=16)
    training = {"batch_size": 2, "context": 16, "eval_batches": 1}
    runs = [study.Run({"x": 0}, seed, config, training) for seed in (0, 1)]
    tokens = torch.randint(16, (1000,)).numpy().astype("uint8")
    before = time.process_time()
    with study.StudyProgress("test") as progress:
        one, two = study.train_all(runs, (tokens, tokens), 4.0, progress, lambda t: {"at": t.step})
    assert 1 < time.process_time() - before < 8
    assert one["steps"] == two["steps"] > 50
    assert one["history"][-1]["at"] == one["steps"]
    assert len(one["history"]) == 5


@pytest.fixture
def clock(monkeypatch):
    """Processor time as the test sets it."""
    study = importlib.import_module("study")
    time = SimpleNamespace(now=0.0)
    monkeypatch.setattr(study, "processor_time", lambda: time.now)
    return time


def test_training_fits_where_steps_take_a_tenth_more_than_measured(monkeypatch, clock):
    study = importlib.import_module("study")
    trained = study.Trainer.train_step
    steps = 0

    def train_step(trainer):
        nonlocal steps
        steps += 1
        clock.now += 1.0 if steps <= 4 else 1.1  # the first tell what a step costs
        return trained(trainer)

    def evaluate(_):
        clock.now += 2.0 if steps <= 4 else 2.2
        return {}

    monkeypatch.setattr(study.Trainer, "train_step", train_step)
    config = MTPConfig(16, 16, 2, 2, 1, 1, ffn_dim=16, max_seq_len=16)
    training = {"batch_size": 2, "context": 16, "eval_batches": 1}
    runs = [study.Run({"x": 0}, seed, config, training) for seed in (0, 1)]
    tokens = torch.randint(16, (1000,)).numpy().astype("uint8")
    with study.StudyProgress("test") as progress:
        study.train_all(runs, (tokens, tokens), 200.0, progress, evaluate)
    assert 180 < clock.now <= 200


@pytest.mark.parametrize(("seconds", "least", "count"), [(100, 1, 7), (1, 1, 1), (20, 3, 3)])
def test_repeats_fit_where_each_takes_a_tenth_more(clock, seconds, least, count):
    study = importlib.import_module("study")
    done = []
    for repeat in study.repeats(seconds, least):
        clock.now += 10 * 1.1**repeat
        done.append(repeat)
    assert done == list(range(count))


def test_processor_time_counts_processes_that_have_ended():
    study = importlib.import_module("study")
    before = study.processor_time()
    work = "import time\nwhile time.process_time() < 0.5: pass"
    subprocess.run([sys.executable, "-c", work], check=True)
    assert 0.5 < study.processor_time() - before < 5


# Induction.


def test_held_out_names_never_occur_in_training():
    stories = importlib.import_module("stories")
    training, held_out = stories.split_names()
    assert not set(training) & set(held_out)
    assert len({*training, *held_out}) == stories.N_PARTS**2
    for names in (training, held_out):
        rng, told = random.Random(0), set()
        for _ in range(200):
            tokens = stories.story(names, rng).tokens
            assert all(0 <= token < stories.VOCAB_SIZE for token in tokens)
            parts = [token >= stories.FIRST_PART for token in tokens]
            places = [i for i in range(1, len(tokens)) if parts[i - 1] and parts[i]]
            told |= {(tokens[i - 1], tokens[i]) for i in places}
        assert len(told) > 80
        assert told <= set(names)


def test_mentions_are_where_names_are_and_the_first_of_each_is_new():
    stories = importlib.import_module("stories")
    rng = random.Random(0)
    for _ in range(100):
        tale = stories.story(stories.split_names()[0], rng)
        assert tale.names[0][0] != tale.names[1][0]  # or the first part would not tell the second
        seen = set()
        for position, again in tale.mentions:
            name = tuple(tale.tokens[position - 1 : position + 1])
            assert name in tale.names
            assert again == (name in seen)
            seen.add(name)
        assert seen == set(tale.names)
        assert 2 * len(tale.mentions) == sum(t >= stories.FIRST_PART for t in tale.tokens)


class Oracle:
    """A model that knows the next token, and is wrong where `flaw` is 1."""

    def __init__(self, vocab_size: int, flaw: Tensor) -> None:
        self.vocab_size, self.flaw = vocab_size, flaw

    def logits(self, tokens: Tensor) -> Tensor:
        following = tokens.roll(-1, 1)
        return F.one_hot((following + self.flaw) % self.vocab_size, self.vocab_size).float()


def test_the_test_of_names_judges_second_parts_alone():
    induction = importlib.import_module("induction")
    test = induction.NameTest(20)
    flaw = torch.ones_like(test.tokens)
    flaw[test.story, test.position - 1] = 0  # right about second parts, and about nothing else
    trainer = SimpleNamespace(model=Oracle(induction.VOCAB_SIZE, flaw))
    assert test(trainer) == {"accuracy": 1.0, "new": 1.0}
    again = test.again.bool()
    flaw[test.story[again][:30], test.position[again][:30] - 1] = 1
    expected = 1 - 30 / int(again.sum())
    assert test(trainer) == {"accuracy": pytest.approx(expected), "new": 1.0}


# Arithmetic.


def value_by_expansion(tokens: list[int], degree: int) -> list[int]:
    """Value of an expression: whole polynomials over the integers, reduced at every operation."""
    p = importlib.import_module("polynomials")

    def product(a: list[int], b: list[int]) -> list[int]:
        out = [0] * (len(a) + len(b) - 1)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                out[i + j] += x * y
        return out

    def parse(at: int) -> tuple[list[int], int]:
        if tokens[at] < p.FIRST_OPERATION:
            return [t - p.FIRST_DIGIT for t in tokens[at : at + degree]], at + degree
        symbol = p.OPERATIONS[tokens[at] - p.FIRST_OPERATION]
        a, at = parse(at + 1)
        if symbol == "-":
            return [(7 - x) % 7 for x in a], at
        b, at = parse(at)
        if symbol == "+":
            whole = [x + y for x, y in zip(a, b, strict=True)]
        elif symbol == "*":
            whole = product(a, b)
        else:  # sum of a_i b^i
            power, whole = [1], [0] * (degree * degree)
            for coefficient in a:
                for i, x in enumerate(power):
                    whole[i] += coefficient * x
                power = product(power, b)
        return [x % 7 for x in whole[:degree]], at

    value, end = parse(0)
    assert end == len(tokens)
    return value


@pytest.mark.parametrize("degree", [1, 2, 5])
def test_expressions_have_their_value_and_number_of_operations(degree):
    p = importlib.import_module("polynomials")
    rng = random.Random(degree)
    for operations in range(8):
        for _ in range(50):
            tokens, value = p.expression(operations, degree, rng)
            assert sum(t >= p.FIRST_OPERATION for t in tokens) == operations
            assert list(value) == value_by_expansion(tokens, degree)


def test_composition_puts_the_second_for_x_in_the_first():
    p = importlib.import_module("polynomials")
    x, f, g = (0, 1, 0), (3, 0, 2), (1, 5, 0)
    assert p.compose(x, g) == g
    assert p.compose(f, x) == f
    assert p.compose(f, g) == (5, 6, 1)  # 3 + 2 (1 + 5 X)^2 = 5 + 20 X + 50 X^2


def test_operations_coefficients_and_sizes_are_uniform():
    p = importlib.import_module("polynomials")
    rng = random.Random(0)
    expressions = [p.expression(3, 2, rng)[0] for _ in range(4000)]
    roots = [e[0] - p.FIRST_OPERATION for e in expressions]
    assert chisquare([roots.count(i) for i in range(4)]).pvalue > 1e-4
    digits = [t - p.FIRST_DIGIT for e in expressions for t in e if t < p.FIRST_OPERATION]
    assert chisquare([digits.count(i) for i in range(7)]).pvalue > 1e-4
    # Of three operations one is the root: its left operand has 0, 1 or 2 of the others.
    sums = [e for e, root in zip(expressions, roots, strict=True) if p.OPERATIONS[root] == "+"]
    leaf_left = sum(e[1] < p.FIRST_OPERATION for e in sums)
    assert (
        chisquare([leaf_left, len(sums) - leaf_left], [len(sums) / 3, 2 * len(sums) / 3])[1] > 1e-4
    )


def test_problems_end_in_pauses_and_the_answer():
    p = importlib.import_module("polynomials")
    question, answer = p.problem(2, 5, 3, random.Random(0))
    assert question[-4:] == [p.EQUALS, p.PAUSE, p.PAUSE, p.PAUSE]
    assert [t - p.FIRST_DIGIT for t in answer] == value_by_expansion(question[:-4], 5)


def test_a_problem_is_solved_if_greedy_decoding_gives_its_answer():
    arithmetic = importlib.import_module("arithmetic")
    test = arithmetic.ProblemTest(operations=2, degree=1, pauses=1, n_problems=60)
    model = MTPTransformer(
        MTPConfig(arithmetic.VOCAB_SIZE, 32, 2, 2, 1, 1, ffn_dim=32, max_seq_len=32)
    ).eval()
    with torch.no_grad():
        model.unembedding.weight[[0, 1, 2, *range(10, 14)]] *= 0.1  # a guess among the digits
    shares = test(SimpleNamespace(model=model))["solved"]
    for share, (tokens, places) in zip(shares, test.groups, strict=True):
        prompts = [row[: place[0]] for row, place in zip(tokens, places, strict=True)]
        answers = [r.tolist() for r in generate(model, prompts, max_new_tokens=1).tokens]
        right = [a == tokens[i, places[i]].tolist() for i, a in enumerate(answers)]
        assert share == pytest.approx(sum(right) / 60)
    assert 0 < sum(shares) < 2
    flawless = Oracle(arithmetic.VOCAB_SIZE, torch.tensor(0))
    assert test(SimpleNamespace(model=flawless))["solved"] == [1.0, 1.0]
