"""The checkpoint inside the package: what it is, that it decodes, what its drafts are worth."""

from __future__ import annotations

import subprocess
import sys

import torch
from safetensors.torch import load_file

from bench_decoding import shipped
from mtp_fast.cli import SHIPPED_CHECKPOINT
from mtp_fast.models import load_checkpoint


def test_it_is_small_and_has_8_heads():
    weights = SHIPPED_CHECKPOINT / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}
    config = load_checkpoint(SHIPPED_CHECKPOINT).config
    assert (config.n_future_tokens, config.vocab_size) == (8, 256)


def test_generate_takes_it_by_default(tmp_path):
    command = [sys.executable, "-m", "mtp_fast.cli", "generate", "--max-new-tokens", "120"]
    runs = [
        subprocess.run(
            [*command, "--prompt", "def ", "--heads", heads],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        for heads in ("8", "1")
    ]
    texts = [run.stdout for run in runs]
    assert texts[0].startswith("def ")
    assert "(" in texts[0]
    assert texts[0] == texts[1]
    rates = [float(run.stderr.split()[-4]) for run in runs]
    assert rates[1] == 1.0
    assert rates[0] > 1.5


def test_tokens_per_forward_on_held_out_files():
    rates = {run["heads"]: run["tokens_per_forward"] for run in shipped([1, 4, 8])["runs"]}
    assert rates[1] == 1.0
    assert rates[4] >= 2.3
    assert rates[8] >= 3.0
