"""A decode step in one call, against the model's own forward, with every instruction set.

The kernel is driven through `IncrementalModel`, which hands it all that it does on a CPU.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mtp_fast.decoding import cpu_layers, generate
from mtp_fast.decoding.cpu_layers import runs_on_cpu
from mtp_fast.decoding.incremental import IncrementalModel, PreparedModel
from mtp_fast.decoding.speculative import _Decoder
from mtp_fast.models import Block
from tiny_models import draft_logits, ragged_prompts, round_drafting_heads, sharp_model

# Layers that two threads take a half of each, with every instruction set; dim is odd.
HALVES = {"dim": 51, "attention_head_dim": 16, "ffn_dim": 640}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# Extents that are no multiple of any vector, and every option that changes a block.
SHAPES = {
    "plain": {},
    "one key head": {"n_kv_heads": 1},
    "no groups": {"n_kv_heads": 4},
    "odd widths": {"dim": 51, "attention_head_dim": 6, "ffn_dim": 37, "n_attention_heads": 3,
                   "n_kv_heads": 1},
    "wide heads": {"attention_head_dim": 70, "n_attention_heads": 2, "n_kv_heads": 1},
    "halves": HALVES,
    "halves of one head": {"dim": 64, "n_attention_heads": 2, "ffn_dim": 128},
    "bias": {"qkv_bias": True},
    "head norms": {"qk_norm": True},
    "both": {"qkv_bias": True, "qk_norm": True, "dim": 40, "ffn_dim": 100},
}  # fmt: skip


def model_with_biases(**changes):
    model = sharp_model(**changes)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    return model


def as_decoded(model):
    """A copy in float64 with the weights that decoding uses."""
    return round_drafting_heads(copy.deepcopy(model).double())


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are called from now on."""
    calls: list[str] = []
    call, bind = cpu_layers.call_kernel, cpu_layers.bind_kernel

    def recorded(name, *args):
        calls.append(name)
        return call(name, *args)

    def bound(name, *args):
        kernel = bind(name, *args)

        def recorded():
            calls.append(name)
            return kernel()

        return recorded

    monkeypatch.setattr(cpu_layers, "call_kernel", recorded)
    monkeypatch.setattr(cpu_layers, "bind_kernel", bound)
    return calls


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 4, 5])
@torch.no_grad()
def test_against_the_models_forward_in_float64(decode_level, monkeypatch, dtype, shape, rows):
    """Ragged sequences, every position, every head; the error is that of the inputs' rounding."""
    model = model_with_biases(**SHAPES[shape]).to(dtype)
    exact = as_decoded(model)
    calls = calls_of(monkeypatch)
    tokens = torch.randint(0, 40, (3, 30))
    cached = IncrementalModel(model, 4, batch=3, capacity=32)
    cached.forward(tokens[:, :20], cached.rows(torch.zeros(3, dtype=torch.int64), 20, 20))
    assert calls == ["decode_pack", "decode_pack", "decode_layers"]  # one piece
    calls.clear()
    start = torch.tensor([0, 7, 19])
    granted = {torch.float32: 2e-5, torch.bfloat16: 0.1, torch.float16: 0.01}[dtype]
    of_drafts = max(granted, 3e-4)  # their rows have 16 bits
    for _ in range(2):
        block = torch.stack([tokens[b, s : s + rows] for b, s in enumerate(start.tolist())])
        trunk, logits = cached.step(block, cached.rows(start, rows, 32))
        start = start + rows
        drafts = draft_logits(cached, trunk, cached.rows(start - 1, 1, 32))
        for b, end in enumerate(start.tolist()):
            context = tokens[b : b + 1, :end]
            want = [exact.logits(context)[0, end - rows : end]]
            want += [exact.logits(context, k)[0, -1] for k in (1, 2, 3)]
            got = [logits[b], *drafts[b]]
            for k, (mine, theirs) in enumerate(zip(got, want, strict=True)):
                allowed = of_drafts if k else granted
                assert (mine - theirs).abs().max() <= allowed * theirs.abs().max()
    assert calls == ["decode_layers", "decode_heads"] * 2


