"""Self-speculative decoding at batch 1: how much of the layers' ceiling the wall clock keeps.

Efficiency is (time of a step with one head) / (time of a step with k heads), that is speedup over
tokens per forward; its ceiling, if a layer were all that costs, is (trunk + 1) / (trunk + k).
Weights are random: a step costs the same whether its drafts are accepted or not. The periodic part
makes drafts that are always accepted, by a model that is trained on a periodic sequence, and times
whole generations. The shipped checkpoint is not timed: how many tokens a forward gives is a count.

    pytest bench/bench_decoding.py --benchmark-only --quick     # a small model
    pytest bench/bench_decoding.py --benchmark-only     # trains for some minutes first
    python bench/bench_decoding.py              # steps: 30M and 103M parameters
    python bench/bench_decoding.py --periodic   # trains for some minutes first
    python bench/bench_decoding.py --shipped    # tokens per forward on held-out code
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from harness import Comparison, agreeing, finish, interleaved
from mtp_fast.cli import SHIPPED_CHECKPOINT
from mtp_fast.decoding import PreparedModel, generate, incremental
from mtp_fast.demo import standard_library
from mtp_fast.models import MTPConfig, MTPTransformer, load_checkpoint
from mtp_fast.training import Corpus, multi_token_loss

# Trunk layers, heads, dim, ffn_dim: 30M parameters, 103M.
SHAPES = ((28, 4, 256, 896), (24, 8, 256, 896), (28, 4, 512, 1408), (24, 8, 512, 1408))
PERIODIC_SHAPE, QUICK_SHAPE = (24, 8, 512, 1408), (8, 4, 64, 176)
NEW_TOKENS = 64
OFTEN = 3  # so many generations through the kernel, which are short, for one in torch's ops
SHIPPED_PROMPT = 128  # bytes, and as many new ones: the checkpoint is trained on twice as many
PERIOD = 23
PERIODIC = torch.arange(400) % PERIOD


def byte_model(trunk: int, heads: int, dim: int, ffn_dim: int) -> MTPTransformer:
    torch.manual_seed(0)
    shape = {"n_attention_heads": dim // 64, "n_kv_heads": dim // 64, "max_seq_len": 1024}
    config = MTPConfig(256, dim, trunk + heads, n_future_tokens=heads, ffn_dim=ffn_dim, **shape)
    return MTPTransformer(config).eval()


def step_seconds(model: MTPTransformer, n_heads: int) -> float:
    """Mean time of a step behind the prompt's; with random weights hardly a draft is accepted."""
    marks: list[float] = []
    mark = lambda *_: marks.append(time.perf_counter())  # noqa: E731
    stats = generate(model, [torch.arange(64)], NEW_TOKENS, n_heads=n_heads, on_tokens=mark).stats
    return (marks[-1] - marks[0]) / (stats.forwards[0] - 1)


def in_torch(run: Callable[[], float]) -> Callable[[], float]:
    """A generation whose layers are torch's ops, as on a GPU, instead of the CPU's kernel."""

    def patched() -> float:
        with mock.patch.object(incremental, "runs_on_cpu", return_value=False):
            return run()

    return patched


def efficiency(repeats: int) -> dict[str, Any]:
    runs = []
    for trunk, heads, dim, ffn_dim in SHAPES:
        for dtype in ("float32", "bfloat16"):
            model = byte_model(trunk, heads, dim, ffn_dim).to(getattr(torch, dtype))
            steps = {str(k): partial(step_seconds, model, k) for k in (1, heads)}
            torch_steps = {f"{k}, torch": in_torch(run) for k, run in steps.items()}
            seconds: dict[str, list[float]] = {name: [] for name in steps | torch_steps}
            for _ in range(1 + repeats):
                for name, run in [*steps.items()] * OFTEN + [*torch_steps.items()]:
                    seconds[name].append(run())
            shape = {"trunk": trunk, "heads": heads, "d": dim, "ffn": ffn_dim}
            medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
            runs.append({**shape, "dtype": dtype, "seconds": medians})
    return {
        "bench": "decoding",
        "shape": {"V": 256, "batch": 1},
        "repeats": repeats,
        "notes": [
            f"greedy, {NEW_TOKENS} new tokens a generation, time of a step behind the prompt; "
            f"the kernel's {OFTEN} times a repeat"
        ],
        "runs": runs,
    }


