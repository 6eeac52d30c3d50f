"""Self-speculative generation against full recomputation, and its interface."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_fast.decoding import generate
from mtp_fast.decoding.incremental import PreparedModel
from mtp_fast.decoding.speculative import STEPS_PER_CHECK, _Decoder
from mtp_fast.models import MTPTransformer
from tiny_models import CONFIG, cyclic_model, ragged_prompts, sharp_model

pytestmark = pytest.mark.usefixtures("layers")


@torch.no_grad()
def greedy_by_recomputation(model: MTPTransformer, prompt: torch.Tensor, count: int):
    tokens = prompt
    for _ in range(count):
        best = model.logits(tokens[None])[0, -1].argmax()
        tokens = torch.cat([tokens, best[None]])
    return tokens[len(prompt) :]


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


@pytest.mark.parametrize("limits", [[9, 30, 1], torch.tensor([9, 30, 1])])
def test_each_sequence_has_its_limit(limits):
    model, prompts = sharp_model(), ragged_prompts(9, 2, 5)
    result = generate(model, prompts, limits)
    assert [len(tokens) for tokens in result.tokens] == [9, 30, 1]
    for b, limit in enumerate([9, 30, 1]):
        alone = generate(model, [prompts[b]], limit)
        assert torch.equal(result.tokens[b], alone.tokens[0])
        assert result.stats.forwards[b] == alone.stats.forwards[0]


@pytest.mark.parametrize("n_heads", [1, 4])
def test_several_end_tokens_shared_or_one_set_a_sequence(n_heads):
    model, prompts = cyclic_model(7), [torch.tensor([2, 3]), torch.tensor([5])]
    for ends in ([2, 5], torch.tensor([2, 5])):
        result = generate(model, prompts, 20, n_heads=n_heads, eos_token_id=ends)
        assert [tokens.tolist() for tokens in result.tokens] == [[4, 5], [6, 0, 1, 2]]
    own = torch.tensor([[6, -1], [1, 0]])
    result = generate(model, prompts, 20, n_heads=n_heads, eos_token_id=own)
    assert [tokens.tolist() for tokens in result.tokens] == [[4, 5, 6], [6, 0]]
    assert result.stats.acceptance == [1.0] * (n_heads - 1)  # an end is no disagreement


def test_sampling_arguments_may_differ_by_sequence():
    model, prompts = sharp_model(), ragged_prompts(9, 2, 5, 7)
    sampling = {
        "temperature": torch.tensor([0.0, 1.0, 0.7, 1.3]),
        "top_k": torch.tensor([0, 0, 5, 0]),
        "top_p": torch.tensor([1.0, 1.0, 0.9, 1.0]),
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.05]),
    }
    seeds = [5, 77, 5, -1]
    batch = generate(model, prompts, 25, seed=seeds, **sampling)
    assert torch.equal(
        torch.stack(batch.tokens),
        torch.stack(generate(model, prompts, 25, seed=torch.tensor(seeds), **sampling).tokens),
    )
    for b, prompt in enumerate(prompts):
        own = {name: values[b].item() for name, values in sampling.items()}
        alone = generate(model, [prompt], 25, seed=seeds[b], **own)
        assert torch.equal(batch.tokens[b], alone.tokens[0])
        assert batch.stats.forwards[b] == alone.stats.forwards[0]


def test_equal_seeds_give_equal_streams():
    model, prompt = sharp_model(), ragged_prompts(5)[0]
    one, other, third = generate(model, [prompt] * 3, 20, temperature=1.0, seed=[4, 4, 5]).tokens
    assert torch.equal(one, other)
    assert not torch.equal(one, third)


def test_tokens_are_reported_as_they_are_committed():
    model, prompts = sharp_model(), ragged_prompts(9, 2, 5)
    chunks: list[list[torch.Tensor]] = [[] for _ in prompts]
    result = generate(model, prompts, [20, 3, 11], on_tokens=lambda b, new: chunks[b].append(new))
    for b, pieces in enumerate(chunks):
        assert torch.equal(torch.cat(pieces), result.tokens[b])
        assert len(pieces) == result.stats.forwards[b]  # one report a forward
        assert len(pieces[0]) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steps_beyond_the_end_change_nothing(temperature, monkeypatch):
    """As on CUDA, where an end is noticed late."""
    model, prompts = sharp_model(), ragged_prompts(9, 2, 5)
    options = {"temperature": temperature, "eos_token_id": [3, 17]}
    expected = generate(model, prompts, [25, 4, 11], **options)
    chunks: list[list[torch.Tensor]] = [[] for _ in prompts]
    monkeypatch.setitem(STEPS_PER_CHECK, "cpu", 16)
    late = generate(
        model, prompts, [25, 4, 11], on_tokens=lambda b, new: chunks[b].append(new), **options
    )
    for b, tokens in enumerate(expected.tokens):
        assert torch.equal(late.tokens[b], tokens)
        assert torch.equal(torch.cat(chunks[b]), tokens)
        assert torch.equal(late.drafted[b], expected.drafted[b])
    assert late.stats.forwards == expected.stats.forwards
    assert late.stats.acceptance == expected.stats.acceptance


class NoWaiting(TorchDispatchMode):
    """Fails on what would wait for a CUDA device, or gives shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
        assert not any(func.__name__.startswith(f"{name}.") for name in waits), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n_heads", [1, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@torch.inference_mode()
