"""Sequences whose predictability is known, and what self-speculation can make of them.

A Markov source of order r has V**r states, the last r symbols read as a number in base V. The best
heads are known in closed form, and with them the expected number of tokens per forward.

The heads draft from the last row that was judged. They know its state s, and not the symbol y that
was emitted there, so even the first draft is a guess about what follows an unknown symbol: head i
can do no better than the law of the symbol i + 1 places ahead of s. The pairs (s, y) at which the
forwards begin are a Markov chain of their own; its stationary law gives the expectation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import mtp_fast

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MarkovSource:
    """A Markov source.

    Parameters
    ----------
    order : int
        r, symbols that the next one depends on.
    table : ndarray
        (V**r, V) positive probabilities of the next symbol.
    """

    order: int
    table: Array

    @property
    def vocab(self) -> int:
        """V."""
        return self.table.shape[1]

    @classmethod
    def with_entropy(cls, bits: float, order: int, vocab: int, seed: int) -> MarkovSource:
        """Draw a source of an entropy rate of `bits` a symbol, in (0, log2(vocab)).

        The logits are normal, drawn with `seed` and scaled until the rate is right.
        """
        if not 0 < bits < np.log2(vocab):
            raise ValueError(f"bits must be in (0, {np.log2(vocab):g}), got {bits}")
        logits = np.random.default_rng(seed).normal(size=(vocab**order, vocab))
        low, high = 0.0, 64.0
        for _ in range(40):
            scale = (low + high) / 2
            source = cls(order, _softmax(scale * logits))
            low, high = (scale, high) if source.entropy_rate() > bits else (low, scale)
        return source

    def next_state(self, state: npt.NDArray[np.int64], symbol: object) -> npt.NDArray[np.int64]:
        """Return the states after `symbol`."""
        after: npt.NDArray[np.int64] = (state * self.vocab + symbol) % len(self.table)
        return after

    def stationary(self) -> Array:
        """Return the long-run share (V**r,) of each state."""
        return stationary(self._transitions())

    def entropy_rate(self) -> float:
        """Return the entropy of the next symbol given the state, in bits."""
        return float(-self.stationary() @ (self.table * np.log2(self.table)).sum(1))

    def ahead(self, i: int) -> Array:
        """Return the law (V**r, V) of the symbol `i` + 1 places ahead of a state: head i's best."""
        law: Array = np.linalg.matrix_power(self._transitions(), i) @ self.table
        return law

    def sample(self, sequences: int, length: int, seed: int) -> npt.NDArray[np.uint8]:
        """Draw (sequences, length) symbols, from the stationary law on."""
        rng = np.random.default_rng(seed)
        state = rng.choice(len(self.table), sequences, p=self.stationary())
        thresholds = self.table.cumsum(1)[:, :-1]
        symbols = np.empty((sequences, length), np.uint8)
        for t in range(length):
            symbols[:, t] = (rng.random((sequences, 1)) > thresholds[state]).sum(1)
            state = self.next_state(state, symbols[:, t])
        return symbols

    def _transitions(self) -> Array:
        states, symbols = np.indices(self.table.shape)
        matrix = np.zeros((len(self.table),) * 2)
        matrix[states, self.next_state(states, symbols)] = self.table
        return matrix


def stationary(transitions: Array) -> Array:
    """Return the stationary law (S,) of an irreducible chain `transitions` (S, S)."""
    size = len(transitions)
    equations = np.vstack([transitions.T - np.eye(size), np.ones(size)])
    law: Array = np.linalg.lstsq(equations, np.eye(size + 1)[-1], rcond=None)[0]
    return law


