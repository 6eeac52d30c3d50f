"""Meta's multi-token layout, against an independent forward in that layout's own terms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_fast.decoding import generate
from mtp_fast.models import MTPConfig, MTPTransformer

PARAMS = {
    "dim": 48,
    "n_layers": 5,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": -1,
    "multiple_of": 32,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
    "rope_theta": 5e4,
    "n_future_tokens": 3,
}
FFN_DIM, VOCAB, HEAD_DIM = 192, 61, 12


def random_weights() -> dict[str, Tensor]:
    """A state dict with `layers` 0, 1 (trunk) and 2 (head 0), and `extra_heads` 0 and 1."""
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (VOCAB, 48),
        "norm.weight": (48,),
        "output.weight": (VOCAB, 48),
    }
    for block in ("layers.0", "layers.1", "layers.2", "extra_heads.0", "extra_heads.1"):
        shapes |= {
            f"{block}.attention.wq.weight": (48, 48),
            f"{block}.attention.wk.weight": (24, 48),
            f"{block}.attention.wv.weight": (24, 48),
            f"{block}.attention.wo.weight": (48, 48),
            f"{block}.feed_forward.w1.weight": (FFN_DIM, 48),
            f"{block}.feed_forward.w2.weight": (48, FFN_DIM),
            f"{block}.feed_forward.w3.weight": (FFN_DIM, 48),
            f"{block}.attention_norm.weight": (48,),
            f"{block}.ffn_norm.weight": (48,),
        }
    return {
        name: 0.5 + torch.rand(shape) if len(shape) == 1 else torch.randn(shape) * 0.2
        for name, shape in shapes.items()
    }


def reference_logits(params: dict, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """(B, T, n, vocab) in float64, with rotations as products of complex numbers."""
    w = {name: weight.double() for name, weight in weights.items()}
    length, n_heads = tokens.shape[1], params["n_heads"]
    n_kv, theta = params.get("n_kv_heads", n_heads), params.get("rope_theta", 10_000.0)
    head_dim = params["dim"] // n_heads
    frequency = theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    angle = torch.arange(length).double()[:, None] * frequency
    rotation = torch.polar(torch.ones_like(angle), angle)[:, None]  # (T, 1, head_dim / 2)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + params["norm_eps"]).sqrt() * weight

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * rotation).flatten(-2)

    def block(name: str, x: Tensor) -> Tensor:
        y = norm(x, w[f"{name}.attention_norm.weight"])
        q, k, v = (
            (y @ w[f"{name}.attention.w{part}.weight"].T).unflatten(-1, (-1, head_dim))
            for part in "qkv"
        )
        q, k = rotate(q), rotate(k)
        k, v = (x.repeat_interleave(n_heads // n_kv, dim=2) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / head_dim**0.5
        hidden = torch.ones(length, length).triu(1).bool()
        share = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        y = torch.einsum("bhts,bshd->bthd", share, v).flatten(2)
        x = x + y @ w[f"{name}.attention.wo.weight"].T
        y = norm(x, w[f"{name}.ffn_norm.weight"])
        gate, up = (y @ w[f"{name}.feed_forward.{part}.weight"].T for part in ("w1", "w3"))
        return x + (F.silu(gate) * up) @ w[f"{name}.feed_forward.w2.weight"].T

    n = params["n_future_tokens"]
    last = params["n_layers"] - n  # layers holds n_layers - n + 1 blocks
    x = w["tok_embeddings.weight"][tokens]
    for i in range(last):
        x = block(f"layers.{i}", x)
    heads = [f"layers.{last}", *(f"extra_heads.{k}" for k in range(n - 1))]
    latents = torch.stack([block(name, x) for name in heads], dim=-2)
    return norm(latents, w["norm.weight"]) @ w["output.weight"].T


@pytest.fixture
def release(tmp_path) -> Path:
    """A directory as Meta's code saves it."""
    torch.save(random_weights(), tmp_path / "consolidated.pth")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    return tmp_path


@torch.no_grad()
def assert_heads_equal(model: MTPTransformer, expected: Tensor, tokens: Tensor) -> None:
    assert expected.std() > 1
    assert len(model.heads) == expected.shape[2]
    for k in range(expected.shape[2]):
        torch.testing.assert_close(
            model.logits(tokens, k).double(), expected[:, :, k], rtol=1e-4, atol=1e-4
        )


