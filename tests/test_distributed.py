"""Data-parallel training with two processes of torchrun: gradients, the loop, stop and resume.

Run as a script under torchrun, this file is the process whose gradients the first test compares,
or `mtp-fast` with the arguments given.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mtp_fast.cli import main
from mtp_fast.models import MTPConfig, MTPTransformer, load_checkpoint
from mtp_fast.training import MultiTokenLoss, multi_token_loss, read_metrics
from mtp_fast.training.distributed import torchrun_group

CONFIG = MTPConfig(
    vocab_size=256,
    dim=32,
    n_layers=4,
    n_attention_heads=2,
    n_kv_heads=1,
    n_future_tokens=3,
    ffn_dim=64,
    max_seq_len=64,
)
SCRIPT = Path(sys.executable).with_name("mtp-fast")
SHAPE = "--heads 2 --layers 3 --dim 16 --attention-heads 2 --ffn-dim 16 --max-seq-len 64"
LOOP = "--context 16 --batch-size 2 --eval-every 4 --checkpoint-every 3 --dropout 0.1"
OPTIONS = f"{SHAPE} {LOOP} --precision float32".split()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(script: object, *arguments: object) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*launcher, str(script), *map(str, arguments)]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=ENVIRONMENT,
    )


def compare_gradients() -> None:
    """Two micro-batches in each of two processes, against all of them in one."""
    for route in ("parallel", "headwise"):
        for tied in (False, True):
            torch.manual_seed(0)
            config = MTPConfig(**{**vars(CONFIG), "tie_embeddings": tied})
            model, single = MTPTransformer(config), MTPTransformer(config)
            single.load_state_dict(model.state_dict())
            tokens = torch.randint(0, 256, (2, dist.get_world_size(), 2, 20))
            mine = tokens[:, dist.get_rank()]
            weights = [1.0, 0.5, 0.25]

            multi_token_loss(single, tokens.flatten(0, 2), head_weights=weights).backward()
            parallel = DistributedDataParallel(MultiTokenLoss(model, route))
            with parallel.no_sync():
                (parallel(mine[0], weights)[0] / 2).backward()
            (parallel(mine[1], weights)[0] / 2).backward()

            for (name, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-6, msg=f"{route} {name}")
    print(f"gradients agree in process {dist.get_rank()}")


def script(arguments: list[str]) -> int:
    code = 0
    if arguments:
        code = main(arguments)
    else:
        with torchrun_group(torch.device("cpu")):
            compare_gradients()
    # Those that are left when the interpreter ends may abort the process.
    threads = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], threads
    return code


def test_gradients_are_those_of_one_process_on_the_joined_batch():
    done = run(*torchrun(__file__))
    assert done.returncode == 0, done.stderr
    assert "gradients agree in process 0" in done.stdout
    assert "gradients agree in process 1" in done.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("def square(x):\n    return x * x\n" * 40)
    return file


def test_two_processes_train_as_one_that_accumulates(text, tmp_path):
    """Windows and dropout masks are numbered through the processes."""
    one, two = tmp_path / "one", tmp_path / "two"
    steps = ["--steps", 8, *OPTIONS]
    done = run(*torchrun(__file__, "train", text, "--out", two, *steps))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoint: ") == 1  # only one process reports
    done = run(SCRIPT, "train", text, "--out", one, *steps, "--accumulation", 2)
    assert done.returncode == 0, done.stderr
    a, b = read_metrics(one), read_metrics(two)
    assert [m.step for m in b] == [*range(1, 9)]
    for x, y in zip(a, b, strict=True):
        assert x.tokens == y.tokens
        assert x.loss == pytest.approx(y.loss, rel=1e-5)
        assert x.grad_norm == pytest.approx(y.grad_norm, rel=1e-4)
        assert (x.validation_loss is None) == (y.validation_loss is None)
    assert a[-1].validation_loss == pytest.approx(b[-1].validation_loss, rel=1e-5)
    models = [load_checkpoint(path).state_dict() for path in (one, two)]
    for name, weight in models[0].items():
        torch.testing.assert_close(models[1][name], weight, rtol=1e-4, atol=1e-5)

    refused = run(SCRIPT, "train", "--resume", two)
    assert refused.returncode == 2
    assert "was trained with processes=2, not 1" in refused.stderr


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_resume_continues(text, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    steps = ["--steps", 300, *OPTIONS]
    assert run(*torchrun(SCRIPT, "train", text, "--out", whole, *steps)).returncode == 0
    process = subprocess.Popen(
        torchrun(SCRIPT, "train", text, "--out", stopped, *steps),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    deadline = time.monotonic() + 120
    while len(read_metrics(stopped)) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [c for c in children if b"mtp-fast" in Path(f"/proc/{c}/cmdline").read_bytes()]
    os.kill(int(workers[-1]), signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert f"mtp-fast train --resume {stopped}" in stdout.replace("\n", " "), stderr
    assert 5 <= len(read_metrics(stopped)) < 300

    done = run(*torchrun(SCRIPT, "train", "--resume", stopped))
    assert done.returncode == 0, done.stderr
    assert [m.loss for m in read_metrics(stopped)] == [m.loss for m in read_metrics(whole)]


if __name__ == "__main__":
    sys.exit(script(sys.argv[1:]))
