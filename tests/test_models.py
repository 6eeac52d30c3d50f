"""The model, its configuration, KV cache and checkpoints."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtp_fast.models import KVCache, MTPConfig, MTPTransformer, load_checkpoint, save_checkpoint
from mtp_fast.models.transformer import apply_rope, causal_attention, rope_table

CONFIG = MTPConfig(
    vocab_size=50,
    dim=32,
    n_layers=5,
    n_attention_heads=4,
    n_kv_heads=2,
    n_future_tokens=3,
    ffn_dim=48,
    max_seq_len=64,
)

LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def small_model(**changes) -> MTPTransformer:
    torch.manual_seed(0)
    return MTPTransformer(dataclasses.replace(CONFIG, **changes)).eval()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 30}, "dim must be n_attention_heads times an even number"),
        ({"dim": 12}, "dim must be n_attention_heads times an even number"),
        ({"n_kv_heads": 3}, "n_attention_heads must be a multiple of n_kv_heads"),
        ({"n_future_tokens": 0}, "n_future_tokens must be at least 1, got 0"),
        ({"n_future_tokens": 6}, "leaves none for n_future_tokens=6"),
        ({"vocab_size": -1}, "vocab_size must be at least 1, got -1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"rope_theta": 0.0}, "rope_theta must be positive"),
        ({"norm_eps": float("nan")}, "norm_eps must be positive"),
        ({"attention_head_dim": 7}, "attention_head_dim must be even, got 7"),
        ({"attention_head_dim": 0}, "attention_head_dim must be at least 1, got 0"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_type must be one of .* got None"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' lacks factor"),
        ({"rope_scaling": LINEAR | {"beta_fast": 1}}, "'linear' has unknown fields beta_fast"),
        ({"rope_scaling": LINEAR | {"factor": 0.0}}, "factor must be positive, got 0.0"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, "must exceed low_freq_factor"),
    ],
)
def test_config_rejects_values(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": 32.0},
        {"dropout": "x"},
        {"tie_embeddings": 1},
        {"qk_norm": 1},
        {"attention_head_dim": 8.0},
        {"rope_scaling": "linear"},
        {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
    ],
)
def test_config_rejects_types(changes):
    with pytest.raises(TypeError, match=next(iter(changes))):
        dataclasses.replace(CONFIG, **changes)


def test_config_round_trips_and_names_wrong_fields():
    config = dataclasses.replace(CONFIG, rope_theta=5e5, tie_embeddings=True, dropout=0.25)
    assert MTPConfig.from_json(config.to_json()) == config
    stretched = dataclasses.replace(
        config, attention_head_dim=10, qkv_bias=True, qk_norm=True, rope_scaling=LLAMA3
    )
    assert MTPConfig.from_json(stretched.to_json()) == stretched
    fields = json.loads(config.to_json())
    for name in ("attention_head_dim", "qkv_bias", "qk_norm", "rope_scaling"):
        del fields[name]  # as files from before these fields have it
    assert MTPConfig.from_json(json.dumps(fields)) == config
    with pytest.raises(ValueError, match="unknown fields in the model configuration: colour"):
        MTPConfig.from_json(json.dumps({**fields, "colour": 1}))
    del fields["dim"]
    with pytest.raises(ValueError, match="lacks dim"):
        MTPConfig.from_json(json.dumps(fields))
    with pytest.raises(ValueError, match="JSON object, got list"):
        MTPConfig.from_json("[]")


def test_parameter_count_does_not_depend_on_the_number_of_heads():
    counts = {
        sum(p.numel() for p in small_model(n_future_tokens=n).parameters()) for n in (1, 2, 3, 5)
    }
    assert len(counts) == 1


def test_forward_gives_one_causal_hidden_state_a_head():
    model = small_model()
    tokens = torch.randint(0, 50, (2, 20))
    hidden = model(tokens)
    assert [h.shape for h in hidden] == [(2, 20, 32)] * 3
    for k, h in enumerate(hidden):
        torch.testing.assert_close(model.unembedding(h), model.logits(tokens, head=k))
    assert not torch.allclose(hidden[0], hidden[1])
    changed = tokens.clone()
    changed[:, 11] = (tokens[:, 11] + 1) % 50
    for before, after in zip(hidden, model(changed), strict=True):
        torch.testing.assert_close(before[:, :11], after[:, :11])
        assert not torch.allclose(before[:, 11], after[:, 11])


def test_forward_rejects_shapes():
    model = small_model()
    with pytest.raises(ValueError, match=r"tokens must be \(B, T\), got shape \(3,\)"):
        model(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="65 positions, max_seq_len is 64"):
        model(torch.zeros(1, 65, dtype=torch.int64))


def test_positions_are_relative():
    """A rotated query and key meet in a product that knows only their distance."""
    torch.manual_seed(0)
    table = rope_table(8, 32, 10_000.0)
    q, k = torch.randn(1, 8), torch.randn(1, 8)
    products = [(apply_rope(q, table[t + 5]) * apply_rope(k, table[t])).sum() for t in (0, 3, 26)]
    torch.testing.assert_close(products[0].expand(3), torch.stack(products))
    assert not torch.isclose(products[0], (apply_rope(q, table[9]) * apply_rope(k, table[0])).sum())
    # The convention of Llama as Hugging Face stores it: halves, not neighbours, make a pair.
    one = torch.zeros(1, 8)
    one[0, 1] = 1.0
    assert apply_rope(one, table[3]).nonzero()[:, 1].tolist() == [1, 5]


@pytest.mark.parametrize("length", [1, 7, 512, 513])
def test_causal_attention_equals_torchs(length):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, length, 8) for heads in (6, 2, 2))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(causal_attention(q, k, v), expected, rtol=1e-5, atol=1e-5)


def test_tied_embeddings_are_one_tensor():
    tied, untied = small_model(tie_embeddings=True), small_model()
    assert tied.unembedding.weight is tied.embedding.weight
    assert untied.unembedding.weight is not untied.embedding.weight


def test_dropout_acts_in_training_only():
    model = small_model(dropout=0.5)
    tokens = torch.randint(0, 50, (1, 8))
    torch.testing.assert_close(model.logits(tokens), model.logits(tokens), rtol=0, atol=0)
    model.train()
    assert not torch.allclose(model.logits(tokens), model.logits(tokens))


def test_any_trunk_can_take_the_place_of_ours():
    class Doubling(nn.Module):
        def forward(self, x):
            return 2 * x

    model = MTPTransformer(CONFIG, trunk=Doubling())
    tokens = torch.randint(0, 50, (2, 6))
    torch.testing.assert_close(model.trunk_output(tokens), 2 * model.embedding(tokens))
    assert len(model(tokens)) == 3


def test_cache_returns_what_was_written_where_it_was_written():
    cache = KVCache(2, 3, 10, 2, 4, torch.zeros(0))
    kv = torch.randn(2, 4, 4)
    cache.write(1, torch.tensor([0, 2]), torch.tensor([6, 1]), kv)
    keys, values = cache.read(1, 7)
    assert keys.shape == values.shape == (3, 2, 7, 4)
    torch.testing.assert_close(keys[0, :, 6], kv[0, :2])
    torch.testing.assert_close(values[2, :, 1], kv[1, 2:])
    assert keys.count_nonzero() == values.count_nonzero() == 2 * 2 * 4
    assert cache.read(0, 10)[0].count_nonzero() == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"attention_head_dim": 10, "qkv_bias": True, "qk_norm": True, "rope_scaling": LLAMA3},
    ],
)
def test_checkpoint_round_trips(tmp_path, changes):
    model = small_model(**changes)
    for _ in range(2):  # the second one replaces the first
        save_checkpoint(model, tmp_path / "a" / "b")
    loaded = load_checkpoint(str(tmp_path / "a" / "b"))
    assert loaded.config == model.config
    tokens = torch.randint(0, 50, (2, 9))
    torch.testing.assert_close(loaded.logits(tokens), model.logits(tokens), rtol=0, atol=0)
    again = MTPTransformer.from_pretrained(tmp_path / "a" / "b")
    torch.testing.assert_close(again.logits(tokens, 2), model.logits(tokens, 2), rtol=0, atol=0)
    tied = loaded.unembedding.weight is loaded.embedding.weight
    assert tied == model.config.tie_embeddings
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_failed_write_leaves_the_checkpoint_as_it_was(tmp_path, monkeypatch):
    model = small_model()
    save_checkpoint(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(weights, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(small_model(n_future_tokens=1), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint"):
        load_checkpoint(tmp_path)
    save_checkpoint(small_model(), tmp_path)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()

    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_checkpoint(tmp_path)
    weights.write_bytes(data)

    config = tmp_path / "config.json"
    config.write_text(dataclasses.replace(CONFIG, ffn_dim=40).to_json())
    with pytest.raises(ValueError, match=r"gate_up\.weight is \(96, 32\), expected \(80, 32\)"):
        load_checkpoint(tmp_path)
    config.write_text(dataclasses.replace(CONFIG, n_layers=6).to_json())
    with pytest.raises(ValueError, match=r"trunk\.blocks\.2\.\S+ is missing"):
        load_checkpoint(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        load_checkpoint(tmp_path)
