"""Models of transformers: read, generated with and written, against transformers itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

transformers = pytest.importorskip("transformers")

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

from mtp_fast.decoding import generate  # noqa: E402
from mtp_fast.decoding.incremental import IncrementalModel  # noqa: E402
from mtp_fast.models import MTPConfig, MTPTransformer, save_checkpoint  # noqa: E402
from mtp_fast.models.transformer import rope_table  # noqa: E402
from tiny_models import close_drafts, draft_logits, round_drafting_heads  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB = 97
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CASES = {
    "llama": ("Llama", {"rope_theta": 5e5}),
    "llama of one group, tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama3": ("Llama", {"head_dim": 32, "rope_scaling": {**LLAMA3}, "rope_theta": 5e3}),
    "linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "yarn": ("Llama", {"head_dim": 32, "rope_scaling": {**YARN}}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 1}),
    "qwen3, tied": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"head_dim": 10, "hidden_size": 66, "sliding_window": None}),
}


def foreign_model(case: str):
    """A random model of transformers in which biases and norms are not at their start."""
    name, changes = CASES[case]
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": None,
        **changes,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**fields)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture(scope="module", params=CASES)
def foreign(request, tmp_path_factory):
    """(model, its directory)."""
    path = tmp_path_factory.mktemp("foreign")
    model = foreign_model(request.param)
    model.save_pretrained(path)
    return model, path


@pytest.fixture
def llama(tmp_path) -> Path:
    foreign_model("llama").save_pretrained(tmp_path)
    return tmp_path


def change_config(path: Path, **changes: object) -> None:
    fields = json.loads((path / "config.json").read_text()) | changes
    kept = {name: value for name, value in fields.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(kept))


@torch.no_grad()
def logits_of(model, tokens: Tensor) -> Tensor:
    return model(tokens).logits


def draw_heads_apart(model: MTPTransformer) -> None:
    """Give the extra heads weights of their own."""
    torch.manual_seed(1)
    with torch.no_grad():
        for head in list(model.heads)[1:]:
            for parameter in head.parameters():
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))


@torch.no_grad()
def assert_same_logits(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 1  # so that the tolerance means something
    difference = (ours - theirs).abs()
    assert difference.max() < 1e-4
    assert difference.mean() < 1e-5


@torch.no_grad()
def test_logits_equal_transformers(foreign):
    theirs, path = foreign
    tokens = torch.randint(0, VOCAB, (2, 120))
    expected = logits_of(theirs, tokens)
    for n in (1, 3):
        model = MTPTransformer.from_pretrained(path, n).eval()
        assert model.config.n_layers == 3 + n - 1
        assert model.config.n_trunk_layers == 2
        for k in range(n):  # every head starts as the last layer
            assert_same_logits(model.logits(tokens, k), expected)


def test_generation_equals_transformers(foreign):
    theirs, path = foreign
    prompts = [torch.randint(0, VOCAB, (length,)) for length in (1, 6, 23)]
    model = MTPTransformer.from_pretrained(path, 3).eval()
    one = generate(model, prompts, 40, n_heads=1)
    draw_heads_apart(model)
    three = generate(model, prompts, 40)
    for prompt, a, b in zip(prompts, one.tokens, three.tokens, strict=True):
        expected = theirs.generate(
            prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=40,
            do_sample=False,
        )  # fmt: skip
        assert torch.equal(a, expected[0, len(prompt) :])
        assert torch.equal(b, a)


@torch.no_grad()
def test_cached_logits_of_every_head_equal_full_recomputation(foreign):
    model = MTPTransformer.from_pretrained(foreign[1], 3).eval()
    draw_heads_apart(model)
    round_drafting_heads(model)
    tokens = torch.randint(0, VOCAB, (2, 80))
    cached = IncrementalModel(model, 3, batch=2, capacity=80)
    for begin, end in ((0, 70), (70, 73), (73, 74), (74, 80)):
        start = torch.full((2,), begin)
        rows = cached.rows(start, end - begin, 80)
        trunk, hidden = cached.forward(tokens[:, begin:end], rows)
        expected = [model.logits(tokens[:, :end], k)[:, begin:] for k in range(3)]
        close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(cached.logits(hidden), expected[0], **close)
        drafts = draft_logits(cached, trunk, cached.rows(start + end - begin - 1, 1, 80))
        torch.testing.assert_close(drafts[:, 0], expected[1][:, -1], **close_drafts(cached))
        torch.testing.assert_close(drafts[:, 1], expected[2][:, -1], **close_drafts(cached))


@torch.no_grad()
def test_saved_model_is_one_for_transformers_and_for_us(foreign, tmp_path):
    model = MTPTransformer.from_pretrained(foreign[1], 3).eval()
    draw_heads_apart(model)
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, VOCAB, (2, 120))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_logits(model.logits(tokens), logits_of(theirs, tokens))
    assert theirs.dtype == torch.float32

    again = MTPTransformer.from_pretrained(tmp_path)
    assert again.config == model.config
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    assert (again.unembedding.weight is again.embedding.weight) == model.config.tie_embeddings

    model.save_pretrained(tmp_path / "again")
    fewer = MTPTransformer.from_pretrained(tmp_path, 1)
    fewer.save_pretrained(tmp_path / "again")
    names = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert names == ["config.json", "model.safetensors"]


def test_number_of_heads_may_change(llama, tmp_path):
    model = MTPTransformer.from_pretrained(llama, 3)
    draw_heads_apart(model)
    model.save_pretrained(tmp_path / "huggingface")
    save_checkpoint(model, tmp_path / "ours")
    for layout in ("huggingface", "ours"):
        fewer = MTPTransformer.from_pretrained(tmp_path / layout, 2)
        more = MTPTransformer.from_pretrained(tmp_path / layout, 5)
        for read, sources in ((fewer, (0, 1)), (more, (0, 1, 2, 0, 0))):
            assert len(read.heads) == len(sources)
            assert read.config.n_trunk_layers == 2
            for head, source in zip(read.heads, sources, strict=True):
                for a, b in zip(head.parameters(), model.heads[source].parameters(), strict=True):
                    assert torch.equal(a, b)
        storages = {p.data_ptr() for p in more.parameters()}
        assert len(storages) == len(list(more.parameters()))


def test_shards_and_old_fields_are_read(tmp_path):
    theirs = foreign_model("llama3")
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    scaling = {("type" if key == "rope_type" else key): value for key, value in LLAMA3.items()}
    change_config(tmp_path, rope_parameters=..., rope_theta=5e3, rope_scaling=scaling)
    tokens = torch.randint(0, VOCAB, (1, 120))
    model = MTPTransformer.from_pretrained(tmp_path, 2)
    assert_same_logits(model.logits(tokens), logits_of(theirs, tokens))

    shard = min(tmp_path.glob("model-*.safetensors"))
    shard.rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        MTPTransformer.from_pretrained(tmp_path)


def test_dtype_and_length_are_arguments(llama):
    before = torch.get_rng_state()
    model = MTPTransformer.from_pretrained(llama, 2, dtype=torch.bfloat16, max_seq_len=48)
    assert torch.equal(torch.get_rng_state(), before)  # nothing was initialised
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in model.parameters())
    assert model.config.max_seq_len == 48
    assert model.rope.shape[0] == model.trunk.rope.shape[0] == 48
    tokens = torch.randint(0, VOCAB, (1, 48))
    expected = MTPTransformer.from_pretrained(llama).logits(tokens)
    assert (model.logits(tokens) - expected).abs().mean() < 0.1 * expected.std()
    with pytest.raises(ValueError, match="49 positions, max_seq_len is 48"):
        model.logits(torch.zeros(1, 49, dtype=torch.int64))


def test_the_original_length_is_the_models_where_scaling_has_none(llama):
    change_config(llama, rope_parameters=..., rope_scaling={"type": "yarn", "factor": 2.0})
    for changes, length in (({}, 128), ({"original_max_position_embeddings": 32}, 32)):
        change_config(llama, **changes)
        scaling = MTPTransformer.from_pretrained(llama, max_seq_len=48).config.rope_scaling
        assert scaling == {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": length,
        }


def test_a_sliding_window_is_refused_where_it_slides(tmp_path):
    foreign_model("mistral").save_pretrained(tmp_path)
    change_config(tmp_path, sliding_window=64)
    with pytest.raises(ValueError, match=r"sliding_window=64 .* max_seq_len=64 or less, got 128"):
        MTPTransformer.from_pretrained(tmp_path)
    assert MTPTransformer.from_pretrained(tmp_path, max_seq_len=64).config.max_seq_len == 64
    change_config(tmp_path, model_type="qwen2", sliding_window=64, use_sliding_window=True)
    with pytest.raises(ValueError, match="sliding_window=64"):
        MTPTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, r"config.json: model_type must be one of .*, got 'gemma'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ({"hidden_size": ...}, "config.json lacks hidden_size"),
        ({"hidden_size": "wide"}, "config.json: "),
        ({"num_attention_heads": 6, "head_dim": ...}, "dim must be n_attention_heads times"),
        ({"head_dim": 15}, "attention_head_dim must be even, got 15"),
        ({"intermediate_size": 88}, r"mlp.gate_proj.weight is \(80, 64\), expected \(88, 64\)"),
        ({"num_hidden_layers": 4}, r"layers.3.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 2}, r"layers.2.input_layernorm.weight is unknown"),
        ({"model_type": "qwen2"}, r"q_proj.bias is missing"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "got 'dynamic'"),
        ({"rope_parameters": {"full_attention": {}}}, "unknown fields full_attention"),
        ({"rope_parameters": {"rope_type": "linear"}}, "'linear' lacks factor"),
        ({"rope_parameters": {**YARN, "mscale": 1.0}}, "unknown fields mscale"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1"),
        (
            {"mtp_fast": {"n_future_tokens": 2, "dropout": 0.0}},
            "extra_heads.safetensors is missing",
        ),
    ],
)
def test_what_is_not_supported_is_said(changes, message, llama):
    change_config(llama, **changes)
    with pytest.raises(ValueError, match=message):
        MTPTransformer.from_pretrained(llama)


def test_damaged_directories_are_refused(llama, tmp_path_factory):
    with pytest.raises(ValueError, match="is not a checkpoint"):
        MTPTransformer.from_pretrained(tmp_path_factory.mktemp("empty"))
    with pytest.raises(ValueError, match="n_future_tokens must be at least 1, got 0"):
        MTPTransformer.from_pretrained(llama, 0)
    weights = llama / "model.safetensors"
    tensors = load_file(weights)
    bias = "model.layers.2.self_attn.q_proj.bias"
    save_file({**tensors, "model.layers.2.self_attn.rotary_emb.inv_freq": torch.ones(8)}, weights)
    MTPTransformer.from_pretrained(llama)  # of old files, and no parameter
    save_file({**tensors, bias: torch.ones(64)}, weights)
    with pytest.raises(ValueError, match=f"{bias} is unknown"):
        MTPTransformer.from_pretrained(llama)
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        MTPTransformer.from_pretrained(llama)
    weights.unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors and no .*index\.json"):
        MTPTransformer.from_pretrained(llama)
    (llama / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        MTPTransformer.from_pretrained(llama)


def test_what_a_layout_cannot_express_is_said(tmp_path):
    both = MTPConfig(9, 8, 2, 2, 1, 1, 8, 16, qkv_bias=True, qk_norm=True)
    with pytest.raises(ValueError, match="both qkv_bias and qk_norm"):
        MTPTransformer(both).save_pretrained(tmp_path)
    plain = MTPConfig(9, 8, 2, 2, 1, 1, 8, 16)
    with pytest.raises(TypeError, match="only a Trunk has a layout, the model has a Identity"):
        MTPTransformer(plain, trunk=torch.nn.Identity()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='layout must be "huggingface" or "meta", got \'gguf\''):
        MTPTransformer(plain).save_pretrained(tmp_path, "gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 3.0},
        LLAMA3,
        {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
        YARN,
        {**YARN, "factor": 16.0, "original_max_position_embeddings": 4096},
        {**YARN, "attention_factor": 0.7, "beta_fast": 16.0, "beta_slow": 2.0},
        {**YARN, "truncate": False},
        {**YARN, "factor": 1.0},
    ],
)
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_scaled_rotations_equal_transformers(scaling, theta):
    config = transformers.LlamaConfig(
        head_dim=64, max_position_embeddings=16384, rope_theta=theta, rope_scaling={**scaling}
    )
    inverse, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
    angle = torch.outer(torch.arange(200).double(), inverse.double())
    table = rope_table(64, 200, theta, scaling)[:, :, 0]
    torch.testing.assert_close(table[:, 0, :32].double(), factor * angle.cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(table[:, 1, 32:].double(), factor * angle.sin(), rtol=0, atol=1e-4)
