"""Self-speculative decoding at batch 1: how much of the layers' ceiling the wall clock keeps.

Efficiency is (time of a step with one head) / (time of a step with k heads), that is speedup over
tokens per forward; its ceiling, if a layer were all that costs, is (trunk + 1) / (trunk + k).
Weights are random: a step costs the same whether its drafts are accepted or not. The periodic part
makes drafts that are always accepted, by a model that is trained on a periodic sequence, and times
whole generations.

    python bench/bench_decoding.py              # steps: 30M parameters, 28 + 4 and 24 + 8 layers
    python bench/bench_decoding.py --periodic   # trains for a minute first
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch

from harness import interleaved, machine, table
from mtp_fast.decoding import generate
from mtp_fast.models import MTPConfig, MTPTransformer
from mtp_fast.training import multi_token_loss

# Trunk layers, heads, share of the ceiling that is wanted.
SHAPES = ((28, 4, 0.95), (24, 8, 0.92))
NEW_TOKENS = 64
PERIOD = 23


def byte_model(trunk: int, heads: int, dim: int = 256, ffn_dim: int = 896) -> MTPTransformer:
    torch.manual_seed(0)
    shape = {"n_attention_heads": dim // 64, "n_kv_heads": dim // 64, "max_seq_len": 1024}
    config = MTPConfig(256, dim, trunk + heads, n_future_tokens=heads, ffn_dim=ffn_dim, **shape)
    return MTPTransformer(config).eval()


def steps(model: MTPTransformer, n_heads: int) -> Callable[[], list[int]]:
    """A generation, to be timed; with random weights hardly a draft is accepted."""
    prompt = torch.arange(64)
    return lambda: generate(model, [prompt], NEW_TOKENS, n_heads=n_heads).stats.forwards


def efficiency(repeats: int) -> list[list[str]]:
    rows = [["layers", "weights", "1 head ms", "k heads ms", "efficiency", "ceiling", "of it"]]
    rows[0].append("wanted")
    for trunk, heads, wanted in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            model = byte_model(trunk, heads).to(dtype)
            runs = {k: steps(model, k) for k in (1, heads)}
            forwards = {k: run()[0] for k, run in runs.items()}
            seconds = interleaved({str(k): run for k, run in runs.items()}, repeats)
            one, many = (seconds[str(k)] / forwards[k] for k in (1, heads))
            ceiling = (trunk + 1) / (trunk + heads)
            share = one / many / ceiling
            numbers = [f"{one * 1e3:.2f}", f"{many * 1e3:.2f}", f"{one / many:.3f}"]
            dtype_name = str(dtype).removeprefix("torch.")
            verdict = [f"{ceiling:.3f}", f"{share:.3f}", f"{wanted:.2f}"]
            rows.append([f"{trunk} + {heads}", dtype_name, *numbers, *verdict])
    return rows


def learn_period(model: MTPTransformer, steps: int = 150) -> None:
    """Train on one periodic sequence until every head is right everywhere."""
    text = torch.arange(PERIOD).repeat(12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in range(steps):
        starts = torch.randint(0, PERIOD, (4, 1))
        loss = multi_token_loss(model.train(), text[starts + torch.arange(64)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    print(f"loss over heads after {steps} steps: {loss.item():.4f}")


def periodic(repeats: int) -> list[list[str]]:
    trunk, heads, _ = SHAPES[1]
    model = byte_model(trunk, heads, dim=128, ffn_dim=352)
    learn_period(model)
    model.bfloat16()
    prompt, count = torch.arange(PERIOD), 200
    runs = {k: lambda k=k: generate(model, [prompt], count, n_heads=k) for k in (1, heads)}
    results = {k: run() for k, run in runs.items()}
    expected = (torch.arange(count) % PERIOD).tolist()
    if any(result.tokens[0].tolist() != expected for result in results.values()):
        raise RuntimeError("the model has not learnt the sequence; times would mean nothing")
    seconds = interleaved({str(k): run for k, run in runs.items()}, repeats)
    rows = [["layers", "heads used", "tokens per forward", "tokens/s", "speedup"]]
    for k, result in results.items():
        time = seconds[str(k)]
        numbers = [f"{result.stats.tokens_per_forward:.2f}", f"{count / time:.0f}"]
        rows.append([f"{trunk} + {heads}", str(k), *numbers, f"{seconds['1'] / time:.2f}x"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--periodic", action="store_true", help="the trained periodic model")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    print(json.dumps(machine()))
    print(
        table(periodic(arguments.repeats) if arguments.periodic else efficiency(arguments.repeats))
    )


if __name__ == "__main__":
    main()