def expected_acceptance(source: MarkovSource, heads: int, rule: str) -> Array:
    """Expected acceptance of the best heads' drafts, sampled at temperature 1, in the long run.

    Every path of drafts is followed. For a path d of i drafts with probability Q(d) under the
    heads, let w(d) be the probability that it is drafted and accepted. Then draft x is accepted
    after it with w min(p(x), q(x)) under the token rule, with min(w p(x), Q q(x)) under the block
    rule (whose chance that a path stands is w(d) / Q(d) = min(1, w(d') p / (Q(d') q))); what is
    left of w p(x) is the probability that the forward ends there and emits x.

    Parameters
    ----------
    source : MarkovSource
        The source; the verifier knows its table.
    heads : int
        k, heads in use: k - 1 drafts.
    rule : {"exact", "block"}
        As in `mtp_fast.speculative_accept`.

    Returns
    -------
    ndarray
        (k - 1,) probability that draft i and all before it are accepted, over forwards. A forward
        emits 1 + their sum tokens on average.
    """
    states, vocab = source.table.shape
    pairs = np.arange(states * vocab)
    drafted_from, state = pairs // vocab, source.next_state(*np.divmod(pairs, vocab))[:, None]
    transitions = np.zeros((len(pairs),) * 2)
    w = q_path = np.ones((len(pairs), 1))
    accepted = []

    def end(mass: Array) -> None:
        """Forwards that end in `state` and emit each symbol with `mass` (pairs, paths, V)."""
        where = pairs[:, None, None] * len(pairs) + state[..., None] * vocab + np.arange(vocab)
        transitions.ravel()[:] += np.bincount(where.ravel(), mass.ravel(), transitions.size)

    for i in range(1, heads):
        p, q = source.table[state], source.ahead(i)[drafted_from][:, None]
        if rule == "exact":
            kept = w[..., None] * np.minimum(p, q)
        elif rule == "block":
            kept = np.minimum(w[..., None] * p, q_path[..., None] * q)
        else:
            raise ValueError(f'rule must be "exact" or "block", got {rule!r}')
        end(w[..., None] * p - kept)
        w, q_path = (x.reshape(len(pairs), -1) for x in (kept, q_path[..., None] * q))
        state = source.next_state(state[..., None], np.arange(vocab)).reshape(len(pairs), -1)
        accepted.append(w.sum(1))
    end(w[..., None] * source.table[state])
    return np.array(accepted).reshape(-1, len(pairs)) @ stationary(transitions)


def simulated_acceptance(
    source: MarkovSource, heads: int, rule: str, sequences: int, steps: int, seed: int
) -> Array:
    """Measure what `expected_acceptance` expects, by `mtp_fast.speculative_accept`.

    The best heads draft through `mtp_fast.sample`; the first quarter of the steps is not counted.
    """
    table = torch.from_numpy(source.table).log().float()
    laws = [torch.from_numpy(source.ahead(i)).log().float() for i in range(1, heads)]
    drafting = torch.stack(laws, 1) if laws else table[:, None, :][:, :0]  # (states, k - 1, V)
    rng = np.random.default_rng(seed)
    state = torch.from_numpy(rng.choice(len(table), sequences, p=source.stationary()))
    options = {"temperature": 1.0, "seed": torch.arange(sequences) + seed * sequences}
    position = torch.zeros(sequences, dtype=torch.int64)
    last = mtp_fast.sample(table[state], position=position, **options)
    counts = torch.zeros(heads - 1, dtype=torch.int64)
    skipped = steps // 4
    for step in range(steps):
        position += 1
        logits = drafting[state]
        drafts = [
            mtp_fast.sample(logits[:, i].contiguous(), position=position, index=i, **options)
            for i in range(heads - 1)
        ]
        path = [_next(source, state, last)]  # states of the rows of the forward
        for draft in drafts:
            path.append(_next(source, path[-1], draft))
        rows = torch.stack(path, 1)
        out = mtp_fast.speculative_accept(
            table[rows],
            torch.stack([last, *drafts], 1)[:, 1:],
            draft_logits=logits,
            rule=rule,
            position=position,
            **options,
        )
        kept = out.num_accepted[:, None].long()
        state, last = rows.gather(1, kept)[:, 0], out.tokens.gather(1, kept)[:, 0]
        position += kept[:, 0]
        if step >= skipped:
            counts += (torch.arange(heads - 1) < kept).sum(0)
    return counts.numpy() / ((steps - skipped) * sequences)


def _next(source: MarkovSource, state: Tensor, symbol: Tensor) -> Tensor:
    return (state * source.vocab + symbol) % len(source.table)


def _softmax(logits: Array) -> Array:
    e = np.exp(logits - logits.max(1, keepdims=True))
    probabilities: Array = e / e.sum(1, keepdims=True)
    return np.maximum(probabilities, 1e-30)