def test_every_head_is_read(release):
    tokens = torch.randint(0, VOCAB, (2, 40))
    expected = reference_logits(PARAMS, random_weights(), tokens)
    model = MTPTransformer.from_pretrained(release).eval()
    assert model.config == MTPConfig(
        VOCAB, 48, 5, 4, 2, 3, FFN_DIM, max_seq_len=2048, rope_theta=5e4
    )
    assert_heads_equal(model, expected, tokens)
    assert_heads_equal(
        MTPTransformer.from_pretrained(release, 2, max_seq_len=64), expected[:, :, :2], tokens
    )
    more = torch.cat([expected, expected[:, :, :1]], 2)  # a fourth head starts as head 0
    assert_heads_equal(MTPTransformer.from_pretrained(release, 4), more, tokens)


def test_generation_equals_the_reference(release):
    model = MTPTransformer.from_pretrained(release).eval()
    prompt = torch.randint(0, VOCAB, (5,))
    tokens = prompt
    for _ in range(12):
        logits = reference_logits(PARAMS, random_weights(), tokens[None])[0, -1, 0]
        tokens = torch.cat([tokens, logits.argmax()[None]])
    assert torch.equal(generate(model, [prompt], 12).tokens[0], tokens[5:])


def test_what_is_written_is_that_layout(release, tmp_path):
    out = tmp_path / "out"
    MTPTransformer.from_pretrained(release).save_pretrained(out, "meta")
    written = torch.load(out / "consolidated.pth", weights_only=True)
    expected = random_weights()
    assert written.keys() == expected.keys()
    for name, weight in written.items():
        assert torch.equal(weight, expected[name]), name
    params = json.loads((out / "params.json").read_text())
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "n_future_tokens", "rope_theta"):
        assert params[name] == PARAMS[name]
    assert params["vocab_size"] == VOCAB


@pytest.mark.parametrize("ffn_dim", [8, 40, 128, 129, 1000])
def test_the_rule_of_the_width_gives_it_back(ffn_dim, tmp_path):
    config = MTPConfig(9, 48, 3, 4, 4, 2, ffn_dim, 2048)
    MTPTransformer(config).save_pretrained(tmp_path, "meta")
    params = json.loads((tmp_path / "params.json").read_text())
    width = int(2 * (4 * 48) / 3)
    if (multiplier := params.get("ffn_dim_multiplier")) is not None:
        width = int(multiplier * width)
    multiple = params["multiple_of"]
    assert multiple * ((width + multiple - 1) // multiple) == ffn_dim
    assert "rope_theta" not in params
    assert "n_kv_heads" not in params
    assert MTPTransformer.from_pretrained(tmp_path).config == config


def test_tied_embeddings_are_written_twice(tmp_path):
    model = MTPTransformer(MTPConfig(9, 48, 3, 4, 4, 2, 40, 64, tie_embeddings=True))
    model.save_pretrained(tmp_path, "meta")
    again = MTPTransformer.from_pretrained(tmp_path)
    assert torch.equal(again.unembedding.weight, model.embedding.weight)
    assert not again.config.tie_embeddings


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_head_dim": 8},
        {"qkv_bias": True},
        {"qk_norm": True},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
)
def test_what_the_layout_cannot_express_is_said(changes, tmp_path):
    model = MTPTransformer(MTPConfig(9, 48, 3, 4, 4, 2, 40, 64, **changes))
    with pytest.raises(ValueError, match=f'layout "meta" cannot express {next(iter(changes))}'):
        model.save_pretrained(tmp_path, "meta")
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_directories_are_refused(release):
    params, weights = release / "params.json", release / "consolidated.pth"
    for changes, message in (
        ({"dim": None}, "params.json"),
        ({"n_layers": 6}, "layers.3.attention_norm.weight is missing"),
        ({"n_future_tokens": 2, "n_layers": 4}, "extra_heads.1.attention.wk.weight is unknown"),
        ({"n_kv_heads": 4}, r"wk.weight is \(24, 48\), expected \(48, 48\)"),
        ({"use_scaled_rope": True}, "use_scaled_rope is not supported"),
    ):
        params.write_text(json.dumps(PARAMS | changes))
        with pytest.raises(ValueError, match=message):
            MTPTransformer.from_pretrained(release)
    params.write_text(json.dumps({k: v for k, v in PARAMS.items() if k != "n_heads"}))
    with pytest.raises(ValueError, match="lacks n_heads"):
        MTPTransformer.from_pretrained(release)
    params.write_text(json.dumps(PARAMS))

    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"consolidated\.pth is damaged"):
        MTPTransformer.from_pretrained(release)
    weights.write_bytes(data)
    (release / "consolidated.01.pth").write_bytes(data)
    with pytest.raises(ValueError, match=r"one consolidated\*\.pth .* found 2"):
        MTPTransformer.from_pretrained(release)
