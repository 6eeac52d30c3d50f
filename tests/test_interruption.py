"""Real `mtp-fast train` processes that are killed, and what resume makes of what they leave."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mtp_fast import cli
from mtp_fast.models import MTPConfig, MTPTransformer, save_checkpoint
from mtp_fast.training import StepMetrics, TrainConfig, Trainer, read_metrics

COMMAND = str(Path(sys.executable).with_name("mtp-fast"))
STEPS = 60
OPTIONS = (
    "--heads 3 --layers 5 --dim 32 --attention-heads 2 --ffn-dim 64 --max-seq-len 64 --context 32 "
    f"--batch-size 4 --steps {STEPS} --accumulation 2 --eval-every 10 --checkpoint-every 2 "
    "--dropout 0.1 --dropout-warmup 0.5 --head-weights 1,0.7,0.5 --head-weights-warmup 0.8"
).split()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_bytes(np.random.default_rng(0).integers(32, 127, 20_000).astype(np.uint8).tobytes())
    return file


def train(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [COMMAND, "train", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr


def kill_at(process: subprocess.Popen[str], directory: Path, step: int, delay: float) -> int:
    """Kill -9 `delay` seconds after `step` is logged; return how many steps were logged."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if len(read_metrics(directory)) >= step:
            break
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.communicate()
    assert process.returncode == -9, "the run ended before it was killed"
    return len(read_metrics(directory))


def without_clock(metrics: list[StepMetrics]) -> list[tuple[object, ...]]:
    return [(m.step, m.tokens, m.loss, m.validation_loss, m.grad_norm) for m in metrics]


@pytest.mark.slow
def test_ten_killed_runs_end_with_the_losses_of_a_whole_one(text, tmp_path):
    whole = tmp_path / "whole"
    finish(train(text, "--out", whole, *OPTIONS))
    expected = without_clock(read_metrics(whole))
    assert len(expected) == STEPS
    weights = (whole / "model.safetensors").read_bytes()
    rng, stops = random.Random(0), []
    for attempt in range(10):
        killed = tmp_path / str(attempt)
        # Steps take milliseconds: the delay spreads the kill over step, log and checkpoint.
        step, delay = rng.randrange(1, STEPS - 10), rng.random() * 0.03
        stops.append(kill_at(train(text, "--out", killed, *OPTIONS), killed, step, delay))
        finish(train("--resume", killed))
        assert without_clock(read_metrics(killed)) == expected, f"killed after step {stops[-1]}"
        assert (killed / "model.safetensors").read_bytes() == weights
        assert not list(killed.glob(".*")), "a half-written file was left"
    assert len(set(stops)) > 5


def snapshot(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def new_run(directory: Path, text: Path) -> None:
    options = "--heads 2 --layers 3 --dim 16 --attention-heads 2 --ffn-dim 16 --context 16"
    assert (
        cli.main(["train", str(text), "--out", str(directory), "--steps", "2", *options.split()])
        == 0
    )


def foreign_state(directory: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {}}, directory / "training_state.pt")


def other_model(directory: Path) -> None:
    save_checkpoint(MTPTransformer(MTPConfig(256, 32, 3, 2, 1, 2, 16, 64)), directory)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: truncate(d / "training_state.pt"), "training_state.pt is damaged"),
        (lambda d: truncate(d / "model.safetensors"), "model.safetensors is damaged"),
        (lambda d: truncate(d / "corpus.json"), "corpus.json is damaged"),
        (lambda d: truncate(d / "config.json"), "config.json"),
        (lambda d: (d / "training_state.pt").unlink(), "has no training_state.pt"),
        (lambda d: (d / "training_state.pt").write_bytes(b"PK\3\4 another's"), "is damaged"),
        (foreign_state, "training_state.pt is not of this version"),
        (other_model, "training_state.pt does not fit the model"),
    ],
)
def test_truncated_and_foreign_checkpoints_are_refused_and_kept(
    damage, message, text, tmp_path, capsys
):
    directory = tmp_path / "run"
    new_run(directory, text)
    damage(directory)
    before = snapshot(directory)
    capsys.readouterr()
    for line in (
        ["--resume", str(directory)],
        [str(text), "--out", str(directory), "--steps", "1"],
    ):
        assert cli.main(["train", *line]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert len(error) < 400
        assert (message if line[0] == "--resume" else "is in use") in error
    assert snapshot(directory) == before


def truncate(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def test_a_changed_corpus_is_refused(text, tmp_path, capsys):
    directory = tmp_path / "run"
    new_run(directory, text)
    with text.open("a") as file:
        file.write("more")
    assert cli.main(["train", "--resume", str(directory)]) == 2
    assert "was trained with train_tokens=19001, not" in capsys.readouterr().err


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    """A run leaves something to resume before its first step."""
    tokens = np.zeros(100, np.uint8)
    model = MTPTransformer(MTPConfig(256, 16, 3, 2, 1, 2, 16, 64))
    trainer = Trainer(model, TrainConfig(steps=2, context=16), tokens, tokens, tmp_path)

    def killed() -> None:
        raise KeyboardInterrupt

    trainer.train_step = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert Trainer.resume(tmp_path, tokens, tokens).step == 0
