"""The interface of speculative_accept and sample: bad input, torch.compile, and regressions of
faults that implementations of this step have had."""

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import draws, emulated
from mtp_fast.ops import reference
from mtp_fast.ops.acceptance import (
    prepare_acceptance,
    prepare_sample,
    sample,
    speculative_accept,
)

B, K, V = 3, 2, 11


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_hot(*ids: int, vocab: int = V) -> Tensor:
    """(len(ids), V) logits that put all mass on one id each."""
    return torch.full((len(ids), vocab), -torch.inf).scatter(1, torch.tensor(ids).unsqueeze(1), 0.0)


TARGET = rows(B, K + 1, V)
DRAFTS = torch.zeros(B, K, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target_logits": [1.0]}, TypeError, "target_logits: expected a tensor"),
        ({"target_logits": TARGET.double()}, TypeError, "target_logits: expected torch.float32"),
        ({"target_logits": TARGET[0]}, ValueError, r"target_logits: expected shape \(B, K\+1, V\)"),
        ({"target_logits": TARGET[:, :0]}, ValueError, r"target_logits: expected K\+1 >= 1"),
        ({"target_logits": TARGET[..., :0]}, ValueError, "target_logits: expected V >= 1"),
        ({"target_logits": TARGET[:, :K]}, ValueError, r"draft_tokens: expected shape \(B, K\)"),
        ({"draft_tokens": DRAFTS.float()}, TypeError, "draft_tokens: expected torch.int64"),
        ({"draft_tokens": DRAFTS[:1]}, ValueError, "draft_tokens: expected shape"),
        ({"draft_tokens": DRAFTS.to("meta")}, ValueError, "draft_tokens: expected device cpu"),
        ({"target_logits": TARGET.to("meta")}, ValueError, "target_logits: expected a CPU or CUDA"),
        ({"draft_logits": TARGET}, ValueError, r"draft_logits: expected shape \(B, K, V\)"),
        ({"draft_logits": TARGET[:, :K].half()}, TypeError, "draft_logits: expected torch.float32"),
        ({"draft_logits": TARGET[:, :K].to("meta")}, ValueError, "draft_logits: expected a CPU"),
        ({"num_draft": torch.tensor([0, 1])}, ValueError, r"num_draft: expected shape \(B,\)"),
        ({"num_draft": torch.ones(B)}, TypeError, "num_draft: expected an integer dtype"),
        ({"num_draft": 2}, TypeError, "num_draft: expected a tensor"),
        ({"temperature": -0.5}, ValueError, "temperature: expected a finite number >= 0, got -0.5"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"temperature": torch.ones(B, dtype=torch.int64)}, TypeError, "temperature"),
        ({"temperature": "hot"}, TypeError, "temperature: expected a number"),
        ({"top_k": -1}, ValueError, "top_k: expected an integer >= 0"),
        ({"top_k": 2.0}, TypeError, "top_k: expected an integer"),
        ({"top_p": 0.0}, ValueError, "top_p: expected 0 < top_p <= 1, got 0"),
        ({"top_p": 1.5}, ValueError, "top_p"),
        ({"min_p": 1.0}, ValueError, "min_p: expected 0 <= min_p < 1, got 1"),
        ({"seed": 1.5}, TypeError, "seed: expected an integer"),
        ({"seed": 2**63}, ValueError, "seed: expected an integer of 64 bits"),
        ({"position": torch.zeros(B + 1, dtype=torch.int64)}, ValueError, "position"),
        ({"rule": "greedy"}, ValueError, "rule: expected .*got 'greedy'"),
        ({"typical_epsilon": 2.0}, ValueError, "typical_epsilon"),
        ({"typical_delta": -1.0}, ValueError, "typical_delta"),
        ({"eos_token_id": 1.0}, TypeError, "eos_token_id: expected an integer"),
        ({"pad_token_id": None}, TypeError, "pad_token_id: expected an integer"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        speculative_accept(**{"target_logits": TARGET, "draft_tokens": DRAFTS, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": TARGET}, ValueError, r"logits: expected shape \(B, V\)"),
        ({"logits": TARGET[:, 0].to("meta")}, ValueError, "expected a CPU or CUDA tensor"),
        ({"index": -1}, ValueError, "index: expected an integer"),
        ({"index": 0.5}, TypeError, "index: expected an integer"),
    ],
)
def test_sample_names_bad_input(arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        sample(**{"logits": TARGET[:, 0], **arguments})


@pytest.mark.parametrize(
    ("name", "values", "bad"),
    [
        ("num_draft", [0, K + 1, 1], 1),
        ("num_draft", [0, 1, -1], 2),
        ("temperature", [1.0, torch.inf, 1.0], 1),
        ("temperature", [1.0, 1.0, torch.nan], 2),
        ("top_k", [1, 1, -2], 2),
        ("top_p", [1.0, 0.0, 0.5], 1),
        ("top_p", [1.0, 1.0, 7.0], 2),
        ("min_p", [-0.1, 0.0, 0.5], 0),
    ],
)
def test_bad_value_of_a_sequence(name: str, values: list[float], bad: int) -> None:
    """Named on the CPU; on CUDA, where the host does not know it, the sequence emits nothing."""
    arguments: dict[str, Any] = {"temperature": 1.0, name: torch.tensor(values)}
    calls = [lambda: speculative_accept(TARGET, DRAFTS, **arguments).tokens]
    if name != "num_draft":
        calls.append(lambda: sample(TARGET[:, 0], **arguments).unsqueeze(1))
    for call in calls:
        if emulated():
            emitted = (call() != -1).any(1)
            assert emitted.tolist() == [b != bad for b in range(B)]
        else:
            with pytest.raises(
                ValueError, match=rf"{name}\[{bad}\]: expected .*, got {values[bad]}"
            ):
                call()


def test_empty_batch() -> None:
    result = speculative_accept(TARGET[:0], DRAFTS[:0], return_logprobs=True)
    assert [tuple(field.shape) for field in result] == [(0, K + 1), (0,), (0,), (0, K + 1)]
    assert sample(TARGET[:0, 0]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs_and_integer_dtypes(dtype: torch.dtype) -> None:
    logits = rows(B, 2 * K + 1, V).to(dtype)
    target, draft = logits[:, : K + 1], logits[:, K + 1 :]
    sampling = {"temperature": 1.0, "seed": 7}
    drafts = torch.stack([sample(draft[:, i], index=i, **sampling) for i in range(K)], 1)
    expected = speculative_accept(
        target.contiguous(), drafts, draft_logits=draft.contiguous(), **sampling
    )
    per_sequence = {
        "temperature": torch.ones(B, 2, dtype=torch.float64)[:, 0],
        "seed": torch.full((B,), 7, dtype=torch.int32),
        "num_draft": torch.full((2 * B,), K, dtype=torch.int32)[::2],
    }
    transposed = target.transpose(1, 2).contiguous().transpose(1, 2)
    for view in (target, transposed):
        result = speculative_accept(
            view, drafts.int().t().contiguous().t(), draft_logits=draft, **per_sequence
        )
        assert torch.equal(result.tokens, expected.tokens)
        assert torch.equal(result.num_tokens, expected.num_tokens)
    one = speculative_accept(TARGET[:1].to(dtype).expand(5, -1, -1), DRAFTS[:1].expand(5, -1))
    assert (one.tokens == one.tokens[0]).all()


def per_sequence_arguments() -> tuple[Tensor, ...]:
    reals = [torch.full((B,), value) for value in (0.8, 0.9, 0.01)]
    integers = [torch.full((B,), value) for value in (5, 3, 4)]
    return (reals[0], integers[0], reals[1], reals[2], integers[1], integers[2])


@pytest.mark.parametrize("draft_logits", [None, rows(B, K, V)])
@pytest.mark.parametrize("return_logprobs", [False, True])
def test_opcheck(draft_logits: Tensor | None, return_logprobs: bool) -> None:
    arguments = (TARGET, DRAFTS, draft_logits, None, *per_sequence_arguments())
    arguments += ("exact", 0.3, 0.09, -1, -1, return_logprobs)
    torch.library.opcheck(torch.ops.mtp_fast.speculative_accept.default, arguments)
    torch.library.opcheck(
        torch.ops.mtp_fast.sample.default, (TARGET[:, 0], *per_sequence_arguments(), 1)
    )


def test_compiles_without_graph_breaks() -> None:
    def step(target: Tensor, draft: Tensor, temperature: Tensor) -> tuple[Tensor, ...]:
        sampling = {"temperature": temperature, "top_k": 7, "seed": 5}
        drafts = torch.stack([sample(draft[:, i], index=i, **sampling) for i in range(K)], 1)
        result = speculative_accept(
            target * 2, drafts, draft_logits=draft, return_logprobs=True, **sampling
        )
        assert result.logprobs is not None
        return result.tokens + 1, result.num_tokens, result.logprobs.exp()

    arguments = (TARGET.clone().requires_grad_(), rows(B, K, V, seed=1), torch.ones(B))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(*arguments), step(*arguments), strict=True):
        assert torch.equal(ours, expected)
        assert not ours.requires_grad


# ---- Regressions of others' faults ----


def test_draft_verdict_residual_and_bonus_use_different_draws() -> None:
    """At one index all four purposes draw independently."""
    seed = torch.arange(20_000)
    salts = (reference.SALT_DRAFT, reference.SALT_ACCEPT, reference.SALT_RESIDUAL)
    position = torch.zeros_like(seed)
    u = torch.stack(
        [reference.uniform(seed, position, position, s) for s in (*salts, reference.SALT_BONUS)]
    )
    assert (torch.corrcoef(u) - torch.eye(4)).abs().max() < 0.03


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_drafts_of_any_layout(dtype: torch.dtype) -> None:
    best = TARGET[:, :K].argmax(-1)
    best[1, 1] = (best[1, 1] + 1) % V
    expected = speculative_accept(TARGET, best)
    assert expected.num_accepted.tolist() == [K, 1, K]
    wide = torch.full((2 * B, 3 * K + 1), 5, dtype=dtype)
    for drafts in (
        wide[:B, 1 : K + 1],
        wide[::2, K : 2 * K],
        wide[:B, : 2 * K : 2],
        wide[:K, :B].T,
    ):
        drafts.copy_(best)
        result = speculative_accept(TARGET, drafts)
        assert torch.equal(result.tokens, expected.tokens)
        assert torch.equal(result.num_accepted, expected.num_accepted)
        assert torch.equal(drafts, best.to(dtype))


def test_a_prepared_call_sees_what_the_tensors_hold() -> None:
    """Each time as a call of its own would, into the same memory."""
    target, drafts, position = TARGET.clone(), DRAFTS.clone(), torch.arange(B)
    sampling = {"temperature": 1.0, "seed": 5, "position": position, "return_logprobs": True}
    accept = prepare_acceptance(target, drafts, **sampling)
    tokens = torch.empty(B, dtype=torch.int64)
    filters = {"top_k": 3, "top_p": None, "min_p": None}
    settings = {"temperature": 1.0, "seed": 5, "position": position, **filters}
    draw = prepare_sample(target[:, 0], tokens, 1, **settings)
    results = []
    for turn in range(3):
        target.add_(torch.randn_like(target) * turn)
        drafts.copy_(target[:, :K].argmax(-1))
        position.add_(turn)
        result, expected = accept(), speculative_accept(target, drafts, **sampling)
        draw()
        assert all(map(torch.equal, result, expected))
        assert torch.equal(tokens, sample(target[:, 0], index=1, **settings))
        results.append((result, result.tokens.clone()))
    assert all(map(torch.equal, results[0][0], results[2][0]))
    assert not torch.equal(results[0][1], results[2][1])


def test_a_prepared_call_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="temperature: expected a finite number >= 0, got -1"):
        prepare_acceptance(TARGET, DRAFTS, temperature=-1)
    with pytest.raises(TypeError, match="rules"):
        prepare_acceptance(TARGET, DRAFTS, rules="exact")
    settings = dict.fromkeys(("top_k", "top_p", "min_p", "position"))
    with pytest.raises(ValueError, match=r"index: expected an integer in .*, got -1"):
        prepare_sample(TARGET[:, 0], DRAFTS[:, 0], -1, temperature=1.0, seed=0, **settings)


def test_a_prepared_call_checks_values_that_are_out_of_range_by_then() -> None:
    temperature = torch.ones(B)
    accept = prepare_acceptance(TARGET, DRAFTS, temperature=temperature)
    accept()
    temperature[1] = -2
    with pytest.raises(ValueError, match=r"temperature\[1\]: expected .*, got -2"):
        accept()


def test_sequence_without_drafts_consumes_no_draws_of_others() -> None:
    sampling = {"temperature": 1.0, "seed": 3, "position": torch.arange(B)}
    full = speculative_accept(TARGET, DRAFTS, **sampling)
    ragged = speculative_accept(TARGET, DRAFTS, num_draft=torch.tensor([0, K, K]), **sampling)
    assert torch.equal(full.tokens[1:], ragged.tokens[1:])
    alone = speculative_accept(TARGET[:1, :1], DRAFTS[:1, :0], temperature=1.0, seed=3)
    assert ragged.tokens[0].tolist() == [*alone.tokens[0].tolist(), -1, -1]


def test_each_sequence_follows_its_own_seed_and_position() -> None:
    """Not the first seed for all, and no stream shared by equal seeds at other positions."""
    logits = torch.zeros(4, 1, 10_000)
    drafts = torch.empty(4, 0, dtype=torch.int64)
    seed, position = torch.tensor([0, 1, 0, 0]), torch.tensor([0, 0, 1, 2**40])
    tokens = speculative_accept(
        logits, drafts, temperature=1.0, seed=seed, position=position
    ).tokens
    assert len(set(tokens.flatten().tolist())) == 4
    for b in range(4):
        alone = speculative_accept(
            logits[:1], drafts[:1], temperature=1.0, seed=int(seed[b]), position=int(position[b])
        )
        assert alone.tokens.item() == tokens[b].item()


@pytest.mark.parametrize("vocab", [1, 7, 129, 1000])
@pytest.mark.parametrize("rule", ["exact", "block"])
def test_no_token_outside_the_vocabulary(vocab: int, rule: str) -> None:
    """Nor one of no probability, however close u comes to 1."""
    runs = draws(50_000)
    logits = rows(3, vocab)
    logits[:, -1] = -torch.inf if vocab > 1 else 0.0
    drafts = torch.full((runs, 2), vocab - 1)
    result = speculative_accept(
        logits.expand(runs, 3, vocab), drafts, temperature=1.0, seed=torch.arange(runs), rule=rule
    )
    last = result.tokens[torch.arange(runs), result.num_tokens.long() - 1]
    assert last.min() >= 0
    assert last.max() <= max(0, vocab - 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_finite_logit_end_the_emission(
    dtype: torch.dtype, temperature: float
) -> None:
    """In place of an argmax of NaN out of bounds."""
    for value in (torch.nan, -torch.nan, -torch.inf):
        for row in range(3):
            target = one_hot(4, 5, 6).unsqueeze(0).to(dtype)
            target[0, row] = value
            result = speculative_accept(
                target, torch.tensor([[4, 5]]), temperature=temperature, return_logprobs=True
            )
            assert (int(result.num_tokens), int(result.num_accepted)) == (row, row)
            assert result.tokens[0].tolist() == [4, 5][:row] + [-1] * (3 - row)
            assert torch.equal(result.logprobs, torch.zeros(1, 3))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rule", ["exact", "block", "typical"])
@pytest.mark.parametrize("bad", [-1, V, 2**40, -(2**63)])
def test_nothing_is_accepted_after_an_invalid_draft(
    temperature: float, rule: str, bad: int
) -> None:
    target = one_hot(4, 5, 6, 7).unsqueeze(0)
    drafts = torch.tensor([[4, bad, 6]])
    result = speculative_accept(target, drafts, temperature=temperature, rule=rule)
    assert result.tokens.tolist() == [[4, 5, -1, -1]]
    assert (int(result.num_tokens), int(result.num_accepted)) == (2, 1)


@pytest.mark.parametrize("rule", ["exact", "block"])
def test_empty_residual_and_a_draft_of_no_probability(rule: str) -> None:
    """p == q and q(draft) = 0: rejected, and what is emitted still comes from p, without NaN."""
    target = one_hot(4, 5).unsqueeze(0)
    result = speculative_accept(
        target, torch.tensor([[2]]), draft_logits=target[:, :1], temperature=1.0, rule=rule
    )
    assert result.tokens.tolist() == [[4, -1]]
    assert int(result.num_accepted) == 0


@pytest.mark.parametrize("rule", ["exact", "block"])
def test_drafts_from_the_target_itself_are_all_accepted(rule: str) -> None:
    runs, width, vocab = draws(20_000), 3, 50
    target = rows(width + 1, vocab).bfloat16().expand(runs, width + 1, vocab)
    sampling = {"temperature": 0.9, "top_p": 0.8, "seed": torch.arange(runs)}
    drafts = torch.stack([sample(target[:, i], index=i, **sampling) for i in range(width)], 1)
    result = speculative_accept(
        target, drafts, draft_logits=target[:, :width], rule=rule, **sampling
    )
    assert (result.num_accepted == width).all()


@pytest.mark.parametrize(("temperature", "rule"), [(0.0, "exact"), (1.0, "exact"), (1.0, "block")])
def test_emission_ends_with_eos(temperature: float, rule: str) -> None:
    target = one_hot(4, 5, 6, 7).unsqueeze(0)
    drafts = torch.tensor([[4, 5, 6]])
    cut = {4: (1, 1), 5: (2, 2), 6: (3, 3), 7: (4, 3), 8: (4, 3), None: (4, 3)}
    for eos, (tokens, accepted) in cut.items():
        result = speculative_accept(
            target, drafts, temperature=temperature, rule=rule, eos_token_id=eos, pad_token_id=99
        )
        assert (int(result.num_tokens), int(result.num_accepted)) == (tokens, accepted)
        assert result.tokens[0].tolist() == [4, 5, 6, 7][:tokens] + [99] * (4 - tokens)