@DTYPES
@pytest.mark.parametrize("shape", [{"ffn_dim": 600}, HALVES], ids=["whole", "halves"])
@torch.no_grad()
def test_a_row_has_the_same_bits_beside_any_others(decode_level, dtype, shape):
    """Beside other sequences, beside other rows of its own, at any number of threads.

    Together they are so many, of so many inputs, that they take turns at parts of a weight.
    """
    batch = 9
    model = sharp_model(**shape).to(dtype)
    tokens = torch.randint(0, 40, (batch, 4))
    start = torch.zeros(batch, dtype=torch.int64)
    many = IncrementalModel(model, 4, batch=batch, capacity=8)
    trunk, together = many.forward(tokens, many.rows(start, 4, 8))
    drafts = draft_logits(many, trunk, many.rows(start + 3, 1, 8))
    threads = torch.get_num_threads()
    for b in range(batch):
        torch.set_num_threads(1 + b % 3)
        single = IncrementalModel(model, 4, batch=1, capacity=8)
        for t in range(4):
            rows = single.rows(start[:1] + t, 1, 8)
            trunk, alone = single.forward(tokens[b : b + 1, t : t + 1], rows)
            assert torch.equal(alone[0, 0], together[b, t])
        assert torch.equal(draft_logits(single, trunk, rows)[0], drafts[b])
    torch.set_num_threads(threads)


@contextlib.contextmanager
def two_threads_on_one_processor() -> Iterator[None]:
    count = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.randn(400, 400).exp()  # the threads begin
    allowed = os.sched_getaffinity(0)
    threads = [int(t) for t in os.listdir("/proc/self/task")]
    try:
        for thread in threads:
            os.sched_setaffinity(thread, {min(allowed)})
        yield
    finally:
        for thread in threads:
            os.sched_setaffinity(thread, allowed)
        torch.set_num_threads(count)


@torch.no_grad()
def test_a_thread_goes_on_without_the_other():
    """Whoever has the processor does both halves of a layer, until the other is back."""
    model = sharp_model(n_layers=130, **HALVES)
    tokens = torch.randint(0, 40, (1, 8))
    cached = IncrementalModel(model, 4, batch=1, capacity=8)
    rows = cached.rows(torch.zeros(1, dtype=torch.int64), 8, 8)
    want = [x.clone() for x in cached.step(tokens, rows)]
    with two_threads_on_one_processor():
        for _ in range(100):
            for x, y in zip(cached.step(tokens, rows), want, strict=True):
                assert torch.equal(x, y)
                x.zero_()


@DTYPES
@torch.no_grad()
def test_a_step_is_a_forward_and_its_logits(decode_level, dtype):
    """To the bit, and in pieces where the rows are many."""
    model = sharp_model().to(dtype)
    tokens = torch.randint(0, 40, (9, 30))
    cached = IncrementalModel(model, 4, batch=9, capacity=32)
    rows = cached.rows(torch.zeros(9, dtype=torch.int64), 30, 30)
    trunk, hidden = cached.forward(tokens, rows)
    again, logits = cached.step(tokens, rows)
    assert torch.equal(again, trunk)
    assert torch.equal(logits, cached.logits(hidden))


