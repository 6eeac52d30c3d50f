"""Incremental inference and self-speculative generation against full recomputation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from torch import nn

from mtp_fast.decoding import generate
from mtp_fast.decoding.incremental import IncrementalModel, add_linear, linear
from mtp_fast.models import MTPConfig, MTPTransformer

CONFIG = MTPConfig(
    vocab_size=40,
    dim=32,
    n_layers=5,
    n_attention_heads=4,
    n_kv_heads=2,
    n_future_tokens=4,
    ffn_dim=48,
    max_seq_len=96,
)


def sharp_model(seed: int = 0, **changes) -> MTPTransformer:
    """A random model whose heads half agree, so that drafts are both accepted and rejected."""
    torch.manual_seed(seed)
    model = MTPTransformer(dataclasses.replace(CONFIG, **changes)).eval()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.RMSNorm)):
            norm.weight.uniform_(0.5, 1.5)  # so that a norm that is left out shows
        model.unembedding.weight.mul_(3)
    return model


def cyclic_model(period: int) -> MTPTransformer:
    """A model whose every head is right on the sequence 0, 1, ..., period - 1, 0, 1, ..."""
    model = sharp_model(vocab_size=period, n_layers=4)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.embedding.weight.copy_(torch.eye(period, 32))
        model.norm.weight.fill_(1.0)
        model.unembedding.weight.copy_(torch.eye(period, 32))
    for k, head in enumerate(model.heads):
        shift = torch.zeros(32, 32)
        for token in range(period):
            shift[token, token] = -10.0
            shift[(token + 1 + k) % period, token] = 10.0
        with torch.no_grad():
            head.ffn_norm.weight.fill_(1.0)
            head.ffn.gate_up.weight[:32].copy_(10 * torch.eye(32))
            head.ffn.gate_up.weight[48 : 48 + 32].copy_(torch.eye(32))
            head.ffn.down.weight[:, :32].copy_(shift)
    return model


@torch.no_grad()
def greedy_by_recomputation(model: MTPTransformer, prompt: torch.Tensor, count: int):
    tokens = prompt
    for _ in range(count):
        best = model.logits(tokens[None])[0, -1].argmax()
        tokens = torch.cat([tokens, best[None]])
    return tokens[len(prompt) :]


def ragged_prompts(*lengths: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, CONFIG.vocab_size, (n,)) for n in lengths]


@pytest.mark.parametrize("rows", [1, 2, 4, 6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_row_products(rows, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 24).to(dtype), torch.randn(40, 24).to(dtype)
    residual = torch.randn(rows, 40).to(dtype)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    assert linear(x, weight).is_contiguous()
    torch.testing.assert_close(
        add_linear(residual, x, weight).float(),
        residual.float() + F.linear(x.float(), weight.float()),
        rtol=2e-2 if dtype == torch.bfloat16 else 1e-5,
        atol=1e-4 if dtype == torch.float32 else 0.1,
    )


@torch.no_grad()
def test_incremental_logits_equal_full_recomputation():
    """In pieces of any size, with a ragged batch: every head, every position."""
    model = sharp_model()
    lengths = torch.tensor([3, 7])
    tokens = torch.randint(0, 40, (2, 30))
    for pieces in ([1] * 12, [5, 1, 3, 3], [12]):
        cached = IncrementalModel(model, 4, batch=2, capacity=40)
        # Each sequence starts at its own place: first its own prefix, alone in its row.
        prefix = cached.rows(torch.zeros_like(lengths), 7, 7)
        cached.forward(tokens[:, :7], prefix)
        start = lengths.clone()
        for size in pieces:
            block = torch.stack([tokens[b, s : s + size] for b, s in enumerate(start.tolist())])
            trunk, hidden = cached.forward(block, cached.rows(start, size, 40))
            start = start + size
            drafts = cached.draft_logits(trunk[:, -1], cached.rows(start - 1, 1, 40))
            for b, end in enumerate(start.tolist()):
                context = tokens[b : b + 1, :end]
                expected = model.logits(context)[0, end - size : end]
                torch.testing.assert_close(cached.logits(hidden)[b], expected, rtol=1e-4, atol=1e-4)
                for k in (1, 2, 3):
                    torch.testing.assert_close(
                        drafts[b, k - 1], model.logits(context, k)[0, -1], rtol=1e-4, atol=1e-4
                    )


@torch.no_grad()
def test_rewinding_is_writing_again():
    model = sharp_model()
    tokens = torch.randint(0, 40, (1, 12))
    cached = IncrementalModel(model, 4, batch=1, capacity=16)
    start = torch.zeros(1, dtype=torch.int64)
    cached.forward(tokens[:, :8], cached.rows(start, 8, 8))
    wrong = (tokens[:, 8:] + 1) % 40
    cached.forward(wrong, cached.rows(start + 8, 4, 12))
    trunk, hidden = cached.forward(tokens[:, 8:10], cached.rows(start + 8, 2, 12))
    torch.testing.assert_close(
        cached.logits(hidden), model.logits(tokens[:, :10])[:, 8:], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        cached.draft_logits(trunk[:, -1], cached.rows(start + 9, 1, 12))[0, 2],
        model.logits(tokens[:, :10], 3)[0, -1],
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("n_heads", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk", [4, 512])
def test_greedy_output_is_that_of_head_0_alone(n_heads, chunk, monkeypatch):
    monkeypatch.setattr("mtp_fast.decoding.speculative.PREFILL_CHUNK", chunk)
    model, prompts = sharp_model(), ragged_prompts(1, 4, 5, 17)
    result = generate(model, prompts, 30, n_heads=n_heads)
    for tokens, prompt in zip(result.tokens, prompts, strict=True):
        assert torch.equal(tokens, greedy_by_recomputation(model, prompt, 30))
    assert len(result.stats.acceptance) == n_heads - 1
    if n_heads == 1:
        assert result.stats.forwards == [30] * 4
        assert result.stats.tokens_per_forward == 1.0
        assert not torch.cat(result.drafted).any()


@pytest.mark.parametrize("n_heads", [1, 2, 3, 4])
def test_right_drafts_are_all_accepted(n_heads):
    model = cyclic_model(7)
    result = generate(model, [torch.tensor([2, 3]), torch.tensor([6])], 41, n_heads=n_heads)
    for tokens, first in zip(result.tokens, (4, 0), strict=True):
        assert tokens.tolist() == [(first + i) % 7 for i in range(41)]
    assert result.stats.acceptance == [1.0] * (n_heads - 1)
    # The prompt's forward gives one token, every other one n_heads; the last may be cut.
    assert result.stats.forwards == [1 + -(-40 // n_heads)] * 2
    pattern = [False] + ([True] * (n_heads - 1) + [False]) * 40
    assert result.drafted[0].tolist() == pattern[:41]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ragged_batch_equals_single_runs(temperature):
    model, prompts = sharp_model(), ragged_prompts(9, 2, 5)
    batch = generate(model, prompts, 25, temperature=temperature, seed=3)
    for b, prompt in enumerate(prompts):
        alone = generate(model, [prompt], 25, temperature=temperature, seed=3 + b)
        assert torch.equal(batch.tokens[b], alone.tokens[0])
        assert batch.stats.forwards[b] == alone.stats.forwards[0]


def test_prompts_may_be_one_tensor():
    model = sharp_model()
    prompts = torch.randint(0, 40, (2, 6), dtype=torch.int32)
    result = generate(model, prompts, 5)
    assert torch.equal(result.tokens[1], greedy_by_recomputation(model, prompts[1].long(), 5))


@pytest.mark.parametrize("n_heads", [1, 4])
def test_a_sequence_ends_after_its_eos(n_heads):
    model, prompts = cyclic_model(7), [torch.tensor([2, 3]), torch.tensor([5])]
    result = generate(model, prompts, 20, n_heads=n_heads, eos_token_id=5)
    assert [tokens.tolist() for tokens in result.tokens] == [[4, 5], [6, 0, 1, 2, 3, 4, 5]]
    # The first sequence took part in no forward after its end.
    assert result.stats.forwards[0] == 2


@pytest.mark.parametrize(("n_heads", "rule"), [(1, "exact"), (4, "exact"), (4, "block")])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"temperature": 0.7}])
def test_sampled_continuations_have_the_models_distribution(n_heads, rule, filters):
    """Three tokens of a five-word model, against their enumerated joint law."""
    model = sharp_model(3, vocab_size=5, n_layers=4, dim=16, ffn_dim=16)
    with torch.no_grad():
        model.unembedding.weight.div_(3)
    temperature, top_k = filters.get("temperature", 1.0), filters.get("top_k")
    prompt = torch.tensor([1, 4, 2])
    law = torch.ones(1, dtype=torch.float64)
    contexts = prompt[None]
    with torch.no_grad():
        for _ in range(3):
            logits = model.logits(contexts)[:, -1].double() / temperature
            if top_k:
                cut = logits.topk(top_k).values[:, -1:]
                logits = logits.masked_fill(logits < cut, -torch.inf)
            law = (law[:, None] * logits.softmax(-1)).flatten()
            contexts = torch.cat(
                [contexts.repeat_interleave(5, 0), torch.arange(5).repeat(len(contexts))[:, None]],
                1,
            )
    count = 8000
    result = generate(
        model,
        prompt.expand(count, -1),
        3,
        n_heads=n_heads,
        rule=rule,
        seed=11,
        temperature=temperature,
        top_k=top_k,
    )
    drawn = torch.stack(result.tokens) @ torch.tensor([25, 5, 1])
    observed = torch.bincount(drawn, minlength=125).double()
    assert observed[law == 0].sum() == 0
    expected = law[law > 0] * count
    observed = observed[law > 0]
    rare = expected < 5  # chi-squared wants cells that are not almost empty: pool these
    cells = [torch.cat([x[~rare], x[rare].sum(0, keepdim=True)]) for x in (observed, expected)]
    kept = cells[1] > 0
    p_value = chisquare(cells[0][kept], cells[1][kept] * (count / cells[1].sum())).pvalue
    assert p_value > 1e-4
    if n_heads > 1:
        assert 0.05 < result.stats.acceptance[0] < 0.95  # both branches were taken


def test_limits_at_the_context():
    model, prompt = sharp_model(), ragged_prompts(90)[0]
    result = generate(model, [prompt], 6)  # 96 tokens: the whole context
    assert torch.equal(result.tokens[0], greedy_by_recomputation(model, prompt, 6))
    with pytest.raises(ValueError, match=r"prompts\[0\] has 90 tokens.*context of 96"):
        generate(model, [prompt], 7)


@pytest.mark.parametrize(
    ("prompts", "changes", "error", "message"),
    [
        ([], {}, ValueError, "prompts is empty"),
        ([torch.zeros(0, dtype=torch.int64)], {}, ValueError, r"prompts\[0\] must be 1-D"),
        ([torch.zeros(2)], {}, TypeError, r"prompts\[0\] must hold token ids"),
        ([torch.tensor([1]), torch.tensor([40])], {}, ValueError, r"prompts\[1\] .* \[0, 40\)"),
        ([torch.tensor([-1])], {}, ValueError, r"outside \[0, 40\)"),
        ([torch.tensor([1])], {"n_heads": 0}, ValueError, r"n_heads must be in \[1, 4\], got 0"),
        ([torch.tensor([1])], {"n_heads": 5}, ValueError, r"n_heads must be in \[1, 4\], got 5"),
        ([torch.tensor([1])], {"max_new_tokens": 0}, ValueError, "max_new_tokens must be"),
        ([torch.tensor([1])], {"temperature": -1.0}, ValueError, "temperature"),
    ],
)
def test_bad_input(prompts, changes, error, message):
    with pytest.raises(error, match=message):
        generate(sharp_model(), prompts, **{"max_new_tokens": 4, **changes})


def test_a_model_of_nan_is_an_error_and_not_a_loop():
    model = sharp_model()
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"not finite for prompts \[0\]"):
        generate(model, [torch.tensor([1])], 4)

    one_bad_word = sharp_model()
    with torch.no_grad():
        one_bad_word.embedding.weight[7] = torch.nan
    prompts = [torch.tensor([1]), torch.tensor([7]), torch.tensor([3, 2])]
    with pytest.raises(RuntimeError, match=r"not finite for prompts \[.*1.*\]"):
        generate(one_bad_word, prompts, 4)


def test_a_foreign_trunk_has_no_cache():
    model = MTPTransformer(CONFIG, trunk=nn.Identity())
    with pytest.raises(TypeError, match="needs a Trunk, the model has a Identity"):
        generate(model, [torch.tensor([1])], 4)
