"""The model run incrementally against full recomputation."""

from __future__ import annotations

import pytest
import torch

from mtp_fast.decoding.incremental import IncrementalModel
from tiny_models import close_drafts, draft_logits, round_drafting_heads, sharp_model

pytestmark = pytest.mark.usefixtures("layers")


@torch.no_grad()
def test_incremental_logits_equal_full_recomputation():
    """In pieces of any size, with a ragged batch: every head, every position."""
    model = round_drafting_heads(sharp_model())
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
            drafts = draft_logits(cached, trunk, cached.rows(start - 1, 1, 40))
            for b, end in enumerate(start.tolist()):
                context = tokens[b : b + 1, :end]
                expected = model.logits(context)[0, end - size : end]
                torch.testing.assert_close(cached.logits(hidden)[b], expected, rtol=1e-4, atol=1e-4)
                for k in (1, 2, 3):
                    torch.testing.assert_close(
                        drafts[b, k - 1], model.logits(context, k)[0, -1], **close_drafts(cached)
                    )


@torch.no_grad()
def test_rewinding_is_writing_again():
    model = round_drafting_heads(sharp_model())
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
        draft_logits(cached, trunk, cached.rows(start + 9, 1, 12))[0, 2],
        model.logits(tokens[:, :10], 3)[0, -1],
        **close_drafts(cached),
    )


@torch.no_grad()
def test_bfloat16_weights_keep_float32_between_the_products():
    model = sharp_model()
    tokens = torch.randint(0, 40, (1, 12))
    start = torch.zeros(1, dtype=torch.int64)
    exact = model.logits(tokens)
    model.bfloat16()
    cached = IncrementalModel(model, 4, batch=1, capacity=16)
    trunk, hidden = cached.forward(tokens, cached.rows(start, 12, 12))
    assert trunk.dtype == hidden.dtype == cached.logits(hidden).dtype == torch.float32
    error = (cached.logits(hidden) - exact).abs().max()
    assert error < 1.5 * (model.logits(tokens).float() - exact).abs().max()


@torch.no_grad()
def test_one_head_drafts_nothing():
    cached = IncrementalModel(sharp_model(), 1, batch=1, capacity=4)
    start = torch.zeros(1, dtype=torch.int64)
    trunk, _ = cached.forward(torch.zeros(1, 1, dtype=torch.int64), cached.rows(start, 1, 1))
    with pytest.raises(ValueError, match="no drafting heads: n_heads is 1"):
        draft_logits(cached, trunk, cached.rows(start, 1, 1))


@pytest.mark.parametrize("vocab_size", [40, 700])
@torch.no_grad()
def test_drafts_are_the_most_likely_tokens_at_a_row_of_choice(vocab_size):
    """Into columns of a larger tensor; the first of equals."""
    model = round_drafting_heads(sharp_model(vocab_size=vocab_size))
    model.unembedding.weight[vocab_size // 2 :] = model.unembedding.weight[: vocab_size // 2]
    tokens = torch.randint(0, vocab_size, (3, 4))
    start = torch.tensor([0, 2, 1])
    cached = IncrementalModel(model, 4, batch=3, capacity=8)
    cached.forward(tokens, cached.rows(torch.zeros_like(start), 4, 8))
    trunk, _ = cached.step(tokens, cached.rows(start, 4, 8))
    at = torch.tensor([3, 0, 2])
    block = torch.full((3, 5), -7)
    logits = cached.draft_logits(trunk, at, cached.rows(start + at, 1, 8), drafts=block[:, 1:4])
    assert (block[:, [0, 4]] == -7).all()
    for b in range(3):
        text = torch.cat([tokens[b, : start[b]], tokens[b]])[None, : start[b] + at[b] + 1]
        for k in (1, 2, 3):
            expected = model.logits(text, k)[0, -1]
            torch.testing.assert_close(logits[b, k - 1], expected, **close_drafts(cached))
            assert block[b, k] == logits[b, k - 1].tolist().index(logits[b, k - 1].max())
            assert block[b, k] < vocab_size // 2
