"""The command line, as a user meets it: exit codes, one clear line, resume after Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mtp_fast
from mtp_fast import cli
from mtp_fast.models import MTPConfig, MTPTransformer, load_checkpoint, save_checkpoint
from mtp_fast.training import read_metrics

# The installed command: unlike `python -m`, it never imports from the current directory.
COMMAND = [str(Path(sys.executable).with_name("mtp-fast"))]
SHAPE = "--heads 2 --layers 3 --dim 16 --attention-heads 2 --ffn-dim 16 --max-seq-len 64"
LOOP = "--batch-size 2 --context 16 --eval-every 50"
OPTIONS = f"{SHAPE} {LOOP}".split()


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("def square(x):\n    return x * x\n" * 40)
    return file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "checkpoint"
    torch.manual_seed(0)
    save_checkpoint(MTPTransformer(MTPConfig(256, 16, 3, 2, 1, 2, 16, 64)), path)
    return path


def assert_one_clear_line(code: int, out: str, err: str, *words: str) -> None:
    assert code == 2
    assert err.count("\n") == 1, err
    assert "Traceback" not in out + err
    assert "error: " in err
    for word in words:
        assert word in err


# A process each is slow with torch to import: two go through a process, the rest through main().
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--out", "x", "--colour"], ["--colour"]),
        (["generate", "nowhere", "--prompt", "x"], ["nowhere is not a checkpoint"]),
    ],
)
def test_bad_input_through_a_process(arguments, words, tmp_path):
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert_one_clear_line(done.returncode, done.stdout, done.stderr, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["COMMAND"]),
        ("paint", ["paint"]),
        ("train TEXT --out NEW --steps 1 --heads 0", ["n_future_tokens", "got 0"]),
        ("train TEXT --out NEW --steps 1 --dim 15", ["dim must be", "dim=15"]),
        ("train TEXT --out NEW --steps x", ["--steps"]),
        ("train TEXT --out NEW --steps -1", ["steps must be positive, got -1"]),
        ("train TEXT --out NEW", ["--steps or --minutes"]),
        ("train TEXT --steps 1", ["--out"]),
        ("train --out NEW --steps 1", ["corpus is empty: no files"]),
        ("train EMPTY --out NEW --steps 1", ["corpus is empty"]),
        ("train MISSING --out NEW --steps 1", ["No such file", "missing.txt"]),
        ("train SHORT --out NEW --steps 1", ["fewer than one window"]),
        ("train TEXT --out USED --steps 1", ["is in use"]),
        ("train TEXT --out UNWRITABLE/a --steps 1 --context 16", ["UNWRITABLE"]),
        ("train TEXT --out NEW --steps 1 --head-weights 1,x", ["--head-weights", "'1,x'"]),
        ("train TEXT --out NEW --steps 1 --head-weights 1,1", ["for each of 4 heads, got 2"]),
        ("train TEXT --out NEW --steps 1 --head-dropout 1,0,0,0", ["head_dropout must be in"]),
        ("train TEXT --out NEW --steps 1 --device tpu", ["--device must be cpu or cuda"]),
        ("train --resume MISSING", ["cannot be resumed"]),
        ("train --resume CHECKPOINT", ["cannot be resumed"]),
        ("train TEXT --resume CHECKPOINT", ["give none"]),
        ("train --resume CHECKPOINT --steps 9 --seed 0", ["give no", "--steps", "--seed"]),
        ("demo --out UNWRITABLE/a", ["UNWRITABLE"]),
        ("demo --out NEW --minutes 0", ["minutes must be positive, got 0"]),
        ("generate CHECKPOINT --prompt x --heads 0", ["n_heads must be in [1, 2], got 0"]),
        ("generate CHECKPOINT --prompt x --heads 3", ["n_heads must be in [1, 2], got 3"]),
        ("generate CHECKPOINT --prompt-file TEXT", ["exceeds the model's context of 64"]),
        ("generate CHECKPOINT --prompt-file EMPTY", ["prompts[0]", "not empty"]),
        ("generate CHECKPOINT --prompt-file MISSING", ["missing.txt"]),
        ("generate CHECKPOINT", ["--prompt"]),
        ("generate CHECKPOINT --prompt x --prompt y --stream", ["--stream prints one", "got 2"]),
        ("generate CHECKPOINT --prompt x --max-new-tokens 8 --temperature -1", ["temperature"]),
        ("generate CHECKPOINT --prompt x --max-new-tokens 8 --top-p 1.5", ["top_p"]),
        ("generate RESHAPED --prompt x", ["does not hold the model of config.json"]),
        ("generate WORDS --prompt x", ["vocabulary of 300"]),
    ],
)
def test_bad_input(arguments, words, text, checkpoint, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("ab")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thing").touch()
    (tmp_path / "UNWRITABLE").touch()  # a file where a directory would have to be
    reshaped = tmp_path / "reshaped"
    save_checkpoint(load_checkpoint(checkpoint), reshaped)
    config = json.loads((reshaped / "config.json").read_text())
    (reshaped / "config.json").write_text(json.dumps({**config, "dim": 32}))
    save_checkpoint(MTPTransformer(MTPConfig(300, 16, 3, 2, 1, 2, 16, 64)), tmp_path / "words")
    places = {
        "TEXT": text,
        "CHECKPOINT": checkpoint,
        "EMPTY": tmp_path / "empty.txt",
        "SHORT": tmp_path / "short.txt",
        "MISSING": tmp_path / "missing.txt",
        "NEW": tmp_path / "new",
        "USED": tmp_path / "used",
        "UNWRITABLE/a": tmp_path / "UNWRITABLE" / "a",
        "RESHAPED": reshaped,
        "WORDS": tmp_path / "words",
    }
    line = [str(places.get(word, word)) for word in arguments.split()]
    try:
        code = cli.main(line)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert_one_clear_line(code, captured.out, captured.err, *words)
    assert not (tmp_path / "new").exists()


def test_a_missing_extra_is_named(monkeypatch, capsys, checkpoint):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert cli.main(["generate", str(checkpoint), "--prompt", "x"]) == 2
    assert "pip install 'mtp-fast[cli]'" in capsys.readouterr().err


def test_a_missing_extra_leaves_no_run(monkeypatch, capsys, text, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "mtp_fast.training.tensorboard", raising=False)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    line = ["train", str(text), "--out", str(tmp_path / "run"), "--tensorboard", str(tmp_path)]
    assert cli.main([*line, "--steps", "1"]) == 2
    assert "pip install 'mtp-fast[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_version_tells_the_build(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert mtp_fast.__version__ in capsys.readouterr().out


def test_train_then_generate(text, tmp_path, capsys):
    out = tmp_path / "run"
    line = ["train", str(text), "--out", str(out), "--steps", "3", *OPTIONS]
    assert cli.main([*line, "--tensorboard", str(tmp_path / "log")]) == 0
    assert list((tmp_path / "log").glob("events.out.tfevents.*"))
    assert str(out) in capsys.readouterr().out
    prompt = ["generate", str(out), "--prompt", "def ", "--max-new-tokens", "20"]
    outputs = []
    for extra in ([], ["--heads", "1"], ["--temperature", "1", "--seed", "4"]):
        assert cli.main([*prompt, *extra]) == 0
        captured = capsys.readouterr()
        assert captured.out.startswith("def ")
        assert "tokens per forward" in captured.err
        outputs.append(captured.out)
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]


def test_generate_takes_the_tokenizer_beside_a_checkpoint(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[UNK]", "one", "two", "three", "end"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    model = MTPTransformer(MTPConfig(5, 16, 3, 2, 1, 2, 16, 64))
    with torch.no_grad():  # the word after a word is the next one, whatever the context
        for parameter in [*model.trunk.parameters(), *model.heads.parameters()]:
            parameter.zero_()
        model.embedding.weight.copy_(torch.eye(5, 16))
        model.unembedding.weight.copy_(torch.eye(5, 16).roll(1, 0))
    model.save_pretrained(tmp_path)
    line = ["generate", str(tmp_path), "--prompt", "one two", "--max-new-tokens", "9"]
    assert cli.main(line) == 2
    assert "vocabulary of 5 and no tokenizer.json" in capsys.readouterr().err

    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert cli.main(line) == 0
    assert capsys.readouterr().out == "one two three end [UNK] one two three end [UNK] one\n"
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 0]}')
    assert cli.main(line) == 0
    assert capsys.readouterr().out == "one two three end\n"

    (tmp_path / "tokenizer.json").write_text("{}")
    assert cli.main(line) == 2
    assert "tokenizer.json is not a tokenizer" in capsys.readouterr().err


def test_several_prompts_and_streaming(checkpoint, capsys):
    command = ["generate", str(checkpoint), "--max-new-tokens", "9", "--prompt", "é = "]
    assert cli.main([*command, "--prompt", "def "]) == 0
    both = capsys.readouterr()
    assert "18 tokens" in both.err
    assert cli.main(command) == 0
    alone = capsys.readouterr().out
    assert both.out.startswith(alone)
    assert both.out[len(alone) :].startswith("def ")
    assert cli.main([*command, "--stream"]) == 0
    streamed = capsys.readouterr().out
    printable = lambda text: "".join(filter(str.isprintable, text))  # noqa: E731
    assert printable(streamed) == printable(alone)


def test_ctrl_c_saves_what_resume_continues(text, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [*COMMAND, "train", text, "--out", out, "--steps", "400", *OPTIONS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while len(read_metrics(out)) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stdout + stderr
    assert f"mtp-fast train --resume {out}" in stdout.replace("\n", " ")
    stopped = len(read_metrics(out))
    assert 5 <= stopped < 400

    done = run("train", "--resume", out)
    assert done.returncode == 0, done.stderr
    steps = [metrics.step for metrics in read_metrics(out)]
    assert steps == list(range(1, 401))