@DTYPES
@torch.no_grad()
def test_a_draft_that_is_not_finite_leaves_the_rows_before_it_alone(decode_level, dtype):
    model = sharp_model().to(dtype)
    model.embedding.weight[39] = torch.nan
    tokens = torch.tensor([[3, 1, 4, 1, 39, 5]])
    cached = IncrementalModel(model, 1, batch=1, capacity=8)
    zero = torch.zeros(1, dtype=torch.int64)
    want = cached.forward(tokens[:, :4], cached.rows(zero, 4, 8))[1]
    got = cached.forward(tokens, cached.rows(zero, 6, 8))[1]
    assert torch.equal(got[:, :4], want)
    assert got[:, 4:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", range(4))
@torch.no_grad()
def test_so_does_one_whose_values_in_one_attention_head_are_not_finite(decode_level, dtype, head):
    model = sharp_model(n_kv_heads=4).to(dtype)
    width = model.config.head_dim
    weight = model.trunk.blocks[0].attention.qkv.weight
    weight[:, 0] = 0
    weight[(8 + head) * width : (9 + head) * width, 0] = 1e38
    model.embedding.weight[:, 0] = 0
    model.embedding.weight[39] = 100 * torch.eye(32)[0]  # 5 or more, normalised
    tokens = torch.tensor([[3, 1, 4, 1, 39, 5]])
    cached = IncrementalModel(model, 1, batch=1, capacity=8)
    zero = torch.zeros(1, dtype=torch.int64)
    want = cached.forward(tokens[:, :4], cached.rows(zero, 4, 8))[1]
    got = cached.forward(tokens, cached.rows(zero, 6, 8))[1]
    assert want.isfinite().all()
    assert torch.equal(got[:, :4], want)
    assert got[:, 4:].isnan().all()


@torch.no_grad()
def test_torch_multiplies_as_before_behind_a_step():
    """Both set up the matrix registers, where the processor has them."""
    x, weight = torch.randn(64, 64).bfloat16(), torch.randn(96, 64).bfloat16()
    want = x @ weight.t()
    model = sharp_model().bfloat16()
    tokens = torch.randint(0, 40, (1, 3))
    cached = IncrementalModel(model, 1, batch=1, capacity=8)
    hidden = cached.forward(tokens, cached.rows(torch.zeros(1, dtype=torch.int64), 3, 8))[1]
    assert torch.equal(x @ weight.t(), want)
    again = cached.forward(tokens, cached.rows(torch.zeros(1, dtype=torch.int64), 3, 8))[1]
    assert torch.equal(again, hidden)


@pytest.mark.parametrize("factor", [1e3, 1e6, 1e9])
@torch.no_grad()
def test_large_attention_scores(decode_level, factor):
    """Then the largest alone counts; its weight must be 1."""
    model = sharp_model()
    for block in model.modules():
        if isinstance(block, Block):
            block.attention.qkv.weight[: 6 * model.config.head_dim] *= factor
    exact, tokens = copy.deepcopy(model).double(), torch.randint(0, 40, (2, 12))
    cached = IncrementalModel(model, 1, batch=2, capacity=12)
    got = cached.step(tokens, cached.rows(torch.zeros(2, dtype=torch.int64), 12, 12))[1]
    want = exact.logits(tokens)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@torch.no_grad()
def drafted(model):
    """Head 0's logits and the drafting heads', behind five tokens."""
    cached = IncrementalModel(model, len(model.heads), batch=1, capacity=8)
    zero = torch.zeros(1, dtype=torch.int64)
    trunk, logits = cached.step(torch.tensor([[1, 2, 3, 4, 5]]), cached.rows(zero, 5, 8))
    return logits.clone(), draft_logits(cached, trunk, cached.rows(zero + 4, 1, 8))[0]


@DTYPES
@torch.no_grad()
def test_drafting_weights_at_the_ends_of_the_range(decode_level, dtype):
    """Outputs that are all 0, all subnormal, or large: each has a scale of its own."""
    model = sharp_model()
    down = model.heads[2].ffn.down.weight
    down[0], down[1] = 0.0, 1e-40
    down[2] *= 300.0
    model = model.to(dtype)
    exact = as_decoded(model)
    _, drafts = drafted(model)
    want = exact.logits(torch.tensor([[1, 2, 3, 4, 5]]), 2)[0, -1]
    granted = {torch.float32: 3e-4, torch.bfloat16: 0.1, torch.float16: 0.01}[dtype]
    assert (drafts[1] - want).abs().max() <= granted * want.abs().max()


@DTYPES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@torch.no_grad()
def test_a_drafting_weight_that_is_not_finite_spoils_its_head_alone(decode_level, dtype, bad):
    model = sharp_model().to(dtype)
    logits, drafts = drafted(model)
    model.heads[2].ffn.down.weight[3, 5] = bad
    got, spoilt = drafted(model)
    assert torch.equal(got, logits)
    assert not spoilt[1].isfinite().any()
    assert torch.equal(spoilt[[0, 2]], drafts[[0, 2]])


@torch.no_grad()
def test_more_int8_products_than_an_int32_can_hold(decode_level):
    model = sharp_model(n_layers=3, n_future_tokens=2, ffn_dim=140_000)
    model.heads[1].ffn.gate_up.weight[:] = model.heads[1].ffn.gate_up.weight[:1].abs()
    model.heads[1].ffn.down.weight[:] = torch.linspace(-1, 1, 32)[:, None] / 1000
    _, drafts = drafted(model)
    want = as_decoded(model).logits(torch.tensor([[1, 2, 3, 4, 5]]), 1)[0, -1]
    assert (drafts[0] - want).abs().max() <= 1e-3 * want.abs().max()


def test_memory_to_write_is_checked():
    cached = IncrementalModel(sharp_model(), 4, batch=2, capacity=8)
    zero = torch.zeros(2, dtype=torch.int64)
    trunk, _ = cached.step(torch.zeros(2, 1, dtype=torch.int64), cached.rows(zero, 1, 8))
    draft = lambda **memory: cached.draft_logits(trunk, zero, cached.rows(zero, 1, 8), **memory)  # noqa: E731
    out, drafts = torch.empty(2, 3, 40), torch.empty(2, 5, dtype=torch.int64)
    assert torch.equal(draft(), draft(out=out))
    draft(drafts=drafts[:, 1:4])
    assert torch.equal(drafts[:, 1:4], out.argmax(-1))
    for bad in (out.bfloat16(), out[:, :2], out.mT.contiguous().mT):
        with pytest.raises(ValueError, match=r"out: expected \(2, 3, 40\) of torch.float32, cont"):
            draft(out=bad)
    for bad in (drafts[:, :2], drafts[:, ::2], drafts[:, :3].int()):
        with pytest.raises(ValueError, match=r"drafts: expected \(2, 3\) of torch.int64, contig"):
            draft(drafts=bad)


@torch.no_grad()
def test_steps_take_no_more_and_more_memory():
    cached = IncrementalModel(sharp_model(), 4, batch=4, capacity=16)
    start, tokens = torch.full((4,), 8), torch.zeros(4, 4, dtype=torch.int64)

    def pages_after(steps):
        for _ in range(steps):
            trunk, _ = cached.step(tokens, cached.rows(start, 4, 16))
            cached.draft_logits(trunk, start - 8, cached.rows(start, 1, 16))
        return int(Path("/proc/self/statm").read_text().split()[1])

    before = pages_after(100)
    assert pages_after(1000) - before < 2000


@torch.no_grad()
def test_a_step_is_repeated_only_while_it_is_the_last():
    cached = IncrementalModel(sharp_model(), 1, batch=1, capacity=8)
    zero, tokens = torch.zeros(1, dtype=torch.int64), torch.tensor([[1, 2]])
    rows = cached.rows(zero, 2, 8)
    assert cached.repeated([], []) is None
    _, logits = cached.step(tokens, rows)
    want = logits.clone()
    again = cached.repeated([], [])
    logits.zero_()
    again()
    assert torch.equal(logits, want)
    cached.forward(tokens, rows)
    assert cached.repeated([], []) is None


@DTYPES
@torch.no_grad()
def test_long_contexts_attend_to_everything(decode_level, dtype):
    """More cached positions than a tile has, each of which counts."""
    model = sharp_model(max_seq_len=700).to(dtype)
    tokens = torch.randint(0, 40, (2, 700))
    cached = IncrementalModel(model, 1, batch=2, capacity=700)
    zero = torch.zeros(2, dtype=torch.int64)
    hidden = [
        cached.forward(piece, cached.rows(zero + begin, piece.shape[1], 700))[1]
        for begin, piece in ((0, tokens[:, :690]), (690, tokens[:, 690:]))
    ]
    want = model.double().logits(tokens)
    granted = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.01}[dtype]
    error = (cached.logits(torch.cat(hidden, 1)) - want).abs().max()
    assert error <= granted * want.abs().max()