def test_a_step_can_be_captured(n_heads, temperature):
    """It waits for nothing, and keeps its state in the same memory."""
    prompts, limits = ragged_prompts(9, 2), torch.tensor([20, 20])
    sampling = {"temperature": temperature, "top_k": None, "top_p": 0.9, "min_p": None}
    decoder = _Decoder(
        PreparedModel(sharp_model()),
        prompts,
        limits,
        n_heads,
        sampling,
        "exact",
        torch.tensor([1, 2]),
        torch.tensor([[7]]),
    )
    decoder.prefill()
    state = lambda: {  # noqa: E731
        name: value.data_ptr()
        for owner in (decoder, decoder.progress)
        for name, value in vars(owner).items()
        if torch.is_tensor(value)
    }
    before = state()
    with NoWaiting():
        decoder.step()
    assert state() == before
    assert decoder.progress.produced.min() >= 2


def test_arguments_that_go_out_of_range_under_way_are_found():
    temperature = torch.ones(2)
    with pytest.raises(ValueError, match=r"temperature\[1\]: expected .*, got -2"):
        generate(
            sharp_model(),
            ragged_prompts(9, 4),
            20,
            temperature=temperature,
            on_tokens=lambda b, tokens: temperature[1].fill_(-2),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prepared_model_gives_what_the_model_gives(dtype):
    """With any number of its heads, one call after the other, and one within another."""
    model, prompts = sharp_model().to(dtype), ragged_prompts(9, 4, 17)
    prepared = PreparedModel(model)
    outer = generate(
        prepared, prompts, 20, on_tokens=lambda b, _: generate(prepared, [prompts[b]], 3)
    )
    for n_heads in (4, 1, 3, None):
        for options in ({}, {"temperature": 1.0, "top_k": 5, "seed": 3}):
            expected = generate(model, prompts, 20, n_heads=n_heads, **options)
            result = generate(prepared, prompts, 20, n_heads=n_heads, **options)
            assert result.stats.forwards == expected.stats.forwards
            for mine, theirs in zip(result.tokens, expected.tokens, strict=True):
                assert torch.equal(mine, theirs)
            if n_heads is None and not options:
                assert all(map(torch.equal, outer.tokens, expected.tokens))


def test_a_model_is_prepared_with_some_of_its_heads():
    model, prompts = sharp_model(), ragged_prompts(9)
    prepared = PreparedModel(model, 2)
    assert generate(prepared, prompts, 8).stats.acceptance == (
        generate(model, prompts, 8, n_heads=2).stats.acceptance
    )
    with pytest.raises(ValueError, match=r"n_heads must be in \[1, 2\], got 3"):
        generate(prepared, prompts, 8, n_heads=3)
    for n_heads in (0, 5):
        with pytest.raises(ValueError, match=rf"n_heads must be in \[1, 4\], got {n_heads}"):
            PreparedModel(model, n_heads)


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
        ([torch.tensor([1])], {"max_new_tokens": [4, 4]}, ValueError, "one for each of 1 prompts"),
        ([torch.tensor([1])] * 2, {"max_new_tokens": [4, 0]}, ValueError, "at least 1, got 0"),
        ([torch.tensor([1])], {"max_new_tokens": 2.5}, TypeError, "max_new_tokens must hold int"),
        ([torch.tensor([1])] * 2, {"max_new_tokens": [1, 99]}, ValueError, r"prompts\[1\] .*=99"),
        ([torch.tensor([1])], {"temperature": -1.0}, ValueError, "temperature"),
        ([torch.tensor([1])], {"temperature": torch.ones(2)}, ValueError, "temperature"),
        ([torch.tensor([1])], {"seed": [1, 2]}, ValueError, "seed must be one integer or one"),
        ([torch.tensor([1])], {"seed": 2**64}, TypeError, "seed must hold 64-bit integers"),
        ([torch.tensor([1])], {"eos_token_id": [[1], [2]]}, ValueError, "eos_token_id must be"),
        ([torch.tensor([1])], {"eos_token_id": "\n"}, TypeError, "eos_token_id must hold"),
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
