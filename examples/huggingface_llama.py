"""Replace the loss of a Hugging Face causal language model, and see the same training run.

Two copies of a small Llama-architecture model (random weights, no download) take the same optimizer
steps, one with the model's own loss, one with `mtp_fast.linear_cross_entropy` on the hidden states.

    pip install 'mtp-fast[examples]' && python examples/huggingface_llama.py
"""

import copy

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import mtp_fast


def own_loss(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor) -> Tensor:
    """The logits of the whole batch, in float32, then cross-entropy."""
    return model(input_ids=tokens, labels=labels).loss


def fused_loss(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor) -> Tensor:
    """The same number, without the logits of the whole batch."""
    hidden = model.model(input_ids=tokens).last_hidden_state
    return mtp_fast.linear_cross_entropy(hidden[:, :-1], model.lm_head.weight, labels[:, 1:])


def losses(model: LlamaForCausalLM, loss_function, steps: int) -> list[float]:
    """Train on `steps` batches whose first half, the prompt, is masked."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    for _ in range(steps):
        start = torch.randint(0, model.config.vocab_size, (4, 1), generator=generator)
        tokens = (start + torch.arange(64)) % model.config.vocab_size  # counting: it can be learnt
        labels = tokens.clone()
        labels[:, :32] = -100
        loss = loss_function(model, tokens, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


def main(steps: int = 20) -> list[tuple[float, float]]:
    """Print and return (own loss, fused loss) of every step."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    twin = copy.deepcopy(model)
    pairs = list(zip(losses(model, own_loss, steps), losses(twin, fused_loss, steps), strict=True))
    for step, (own, fused) in enumerate(pairs):
        print(f"step {step:2d}   own {own:.6f}   fused {fused:.6f}")
    return pairs


if __name__ == "__main__":
    main()