@pytest.mark.parametrize("start", [[0, 7], [-1, 0]])
@torch.no_grad()
def test_rows_outside_the_cache_are_refused(start):
    cached = IncrementalModel(sharp_model(), 2, batch=2, capacity=8)
    rows = cached.rows(torch.tensor(start), 2, 8)
    message = r"rows at positions (7 to 8|-1 to 0) of sequence [01] lie outside a cache of 8"
    with pytest.raises(IndexError, match=message):
        cached.step(torch.zeros(2, 2, dtype=torch.int64), rows)


@torch.no_grad()
def test_no_rows_give_no_logits(decode_level):
    cached = IncrementalModel(sharp_model().bfloat16(), 2, batch=2, capacity=8)
    zero = torch.zeros(2, dtype=torch.int64)
    trunk, logits = cached.step(torch.zeros(2, 0, dtype=torch.int64), cached.rows(zero, 0, 8))
    assert trunk.shape[:2] == logits.shape[:2] == (2, 0)


@pytest.mark.parametrize("row", [-1, 2])
@torch.no_grad()
def test_rows_that_were_not_run_are_refused(row):
    cached = IncrementalModel(sharp_model(), 2, batch=1, capacity=8)
    zero = torch.zeros(1, dtype=torch.int64)
    trunk, _ = cached.step(torch.zeros(1, 2, dtype=torch.int64), cached.rows(zero, 2, 8))
    with pytest.raises(IndexError, match=f"row {row} of sequence 0 is not one of 2"):
        cached.draft_logits(trunk, zero + row, cached.rows(zero, 1, 8))


