"""The decode loop's bookkeeping against the same in plain Python."""

import pytest
import torch

import emulator
from mtp_fast.decoding.progress import Progress
from mtp_fast.ops.acceptance import AcceptResult

BACKENDS = [
    "cpu",
    pytest.param(
        "emulated",
        marks=pytest.mark.skipif(not emulator.AVAILABLE, reason="needs the sources and x86-64"),
    ),
    pytest.param("cuda", marks=pytest.mark.cuda),
]
VOCAB = 12


@pytest.fixture(params=BACKENDS)
def device(request, monkeypatch):
    if request.param != "emulated":
        return request.param
    emulator.load().install(monkeypatch)
    return "cpu"


class Sequence:
    """One sequence of a generation, as its definition has it."""

    def __init__(self, prompt_length, limit, ends):
        self.prompt_length, self.limit, self.ends = prompt_length, limit, ends
        self.output, self.drafted = [], []
        self.live, self.stuck, self.forwards = True, False, 0

    def commit(self, tokens, num_accepted):
        """Return the row from which the next block is drafted."""
        room = self.limit - len(self.output)
        kept = tokens[:room]
        for i, token in enumerate(kept):
            if token in self.ends:
                kept = kept[: i + 1]
                break
        if self.live:
            self.forwards += 1
            self.stuck = not tokens
            self.output += kept
            self.drafted += [i < num_accepted for i in range(len(kept))]
            ended = any(token in self.ends for token in kept)
            self.live = bool(tokens) and not ended and len(self.output) < self.limit
        return max(len(kept) - 1, 0)


def random_result(batch, judged):
    """What an acceptance step may return: a few accepted drafts and one more token, or none."""
    accepted = torch.randint(0, judged + 1, (batch,))
    more = (torch.rand(batch) < 0.9).long()
    count = accepted + more
    tokens = torch.randint(0, VOCAB, (batch, judged + 1))
    tokens[torch.arange(judged + 1) >= count[:, None]] = -1
    return AcceptResult(tokens, count.int(), accepted.int(), None)


@pytest.mark.parametrize("ends", ["none", "one for all", "each its own"])
@pytest.mark.parametrize("batch", [1, 3, 300])
def test_commit_against_plain_python(device, batch, ends):
    width = 4
    prompt_length, limit = torch.randint(1, 9, (batch,)), torch.randint(1, 12, (batch,))
    end_tokens = {
        "none": None,
        "one for all": torch.tensor([[2]]),
        "each its own": torch.randint(-1, VOCAB, (batch, 2)),  # -1: none
    }[ends]
    state = Progress(
        prompt_length.to(device),
        limit.to(device),
        width,
        None if end_tokens is None else end_tokens.to(device),
    )
    rows = [[]] * batch if end_tokens is None else end_tokens.expand(batch, -1).tolist()
    sequences = [
        Sequence(length, most, [e for e in own if e >= 0])
        for length, most, own in zip(prompt_length.tolist(), limit.tolist(), rows, strict=True)
    ]
    accepted = [0] * (width - 1)
    for step in range(8):
        result = random_result(batch, width - 1 if step else 0)  # a prompt has no drafts
        state.block[:, 1:] = torch.arange(1, width)
        state.bind_commit(AcceptResult(*(x.to(device) for x in result[:3]), None))()
        expected_rows = []
        for b, sequence in enumerate(sequences):
            count, stands = int(result.num_tokens[b]), int(result.num_accepted[b])
            if sequence.live:
                for i in range(stands):
                    accepted[i] += 1
            expected_rows.append(sequence.commit(result.tokens[b, :count].tolist(), stands))
        ends_at = [s.prompt_length + len(s.output) for s in sequences]
        expected = {
            "produced": [len(s.output) for s in sequences],
            "live": [s.live for s in sequences],
            "stuck": [s.stuck for s in sequences],
            "forwards": [s.forwards for s in sequences],
            "accepted": accepted,
            "position": ends_at,
            "start": [end - 1 for end in ends_at],
            "row": expected_rows,
            "draft_start": [max(end - 2, 0) for end in ends_at],
            "block": [[*(s.output[-1:] or [0]), 1, 2, 3] for s in sequences],
        }
        for name, value in expected.items():
            assert getattr(state, name).tolist() == value, name
        assert state.read() == (expected["produced"], ends_at, expected["live"])
        for b, s in enumerate(sequences):
            assert state.output[b, : len(s.output)].tolist() == s.output
            assert state.drafted[b, : len(s.output)].tolist() == s.drafted
    assert not all(s.live for s in sequences)


@pytest.mark.skipif(not emulator.AVAILABLE, reason="needs the sources and x86-64")
@pytest.mark.parametrize(("batch", "blocks"), [(1, 1), (128, 1), (129, 2)])
def test_a_commit_is_one_launch_without_shared_memory(monkeypatch, batch, blocks):
    em = emulator.load()
    em.install(monkeypatch)
    state = Progress(torch.ones(batch, dtype=torch.int64), torch.full((batch,), 9), 4, None)
    commit, counters = state.bind_commit(random_result(batch, 3)), em.measure()
    commit()
    assert counters.launches == 1
    assert (counters.blocks, counters.threads, counters.shared_bytes) == (blocks, 128, 0)
