"""Products of a few rows with a large bfloat16 weight, as a decode step on a CPU has them.

Bound: one read of the weight, here torch's maximum of the same bytes taken as int16, on all
threads.

    pytest bench/bench_few_row_linear.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from harness import DEVICE, MODELS, QUICK_MODELS, Comparison, agreeing
from mtp_fast.ops.few_row_linear import few_row_linear

ROWS = (1, 4, 8)


def comparison(rows: int, vocab: int, dim: int) -> Comparison:
    """The unembedding of `rows` hidden states, as float32 logits."""
    torch.manual_seed(0)
    x = torch.randn(rows, dim).bfloat16()
    weight = torch.randn(vocab, dim).mul_(dim**-0.5).bfloat16()
    runs = {
        "bound": lambda: weight.view(torch.int16).amax(-1),
        "ours": lambda: few_row_linear(x, weight),
        "eager": lambda: F.linear(x, weight).float(),
    }
    return agreeing(runs, [x.float() @ weight.float().T], [5e-3])


@pytest.mark.skipif(DEVICE != "cpu", reason="for CPUs")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("competitor", ["bound", "ours", "eager"])
def test_few_row_linear(compare: Any, quick: bool, competitor: str, model: str, rows: int) -> None:
    if quick and model not in QUICK_MODELS:
        pytest.skip("not quick")
    vocab, dim = MODELS[model]
    group = f"few_row_linear, {rows} x {dim} x {vocab} ({model})"
    compare(group, competitor, lambda: comparison(rows, vocab, dim), vocab=vocab)
