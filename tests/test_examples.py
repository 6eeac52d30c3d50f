"""The examples, run as they stand."""

import runpy
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare

import mtp_fast

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_huggingface_llama_trains_to_the_same_losses() -> None:
    pytest.importorskip("transformers")
    pairs = runpy.run_path(str(EXAMPLES / "huggingface_llama.py"))["main"](20)
    assert len(pairs) == 20
    for own, fused in pairs:
        assert fused == pytest.approx(own, abs=1e-4)
    assert pairs[-1][0] < pairs[0][0] - 0.2  # it trained


def test_a_foreign_trunk_learns_with_every_head() -> None:
    example = runpy.run_path(str(EXAMPLES / "train_any_trunk.py"))
    torch.manual_seed(0)
    model, tokens = example["Model"](), example["batch"](torch.Generator().manual_seed(1))
    hidden = model(tokens)
    expected = sum(
        torch.nn.functional.cross_entropy(
            model.unembedding(x[:, : -1 - k]).flatten(0, 1), tokens[:, 1 + k :].flatten()
        )
        for k, x in enumerate(hidden)
    )
    loss = mtp_fast.multi_token_cross_entropy(hidden, model.unembedding.weight, tokens)
    torch.testing.assert_close(loss, expected)
    history = example["main"](80)
    assert (history[-1].loss < 0.1 * history[0].loss).all()


def test_ngram_drafts_leave_a_foreign_models_greedy_output_as_it_is() -> None:
    pytest.importorskip("transformers")
    ours, own, forwards = runpy.run_path(str(EXAMPLES / "serving_ngram_drafts.py"))["main"](60)
    assert ours == own
    assert forwards < 50  # 60 tokens each: drafts were accepted


def test_ngram_drafts_leave_a_foreign_models_distribution_as_it_is() -> None:
    transformers = pytest.importorskip("transformers")
    decode = runpy.run_path(str(EXAMPLES / "serving_ngram_drafts.py"))["decode"]
    config = transformers.LlamaConfig(
        vocab_size=4,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.15,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    prompt, runs = [0, 1, 2, 0, 1], 5000
    law, contexts = torch.ones(1), torch.tensor([prompt])
    for _ in range(3):
        with torch.no_grad():
            law = (law[:, None] * (model(contexts).logits[:, -1] / 0.8).softmax(-1)).flatten()
        following = torch.arange(4).repeat(len(contexts))[:, None]
        contexts = torch.cat([contexts.repeat_interleave(4, 0), following], 1)
    drawn, _ = decode(model, [prompt] * runs, 3, temperature=0.8)
    ids = torch.tensor(drawn) @ torch.tensor([16, 4, 1])
    observed = torch.bincount(ids, minlength=64).double()
    assert law.min() * runs > 3
    assert chisquare(observed, law.double() / law.double().sum() * runs).pvalue > 1e-4
