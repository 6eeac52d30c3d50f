"""`mtp-fast train` from pretrained models and with its options, as a user runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mtp_fast import cli
from mtp_fast.models import MTPConfig, MTPTransformer, save_checkpoint
from mtp_fast.training import prepare, read_metrics

COMMAND = Path(sys.executable).with_name("mtp-fast")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
BYTES = MTPConfig(256, 16, 4, 2, 1, 2, 24, 64)
LOOP = ["--batch-size", 2, "--context", 16]


def run(*arguments: object) -> str:
    """Run the installed command to its end and return what it printed."""
    done = subprocess.run(
        [COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def main(*arguments: object) -> int:
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def new_tokenizer(file: Path, *merged: str) -> Path:
    """A tokenizer of bytes, an end of text, and `merged` pairs of letters."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end_of_text|>", *merged]
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(pair) for pair in merged]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(file))
    return file


def new_llama(directory: Path, vocab_size: int) -> Path:
    """A model of transformers as it would be downloaded: bfloat16, and a tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=256,
        dtype="bfloat16",
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    new_tokenizer(directory / "tokenizer.json", "de", "re")
    return directory


@pytest.fixture
def files(tmp_path) -> list[Path]:
    paths = [tmp_path / f"{i}.txt" for i in range(4)]
    for i, path in enumerate(paths):
        path.write_text(f"def square_{i}(x):\n    return x * x\n" * 20)
    return paths


def logits(model: MTPTransformer) -> list[torch.Tensor]:
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        return [model.eval().logits(tokens, k) for k in range(len(model.heads))]


def test_heads_are_added_to_a_model_that_does_not_change(files, tmp_path):
    """Prepare, train, Ctrl-C, resume and generate, each a process of its own."""
    llama, corpus, out = new_llama(tmp_path / "llama", 260), tmp_path / "corpus", tmp_path / "run"
    run("prepare", *files, "--tokenizer", llama / "tokenizer.json", "--out", corpus)
    options = ["--heads", 3, "--freeze-next-token-model", "--learning-rate", 0.01, *LOOP]
    steps = ["--steps", 150, "--eval-every", 50]
    process = subprocess.Popen(
        [*map(str, [COMMAND, "train", corpus, "--from", llama, "--out", out, *options, *steps])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    deadline = time.monotonic() + 120
    while len(read_metrics(out)) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert len(read_metrics(out)) < 150
    run("train", "--resume", out)
    assert len(read_metrics(out)) == 150

    before = logits(MTPTransformer.from_pretrained(llama, 3))
    after = logits(MTPTransformer.from_pretrained(out))
    assert torch.equal(before[0], after[0])
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(before[1:], after[1:], strict=True))
    metrics = read_metrics(out)
    assert metrics[-1].validation_loss[1] < metrics[0].loss[1] - 0.1

    assert (out / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    printed = [
        run("generate", model, "--prompt", "def ", "--max-new-tokens", 8) for model in (llama, out)
    ]
    assert printed[0] == printed[1]


@pytest.mark.parametrize("layout", ["ours", "huggingface", "meta"])
@pytest.mark.parametrize("heads", [None, 1, 3])
def test_every_layout_is_a_start(layout, heads, files, tmp_path):
    source, out = tmp_path / "source", tmp_path / "run"
    model = MTPTransformer(BYTES)
    if layout == "ours":
        save_checkpoint(model, source)
    else:
        model.save_pretrained(source, layout)
    options = ["--max-seq-len", 48, *([] if heads is None else ["--heads", heads])]
    # The first step has a learning rate of 0.
    assert main("train", *files, "--from", source, "--out", out, *options, *LOOP, "--steps", 1) == 0
    trained, expected = (
        MTPTransformer.from_pretrained(out),
        MTPTransformer.from_pretrained(source, heads, max_seq_len=48),
    )
    assert trained.config == expected.config
    assert trained.config.n_future_tokens == (heads or 2)
    weights = trained.state_dict()
    for name, weight in expected.state_dict().items():
        assert torch.equal(weights[name], weight), name
    assert not (out / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("FILE --from BYTES --dim 32 --layers 3", "--from {BYTES} has a shape of its own; give no"),
        ("FILE --from BYTES --dropout 0.1", "give no --dropout"),
        ("FILE --from MISSING", "{MISSING} is not a checkpoint"),
        (
            "FILE --from BYTES --heads 1 --freeze-next-token-model --context 9",
            "the model has one head",
        ),
        ("FILE --freeze-next-token-model", "goes with --from"),
        ("FILE --from BYTES --context 65", "context=65 exceeds"),
        ("FILE --from WORDS", "a vocabulary of 260 and no tokenizer.json; without one a corpus is"),
        ("FILE --from LLAMA", "the corpus was not made with {LLAMA}/tokenizer.json"),
        ("OTHER --from LLAMA", "the corpus was not made with {LLAMA}/tokenizer.json"),
        (
            "CORPUS --from BYTES",
            "the corpus has a vocabulary of 259, the model in {BYTES} one of 256",
        ),
        ("FILE --learning-rate 1e-5", "final_learning_rate must be in [0, learning_rate=1e-05]"),
    ],
)
def test_refused_in_one_line(arguments, message, files, tmp_path, capsys):
    places = {"FILE": files[0], "MISSING": tmp_path / "missing"}
    for name in ("BYTES", "WORDS", "LLAMA", "CORPUS", "OTHER"):
        places[name] = tmp_path / name
    save_checkpoint(MTPTransformer(BYTES), places["BYTES"])
    save_checkpoint(MTPTransformer(MTPConfig(260, 16, 4, 2, 1, 2, 24, 64)), places["WORDS"])
    new_llama(places["LLAMA"], 260)
    prepare(files, places["CORPUS"], tokenizer=places["LLAMA"] / "tokenizer.json")
    prepare(files, places["OTHER"], tokenizer=new_tokenizer(tmp_path / "other", "er", "de"))
    line = [places.get(word, word) for word in arguments.split()]
    capsys.readouterr()
    assert main("train", *line, "--out", tmp_path / "run", "--steps", 1) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message.format(**places) in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["text", "prepared"])
def test_options_reach_the_run(kind, files, tmp_path):
    corpus, separator = files, 0
    if kind == "prepared":
        tokenizer = new_tokenizer(tmp_path / "tokenizer.json", "de", "re")
        corpus = [tmp_path / "corpus"]
        separator = prepare(files, corpus[0], tokenizer=tokenizer).separator
        assert separator == 256
    values = {"learning_rate": 0.01, "final_learning_rate": 0.002, "warmup": 0.5, "grad_clip": 2.0}
    options = [word for name, x in values.items() for word in (f"--{name.replace('_', '-')}", x)]
    shape = ["--heads", 2, "--layers", 3, "--dim", 16, "--attention-heads", 2, "--ffn-dim", 16]
    for flags in ([], ["--document-boundaries", "--route", "headwise", "--seed", 3]):
        out = tmp_path / f"run{len(flags)}"
        line = [*corpus, "--out", out, "--steps", 1, *LOOP, *shape, *options, *flags]
        assert main("train", *line) == 0
        config = torch.load(out / "training_state.pt")["config"]
        assert {name: config[name] for name in values} == values
        assert config["separator"] == (separator if flags else None)
        assert (config["route"], config["seed"]) == (("headwise", 3) if flags else ("parallel", 0))
