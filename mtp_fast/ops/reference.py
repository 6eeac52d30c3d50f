"""The ops in plain PyTorch: what they mean, without the kernels' speed or memory.

Generic in the dtype: with float64 arguments the result is the truth that tests and benches compare
with. 16-bit logits are taken to float32 first, as the kernels do. Sampling draws from the kernels'
own Philox streams, so sampled tokens agree one by one, except where a draw falls within rounding of
a boundary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_fast.ops.acceptance import AcceptResult


def cross_entropy(
    logits: Tensor,  # (..., V)
    target: Tensor,  # (...)
    *,
    weight: Tensor | None = None,  # (V,)
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,  # (...)
    num_items: float | Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Reference of `mtp_fast.cross_entropy`."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    valid = target != ignore_index
    y = torch.where(valid, target, 0).long()
    # Whole rows are put out before anything is computed of them: NaN in an ignored row is no NaN.
    z = torch.where(valid[..., None], z, torch.zeros_like(z))
    a = z.new_ones(z.shape[-1]) if weight is None else weight.to(z.dtype)
    w = valid.to(z.dtype) if token_weight is None else torch.where(valid, token_weight, 0.0)

    lse = torch.logsumexp(z, -1)
    nll = lse - z.gather(-1, y[..., None])[..., 0]
    loss = (1 - label_smoothing) * a[y] * nll
    if label_smoothing:
        loss = loss + label_smoothing / z.shape[-1] * (a * (lse[..., None] - z)).sum(-1)
    loss = w.to(z.dtype) * (loss + z_loss * lse**2)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    count = (w * a[y] * valid).sum() if num_items is None else torch.as_tensor(num_items)
    return total * torch.where(count == 0, 0.0, 1.0 / count).to(z.dtype)


def linear_cross_entropy(
    input: Tensor,  # (..., d)
    linear_weight: Tensor,  # (V, d)
    target: Tensor,  # (...)
    *,
    linear_bias: Tensor | None = None,  # (V,)
    **options: Any,
) -> Tensor:
    """Reference of `mtp_fast.linear_cross_entropy`."""
    return cross_entropy(F.linear(input, linear_weight, linear_bias), target, **options)


def multi_token_cross_entropy(
    hidden: Tensor | Sequence[Tensor],  # n of (B, T, d)
    linear_weight: Tensor,  # (V, d)
    labels: Tensor,  # (B, T)
    *,
    document_ids: Tensor | None = None,  # (B, T)
    head_weights: Sequence[float] | Tensor | None = None,  # (n,)
    token_weight: Tensor | None = None,  # (B, T)
    num_items: float | Tensor | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    """Reference of `mtp_fast.multi_token_cross_entropy`: the loop over heads."""
    total = hidden[0].new_zeros(())
    for k, head in enumerate(hidden):
        shift = 1 + k
        kept = max(labels.shape[1] - shift, 0)
        target = labels[:, shift:]
        if document_ids is not None:
            crosses = document_ids[:, shift:] != document_ids[:, :kept]
            target = target.masked_fill(crosses, ignore_index)
        items = num_items
        if isinstance(num_items, Tensor) and num_items.dim() == 1:
            items = num_items[k]
        loss = linear_cross_entropy(
            head[:, :kept],
            linear_weight,
            target,
            token_weight=None if token_weight is None else token_weight[:, shift:],
            num_items=items,
            ignore_index=ignore_index,
            **options,
        )
        total = total + (1.0 if head_weights is None else head_weights[k]) * loss
    return total


# Acceptance and sampling.

# What a draw is for (csrc/acceptance/math.h).
SALT_DRAFT, SALT_ACCEPT, SALT_RESIDUAL, SALT_BONUS = range(4)

_MASK = 0xFFFFFFFF


def philox4x32_10(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox 4x32-10: four words from a counter of four and a key of two.

    Words are int64 tensors in [0, 2^32) that broadcast with each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply_words(0xD2511F53, c0)
        high1, low1 = _multiply_words(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def _multiply_words(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a * b, without leaving 63 bits."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


def uniform(seed: Tensor, position: Tensor, index: Tensor, salt: int) -> Tensor:
    """Uniforms in (0, 1) of (seed, position, index, salt); int64 tensors in, float64 out."""
    counter = [position & _MASK, position >> 32 & _MASK, index, torch.full_like(index, salt)]
    word = philox4x32_10(counter, [seed & _MASK, seed >> 32 & _MASK])[0]
    return ((word >> 8).double() + 0.5) * 2.0**-24


def clean_logits(logits: Tensor) -> Tensor:
    """Logits in the dtype to compute in; NaN is -inf, +inf the largest finite number."""
    clean = torch.nan_to_num(
        logits, nan=-torch.inf, posinf=torch.finfo(logits.dtype).max, neginf=-torch.inf
    )
    return clean if logits.dtype == torch.float64 else clean.float()


def filtered_probabilities(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """Softmax of logits (..., V) after temperature (> 0), top-k, top-p and min-p, in this order.

    The sampling arguments broadcast with logits. What is kept is a prefix of the ids by falling
    logit and, among equals, rising id; each filter sees the renormalised result of the one before.
    """
    z, order = torch.sort(clean_logits(logits), dim=-1, descending=True, stable=True)
    weight = torch.exp((z - z[..., :1]) / temperature.to(z.dtype))
    rank = torch.arange(z.shape[-1], device=z.device)
    weight = weight * ((rank < top_k) | (top_k == 0))
    mass = weight.cumsum(-1)
    before = torch.nn.functional.pad(mass, (1, 0))[..., :-1]
    weight = weight * ((before < top_p * mass[..., -1:]) | (top_p >= 1))
    weight = weight * (weight >= min_p * weight[..., :1])
    probabilities = weight / weight.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter(-1, order, probabilities)


def inverse_cdf(weight: Tensor, u: Tensor) -> Tensor:
    """The first id at which the running sum of weight (B, V) exceeds u (B,) times the whole."""
    cdf = weight.cumsum(-1)
    token = (cdf <= u.unsqueeze(-1).to(cdf.dtype) * cdf[..., -1:]).sum(-1)
    last_positive = weight.shape[-1] - 1 - (weight > 0).flip(-1).to(torch.int8).argmax(-1)
    return torch.minimum(token, last_positive)


def residual(p: Tensor, q: Tensor, prefix: Tensor) -> Tensor:
    """max(P p - q, 0), unnormalised; p (..., V), q (..., V), prefix (...)."""
    return (prefix.unsqueeze(-1) * p - q).clamp_min(0)


def leading(verdict: Tensor) -> Tensor:
    """How many drafts precede the first rejection; verdict (B, K) bool."""
    return verdict.long().cumprod(-1).sum(-1)


def longest(passed: Tensor) -> Tensor:
    """The longest prefix that passes, whatever shorter ones do; passed (B, K+1) bool, from 0."""
    length = torch.arange(passed.shape[-1], device=passed.device)
    return (passed * length).amax(-1)


def block_prefixes(p_draft: Tensor, q_draft: Tensor) -> Tensor:
    """P_0 .. P_K of the block rule, (B, K+1); p_draft, q_draft (B, K)."""
    prefix = [torch.ones_like(p_draft[:, :0].sum(-1))]
    for p, q in zip(p_draft.unbind(-1), q_draft.unbind(-1), strict=True):
        joint = prefix[-1] * p
        prefix.append(torch.where(joint < q, joint / q, (joint > 0).to(joint.dtype)))
    return torch.stack(prefix, -1)


class _Sampling(NamedTuple):
    """The sampling arguments, each (B, 1): int64 if integral, else float64."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    position: Tensor

    @staticmethod
    def of(batch: int, device: torch.device, *values: float | Tensor | None) -> "_Sampling":
        columns = []
        for value, default in zip(values, (0.0, 0, 1.0, 0.0, 0, 0), strict=True):
            dtype = torch.float64 if isinstance(default, float) else torch.int64
            value = default if value is None else value
            column = torch.as_tensor(value, dtype=dtype, device=device)
            columns.append(column.expand(batch).unsqueeze(-1))
        return _Sampling(*columns)

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities of logits (B, rows, V); greedy sequences: at temperature 1, unfiltered."""
        greedy = self.temperature == 0
        return filtered_probabilities(
            logits,
            torch.where(greedy, 1.0, self.temperature).unsqueeze(-1),
            torch.where(greedy, 0, self.top_k).unsqueeze(-1),
            torch.where(greedy, 1.0, self.top_p).unsqueeze(-1),
            torch.where(greedy, 0.0, self.min_p).unsqueeze(-1),
        )

    def draw(self, index: Tensor, salt: int) -> Tensor:
        """Uniforms (B, rows) for index (B or 1, rows)."""
        index = index.expand(self.seed.shape[0], index.shape[-1])
        return uniform(self.seed, self.position, index, salt)


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 0.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    seed: int | Tensor = 0,
    position: int | Tensor | None = None,
    index: int = 0,
) -> Tensor:
    """As `mtp_fast.sample`; also takes float64."""
    sampling = _Sampling.of(
        logits.shape[0], logits.device, temperature, top_k, top_p, min_p, seed, position
    )
    z = clean_logits(logits)
    p = sampling.distribution(logits.unsqueeze(1)).squeeze(1)
    u = sampling.draw(torch.full((1, 1), index, device=logits.device), SALT_DRAFT)
    token = torch.where(
        sampling.temperature.squeeze(-1) == 0, z.argmax(-1), inverse_cdf(p, u.squeeze(-1))
    )
    return torch.where(z.amax(-1) > -torch.inf, token, -1)


def speculative_accept(
    target_logits: Tensor,
    draft_tokens: Tensor,
    *,
    draft_logits: Tensor | None = None,
    num_draft: Tensor | None = None,
    temperature: float | Tensor = 0.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    rule: str = "exact",
    typical_epsilon: float = 0.3,
    typical_delta: float = 0.09,
    seed: int | Tensor = 0,
    position: int | Tensor | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int = -1,
    return_logprobs: bool = False,
) -> AcceptResult:
    """As `mtp_fast.speculative_accept`; also takes float64."""
    batch, rows, vocab = target_logits.shape
    device = target_logits.device
    sampling = _Sampling.of(batch, device, temperature, top_k, top_p, min_p, seed, position)
    greedy = sampling.temperature == 0  # (B, 1)
    index = torch.arange(rows, device=device).unsqueeze(0)  # (1, K+1)
    z = clean_logits(target_logits)
    best = z.argmax(-1)  # (B, K+1)
    usable = z.amax(-1) > -torch.inf  # (B, K+1)

    # Drafts end at num_draft, at an invalid id, and where a row cannot judge: (B,) `length`.
    limit = rows - 1 if num_draft is None else num_draft.unsqueeze(-1)
    judged = (index[:, :-1] < limit) & (draft_tokens >= 0) & (draft_tokens < vocab)
    judged &= usable[:, :-1]
    if draft_logits is not None and rule != "typical":
        judged &= greedy | (clean_logits(draft_logits).amax(-1) > -torch.inf)
    length = leading(judged)
    draft = torch.where(judged, draft_tokens, 0).long()  # (B, K)

    p = sampling.distribution(target_logits)  # (B, K+1, V)
    if draft_logits is None:
        q = torch.nn.functional.one_hot(draft, vocab).to(p.dtype)  # (B, K, V)
    else:
        q = sampling.distribution(draft_logits)
    p_draft = p[:, :-1].gather(-1, draft.unsqueeze(-1)).squeeze(-1)  # (B, K)
    q_draft = q.gather(-1, draft.unsqueeze(-1)).squeeze(-1)
    u = sampling.draw(index[:, :-1], SALT_ACCEPT).to(p.dtype)  # (B, K)

    prefix = torch.ones((batch, rows), dtype=p.dtype, device=device)
    if rule == "exact":
        verdict = u * q_draft < p_draft
    elif rule == "typical":
        entropy = torch.special.entr(p[:, :-1]).sum(-1)
        verdict = p_draft > (typical_delta * torch.exp(-entropy)).clamp_max(typical_epsilon)
    else:
        prefix = block_prefixes(p_draft, q_draft)
        mass = residual(p[:, :-1], q, prefix[:, :-1]).sum(-1)  # (B, K)
        judged_by = torch.where(prefix[:, :-1] >= 1, 1.0, mass / (mass + 1 - prefix[:, :-1]))
        judged_by = torch.cat([judged_by, prefix[:, -1:]], -1)
        judged_by = torch.where(index == length.unsqueeze(-1), prefix, judged_by)
        passed = torch.nn.functional.pad(u <= judged_by[:, 1:], (1, 0), value=True)
        verdict = index[:, :-1] < longest(passed & (index <= length.unsqueeze(-1))).unsqueeze(-1)
    verdict = torch.where(greedy, draft == best[:, :-1], verdict)
    accepted = leading(verdict & judged)  # (B,)

    # The token after them, from row `accepted`.
    sequence = torch.arange(batch, device=device)
    at_end = accepted == length
    row = accepted.unsqueeze(-1)
    p_row = p[sequence, accepted]
    bonus = inverse_cdf(bonus_row(p, length), sampling.draw(row, SALT_BONUS).squeeze(-1))
    left = torch.zeros_like(p_row)
    if rows > 1:
        left = residual(
            p_row, q[sequence, accepted.clamp_max(rows - 2)], prefix[sequence, accepted]
        )
    left = torch.where(left.sum(-1, keepdim=True) > 0, left, p_row)  # p == q up to rounding
    recovered = inverse_cdf(left, sampling.draw(row, SALT_RESIDUAL).squeeze(-1))
    following = torch.where(at_end, bonus, recovered)
    if rule == "typical":
        following = best[sequence, accepted]
    following = torch.where(greedy.squeeze(-1), best[sequence, accepted], following)

    tokens = torch.nn.functional.pad(draft, (0, 1)).scatter(-1, row, following.unsqueeze(-1))
    emitted = accepted + usable[sequence, accepted]
    if eos_token_id is not None and eos_token_id >= 0:
        until = leading(tokens != eos_token_id) + 1
        emitted = torch.minimum(emitted, until)
        accepted = torch.minimum(accepted, emitted)
    padding = index >= emitted.unsqueeze(-1)
    logprobs = None
    if return_logprobs:
        logprobs = z.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        logprobs = torch.where(padding, 0.0, logprobs)
    return AcceptResult(
        torch.where(padding, pad_token_id, tokens), emitted.int(), accepted.int(), logprobs
    )


def bonus_row(p: Tensor, length: Tensor) -> Tensor:
    """The target's row after the last draft; p (B, K+1, V), length (B,)."""
    return p[torch.arange(p.shape[0], device=p.device), length]
