"""The study of scale: its counts against what they count, and the study itself."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mtp_fast.models import MTPConfig, MTPTransformer

sys.path.append(str(Path(__file__).parents[1] / "bench" / "paper"))
cost = importlib.import_module("cost_model")
scale = importlib.import_module("scale")

SHAPE = MTPConfig(96, 64, 6, 4, 2, 3, ffn_dim=80, max_seq_len=1024)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_model(tied):
    shape = dataclasses.replace(SHAPE, tie_embeddings=tied)
    assert cost.parameters(shape) == sum(p.numel() for p in MTPTransformer(shape).parameters())


def test_heads_at_equal_parameters_cost_their_unembeddings():
    one = dataclasses.replace(SHAPE, n_future_tokens=1)
    assert cost.parameters(one) == cost.parameters(SHAPE)
    more = cost.training_flops(SHAPE, 10) - cost.training_flops(one, 10)
    assert more == 2 * 6 * 10 * 96 * 64


@pytest.mark.parametrize("heads", [1, 3])
def test_decode_flops_are_those_of_the_layers(heads):
    """The same step, run as plain products; attention by hand, since torch counts none of it."""
    batch, context = 2, 50
    model, rows = MTPTransformer(SHAPE), batch * heads
    full, one = torch.zeros(rows, 64), torch.zeros(batch, 64)
    with FlopCounterMode(display=False) as counter:
        for block in [*model.trunk.blocks, model.heads[0]]:
            block.attention.out(full @ block.attention.qkv.weight[:64])
            full @ block.attention.qkv.weight[64:].T  # keys and values
            block.ffn(full)
        for block in model.heads[1:heads]:
            full @ block.attention.qkv.weight[64:].T
            block.attention.out(one @ block.attention.qkv.weight[:64])
            block.ffn(one)
            model.unembedding(one)
        model.unembedding(full)
    attention = 4 * context * 64 * (4 * rows + (heads - 1) * batch)
    counted = counter.get_total_flops() + attention
    assert cost.decode_flops(SHAPE, heads, batch, context) == counted


def test_decode_bytes_are_those_of_the_weights_and_the_cache():
    model = MTPTransformer(SHAPE)
    used = [*model.trunk.blocks, *model.heads[:2]]
    weights = sum(p.numel() for block in used for p in block.parameters() if p.ndim == 2)
    assert cost.decode_weights(SHAPE, 2) == weights + 96 * 64
    cache = 5 * 7 * 2 * 2 * 16  # layers, positions, keys and values, heads, width
    assert cost.kv_cache(SHAPE, 2, 7, 1) == cache
    assert cost.decode_bytes(SHAPE, 2, 3, 7, 4) == 4 * (weights + 2 * 96 * 64 + 3 * cache)


def test_a_step_takes_between_the_longer_of_both_and_their_sum():
    flops, moved = cost.decode_flops(SHAPE, 2, 1, 8), cost.decode_bytes(SHAPE, 2, 1, 8)
    for device in (cost.Device(1.0, 1e30, 1.0), cost.Device(1e30, 1.0, 1.0)):
        slower = flops if device.flops == 1.0 else moved
        assert cost.decode_seconds(SHAPE, 2, 1, 8, device) == pytest.approx((slower, slower))
    both = cost.decode_seconds(SHAPE, 2, 1, 8, cost.Device(1.0, 1.0, 1.0))
    assert both == (max(flops, moved), flops + moved)


@pytest.mark.parametrize(
    ("measured", "off", "holds"), [(1.5, 1.0, True), (0.95, 0.95, True), (2.5, 1.25, False)]
)
def test_a_check_compares_with_the_nearest_value_that_is_predicted(measured, off, holds):
    check = scale.Check("time", (1.0, 2.0), measured, 0.1)
    assert check.off == pytest.approx(off)
    assert check.holds == holds


def test_memory_of_the_logits_grows_with_heads_in_eager_alone():
    def logits(n, route):
        shape = dataclasses.replace(scale.SIZES["7B"], n_future_tokens=n)
        return cost.training_memory(shape, 4096, route, 2)["logits"]

    assert logits(8, "eager") - logits(4, "eager") == 4 * 4 * 4096 * 32_000
    assert logits(8, "headwise") == logits(4, "headwise")
    # The buffer is what it was; d(hidden) of four more heads comes.
    assert logits(8, "parallel") - logits(4, "parallel") == 4 * 2 * 4096 * 4096
    with pytest.raises(ValueError, match=r"route must be one of .*, got 'all'"):
        logits(1, "all")


def test_traffic_is_that_of_three_passes_over_the_parameters():
    one = dataclasses.replace(SHAPE, n_future_tokens=1)
    assert cost.communication(one, 2, "headwise") == 3 * cost.parameters(SHAPE)
    assert cost.communication(SHAPE, 2, "headwise") == 3 * cost.parameters(SHAPE) + 2 * 96 * 64


def test_a_step_takes_what_blocks_and_losses_take():
    losses = 3 * SHAPE.n_future_tokens * 2 * scale.TOKENS[1] * SHAPE.vocab_size * SHAPE.dim
    everything = cost.training_flops(SHAPE, scale.TOKENS[1], causal=False)
    blocks, losses = (scale.TOKENS[0] * flops for flops in (everything - losses, losses))
    assert scale.training_seconds(SHAPE, 1.0, 0.0) == blocks
    assert scale.training_seconds(SHAPE, 0.0, 1.0) == losses
    assert scale.training_seconds(SHAPE, 2.0, 3.0) == 2 * blocks + 3 * losses


def test_a_page_count_sees_the_weights_that_a_step_reads(tmp_path):
    # A process of its own: the pages of what earlier tests left behind count too.
    counts = """if True:
        import sys
        sys.path[:0] = sys.argv[1:]
        import scale
        model = scale.MTPTransformer(scale.MTPConfig(256, 512, 9, 4, 4, 8, 1408, 64)).eval()
        print(scale.cost.block_weights(model.config))
        print(*(scale.referenced_bytes(model, heads) for heads in (1, 8)))
    """
    command = [sys.executable, "-c", counts, str(Path(scale.__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    block, one, all_heads = map(int, done.stdout.split())
    assert one > 2 * 4 * block
    assert 6 * block < all_heads - one < 2 * 7 * block  # 7 drafting heads: int8


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Shapes that take a second, and tolerances that times of nothing need."""
    shape = dataclasses.replace(SHAPE, n_layers=9, n_future_tokens=1)
    for name, value in {
        "TRAINED": {"bytes": shape, "V = 512": dataclasses.replace(shape, vocab_size=512)},
        "WORDS": dataclasses.replace(shape, vocab_size=512),
        "PRODUCT": 64,
        "DECODER": dataclasses.replace(shape, n_future_tokens=8),
        "TOKENS": (1, 32),
        "COUNTED": 0.3,
        "HELD": 100.0,
        "TIMED": 100.0,
    }.items():
        monkeypatch.setattr(scale, name, value)
    return ["--budget", "0.001", "--out", str(tmp_path)]