def learn_period(model: MTPTransformer, steps: int = 250) -> None:
    """Train on one periodic sequence until every head is right everywhere."""
    text = torch.arange(PERIOD).repeat(12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in range(steps):
        starts = torch.randint(0, PERIOD, (2, 1))
        loss = multi_token_loss(model.train(), text[starts + torch.arange(128)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    print(f"loss over heads after {steps} steps: {loss.item():.4f}")


@lru_cache
def periodic_model(trunk: int, heads: int, dim: int, ffn_dim: int) -> MTPTransformer:
    model = byte_model(trunk, heads, dim, ffn_dim)
    learn_period(model)
    return model.bfloat16()


def continuations(model: MTPTransformer, heads: Sequence[int]) -> dict[int, Callable[[], Tensor]]:
    """A generation with each number of heads; it returns the tokens, which `PERIODIC` holds."""
    prompt, prepared = torch.arange(PERIOD), PreparedModel(model)
    return {
        k: lambda k=k: generate(prepared, [prompt], len(PERIODIC), n_heads=k).tokens[0]
        for k in heads
    }


def periodic(repeats: int) -> dict[str, Any]:
    trunk, heads, dim, ffn_dim = PERIODIC_SHAPE
    model = periodic_model(trunk, heads, dim, ffn_dim)
    used = (1, heads)
    runs = {f"ours, {k}": run for k, run in continuations(model, used).items()}
    seconds = interleaved(agreeing(runs, [PERIODIC], [0.0]).runs, repeats)
    prompt, count = torch.arange(PERIOD), len(PERIODIC)
    rates = {k: generate(model, [prompt], count, n_heads=k).stats.tokens_per_forward for k in used}
    return {
        "bench": "decoding_periodic",
        "shape": {"d": dim, "ffn": ffn_dim, "trunk layers": trunk, "heads": heads, "batch": 1},
        "dtype": "bfloat16",
        "repeats": repeats,
        "notes": ["greedy"],
        "runs": [
            {
                "heads": k,
                "tokens_per_forward": rates[k],
                "tokens": count,
                "seconds": seconds[f"ours, {k}"],
            }
            for k in used
        ],
    }


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("competitor", ["1 head", "ours"])
def test_periodic(compare: Any, quick: bool, competitor: str, k: int) -> None:
    """Decoding with k heads, all drafts accepted; with one, as the bound by layers."""
    if quick and k == 8:
        pytest.skip("not quick")
    trunk, heads, dim, ffn_dim = QUICK_SHAPE if quick else PERIODIC_SHAPE

    def build() -> Comparison:
        runs = continuations(periodic_model(trunk, heads, dim, ffn_dim), (1, k))
        comparison = agreeing({"1 head": runs[1], "ours": runs[k]}, [PERIODIC], [0.0])
        return comparison._replace(bounds={"1 head": (trunk + k) / (trunk + 1) / k})

    compare(f"decoding, {k} heads, {trunk} + {heads} layers", competitor, build, heads=k)


def shipped(heads: Sequence[int] = range(1, 9)) -> dict[str, Any]:
    """Greedy continuations of held-out files of the standard library."""
    model = load_checkpoint(SHIPPED_CHECKPOINT).eval().bfloat16()
    held_out = Corpus(tuple(standard_library())).split_files()[1]
    texts = [torch.tensor(list(file.read_bytes())) for file in held_out]
    prompts = [t[len(t) // 3 :][:SHIPPED_PROMPT] for t in texts if len(t) > 2 * SHIPPED_PROMPT]
    runs = []
    for k in heads:
        stats = generate(model, prompts, SHIPPED_PROMPT, n_heads=k).stats
        runs.append(
            {
                "heads": k,
                "tokens_per_forward": stats.tokens_per_forward,
                "acceptance": stats.acceptance,
            }
        )
    return {
        "bench": "decoding_shipped",
        "shape": {"prompts": len(prompts), "prompt bytes": SHIPPED_PROMPT},
        "dtype": "bfloat16",
        "notes": [f"greedy, {SHIPPED_PROMPT} new tokens", "share of steps that accepted a draft"],
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--periodic", action="store_true", help="the trained periodic model")
    parser.add_argument("--shipped", action="store_true", help="the shipped checkpoint")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="save the report there")
    arguments = parser.parse_args()
    if arguments.shipped:
        report = shipped()
    else:
        report = (periodic if arguments.periodic else efficiency)(arguments.repeats)
    finish(report, arguments.json)


if __name__ == "__main__":
    main()