@torch.no_grad()
def test_logits_that_are_not_finite_draft_some_token(decode_level):
    model = sharp_model()
    model.unembedding.weight.fill_(torch.nan)
    cached = IncrementalModel(model, 4, batch=1, capacity=8)
    zero = torch.zeros(1, dtype=torch.int64)
    trunk, _ = cached.step(zero[:, None], cached.rows(zero, 1, 8))
    drafts = torch.full((1, 3), -1)
    cached.draft_logits(trunk, zero, cached.rows(zero, 1, 8), drafts=drafts)
    assert ((drafts >= 0) & (drafts < 40)).all()


@pytest.mark.parametrize("token", [-1, 40])
@torch.no_grad()
def test_tokens_outside_the_vocabulary_are_refused(token):
    cached = IncrementalModel(sharp_model(), 2, batch=1, capacity=8)
    rows = cached.rows(torch.zeros(1, dtype=torch.int64), 2, 8)
    with pytest.raises(IndexError, match=f"token {token} lies outside a vocabulary of 40"):
        cached.step(torch.tensor([[3, token]]), rows)


def test_which_models_the_kernel_runs():
    def runs(model):
        return runs_on_cpu(model, model.trunk.blocks)

    model = sharp_model()
    assert runs(model)
    assert not runs(model.double())
    model.float().trunk.blocks[0].ffn.down.bfloat16()
    assert not runs(model)
    model.float().embedding.bfloat16()
    assert not runs(model)
    assert not runs(sharp_model().to("meta"))


@pytest.mark.parametrize("n_heads", [1, 4])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 5, "rule": "block"}])
def test_a_step_as_one_call_gives_what_its_calls_give(monkeypatch, n_heads, options):
    """From the second step on; none is one if its rows are too many."""
    model, steps = PreparedModel(sharp_model()), {True: 0, False: 0}
    step = _Decoder.step

    def counted(decoder):
        steps[decoder.whole_step is not None] += 1
        step(decoder)

    def run(prompts):
        steps.update({True: 0, False: 0})
        return generate(model, prompts, 20, n_heads=n_heads, seed=3, **options)

    monkeypatch.setattr(_Decoder, "step", counted)
    few = ragged_prompts(9, 4, 17)
    result = run(few)
    whole = steps[True]
    assert steps[False] == 1
    assert whole >= 3
    many = run((few * cpu_layers.ROWS_PER_CALL)[: 1 + cpu_layers.ROWS_PER_CALL // n_heads])
    assert steps[True] == 0
    monkeypatch.setattr(IncrementalModel, "repeated", lambda *_: None)
    expected = run(few)
    assert steps == {True: 0, False: whole + 1}
    assert expected.stats.acceptance == result.stats.acceptance
    for b in range(3):
        assert torch.equal(result.tokens[b], expected.tokens[b])
        assert torch.equal(result.tokens[b], many.tokens[b])