def test_the_study_runs_from_end_to_end(small, tmp_path):
    threads = torch.get_num_threads()
    scale.STUDY.main(small)
    torch.set_num_threads(threads)
    report = json.loads((tmp_path / "scale.json").read_text())
    checks, predictions = report["results"]["checks"], report["results"]["predictions"]
    assert len(checks) == 3 + 9 + 3 + 6
    assert all(
        check["measured"] > 0 for check in checks if "weights a step" not in check["quantity"]
    )
    flops = [check for check in checks if "GFLOPs" in check["quantity"]]
    assert all(check["off"] == pytest.approx(1, rel=0.3) for check in flops)
    assert [(p["size"], p["n"]) for p in predictions][:4] == [
        ("7B", 1),
        ("7B", 4),
        ("7B", 8),
        ("13B", 1),
    ]
    assert predictions[0]["parameters"] == pytest.approx(6.74e9, rel=1e-3)
    text = scale.STUDY.text(report)
    assert "measured / predicted" in text
    assert "70B, n = 8" in text
    assert (tmp_path / "scale.png").read_bytes()[:4] == b"\x89PNG"


def test_the_study_fails_where_the_model_is_off(small, monkeypatch):
    monkeypatch.setattr(scale, "COUNTED", 1e-9)
    with pytest.raises(RuntimeError, match=r"the model is off:(.|\n)*GFLOPs.*\(off\)"):
        scale.STUDY.main(small)
