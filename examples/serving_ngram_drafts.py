"""Speculative decoding inside somebody else's loop: transformers verifies, n-grams draft.

A Llama-architecture model (random weights, no download) with its own key/value cache judges drafts
that are looked up in the sequence itself: what followed the last time that the last two tokens came
up. `mtp_fast.speculative_accept` decides what stands, for a batch in which every sequence has its
own number of drafts and advances by its own count. Greedy output is that of the model's own
`generate`; sampled output has the model's own distribution.

    pip install 'mtp-fast[examples]' && python examples/serving_ngram_drafts.py
"""

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import mtp_fast


def look_up(tokens: list[int], width: int) -> list[int]:
    """What followed the latest earlier occurrence of the last two tokens, `width` at most."""
    for end in range(len(tokens) - 1, 1, -1):
        if tokens[end - 2 : end] == tokens[-2:]:
            return tokens[end : end + width]
    return []


def left_padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) and their mask, as transformers takes ragged prompts."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return tokens, mask


@torch.inference_mode()
def decode(
    model: LlamaForCausalLM, prompts: list[list[int]], new_tokens: int, width: int = 4, **sampling
) -> tuple[list[list[int]], int]:
    """Continue each prompt by `new_tokens`, `width` drafts a step; also return the forwards.

    `sampling` goes to `speculative_accept`: temperature, top_k, top_p, min_p, rule.
    """
    sequences = [list(prompt) for prompt in prompts]
    cache = DynamicCache()
    block, mask = left_padded(prompts)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    drafts = torch.zeros(len(prompts), 0, dtype=torch.int64)  # none beside the prompt
    num_draft, forwards = torch.zeros(len(prompts), dtype=torch.int64), 0
    while True:
        output = model(block, attention_mask=mask, position_ids=positions, past_key_values=cache)
        forwards += 1
        rows = drafts.shape[1] + 1
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        result = mtp_fast.speculative_accept(
            output.logits[:, -rows:],
            drafts,
            num_draft=num_draft,
            seed=torch.arange(len(prompts)),
            position=lengths,
            **sampling,
        )
        for b, count in enumerate(result.num_tokens.tolist()):
            sequences[b] += result.tokens[b, :count].tolist()
        # The cache is one rectangle: what was rejected stays in it, hidden by the mask.
        mask[:, -rows:] = torch.arange(rows) <= result.num_accepted[:, None]
        new = [s[len(p) :][:new_tokens] for s, p in zip(sequences, prompts, strict=True)]
        if min(map(len, new)) == new_tokens:
            return new, forwards

        found = [look_up(sequence, width) for sequence in sequences]
        num_draft = torch.tensor([len(draft) for draft in found])
        drafts = torch.tensor([draft + [0] * (width - len(draft)) for draft in found])
        last = torch.tensor([sequence[-1:] for sequence in sequences])
        block = torch.cat([last, drafts], 1)
        mask = torch.cat([mask, torch.ones_like(block)], 1)
        starts = torch.tensor([[len(sequence) - 1] for sequence in sequences])
        positions = starts + torch.arange(width + 1)


def main(new_tokens: int = 60) -> tuple[list[list[int]], list[list[int]], int]:
    """Print and return greedy output, that of `generate`, and the forwards."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, vocab_size=64, num_attention_heads=4, initializer_range=0.1)
    model = LlamaForCausalLM(config).eval()
    prompts = [[5, 6, 7, 8, 5, 6], [1, 2, 3], [40, 41, 42, 43]]
    tokens, mask = left_padded(prompts)
    own = model.generate(
        tokens, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
    )[:, tokens.shape[1] :].tolist()
    ours, forwards = decode(model, prompts, new_tokens)
    print(f"greedy: {new_tokens} tokens in {forwards} forwards; as generate: {ours == own}")
    sampled, steps = decode(model, prompts, new_tokens, temperature=0.1, top_p=0.9)
    print(f"sampled: {new_tokens} tokens in {steps} forwards, the first: {sampled[0][:10]}")
    return ours, own, forwards


if __name__ == "__main__":
    main()
