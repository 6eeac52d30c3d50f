"""The examples, run as they stand."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_huggingface_llama_trains_to_the_same_losses() -> None:
    pytest.importorskip("transformers")
    pairs = runpy.run_path(str(EXAMPLES / "huggingface_llama.py"))["main"](20)
    assert len(pairs) == 20
    for own, fused in pairs:
        assert fused == pytest.approx(own, abs=1e-4)
    assert pairs[-1][0] < pairs[0][0] - 0.2  # it trained
