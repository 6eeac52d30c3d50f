"""`mtp-fast demo`: train a byte model on the standard library, then decode with 1 to 4 heads."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mtp_fast._build_info import machine
from mtp_fast.decoding import GenerateResult, PreparedModel, generate
from mtp_fast.models import MTPConfig, MTPTransformer
from mtp_fast.terminal import TrainingProgress, print_continuation
from mtp_fast.text import decode_bytes
from mtp_fast.training import (
    BYTE_VOCAB_SIZE,
    Corpus,
    StepMetrics,
    TrainConfig,
    Trainer,
    default_precision,
    read_metrics,
)

# A deep thin model: the heads' share of the layers bounds the speedup, see the README.
MODEL = MTPConfig(
    vocab_size=BYTE_VOCAB_SIZE,
    dim=128,
    n_layers=12,
    n_attention_heads=2,
    n_kv_heads=1,
    n_future_tokens=4,
    ffn_dim=352,
    max_seq_len=1024,
)
CONTEXT = 128
N_PROMPTS, PROMPT_BYTES, NEW_TOKENS = 16, 48, 80  # a continuation ends within the context
REPEATS = 3
# Logits closer than this are a tie: float32 sums depend on how many rows a product has.
TIE = 1e-4


@dataclass(frozen=True)
class DecodingRow:
    """Decoding the held-out prompts with a number of heads.

    Attributes
    ----------
    heads : int
        Heads used.
    tokens_per_forward, tokens_per_second, speedup : float
        The last against 1 head in the same run, medians of interleaved repeats.
    acceptance : list of float
        Share of steps in which draft i and those before it were accepted.
    identical : bool
        Whether every continuation is the one of 1 head, up to ties.
    ties : int
        Continuations that part from it, where the two tokens' logits differ by less than 1e-4.
    """

    heads: int
    tokens_per_forward: float
    tokens_per_second: float
    speedup: float
    acceptance: list[float]
    identical: bool
    ties: int


def run(out: Path, minutes: float, device: torch.device, seed: int) -> bool:
    """Train, decode, and write `report.json` and `report.png` into `out`.

    Returns
    -------
    bool
        False if a signal stopped the training; the checkpoint is saved then.

    Raises
    ------
    OSError
        If `out` cannot be written.
    """
    config = TrainConfig(
        minutes=minutes,
        batch_size=8,
        learning_rate=2e-3,
        context=CONTEXT,
        precision=default_precision(device),
        eval_every=100,
        seed=seed,
    )
    out.mkdir(parents=True, exist_ok=True)
    report_file = out / "report.json"
    report_file.write_text("{}\n")  # an unwritable place is found out now, not after the training
    console = Console(soft_wrap=True)
    corpus = Corpus(tuple(standard_library()), seed=seed)
    train_tokens, validation_tokens = corpus.read()
    torch.manual_seed(seed)
    model = MTPTransformer(MODEL).to(device)
    console.print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"{MODEL.n_trunk_layers} trunk layers and {MODEL.n_future_tokens} heads; "
        f"{len(corpus.files)} files of the standard library, "
        f"{(len(train_tokens) + len(validation_tokens)) / 1e6:.1f} MB"
    )
    checkpoint = out / "checkpoint"
    trainer = Trainer(model, config, train_tokens, validation_tokens, checkpoint)
    corpus.save(checkpoint)
    with TrainingProgress(trainer, console) as progress:
        finished = trainer.run(progress.report)
    if not finished:
        console.print(f"stopped; go on with: mtp-fast train --resume {checkpoint}")
        return False

    metrics = read_metrics(checkpoint)
    prompts = held_out_prompts(corpus.split_files()[1])
    rows, example = measure_decoding(model.eval(), prompts)
    training = _training_summary(metrics, config)
    report = {
        "bench": "demo",
        "model": dataclasses.asdict(MODEL),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": str(device),
        "training": training,
        "decoding": [dataclasses.asdict(row) for row in rows],
        "machine": machine(),
    }
    report_file.write_text(json.dumps(report, indent=2) + "\n")
    draw(metrics, rows, out / "report.png")

    console.print("\nA held-out prompt, continued; [bold green]green[/] tokens were drafts:\n")
    print_continuation(prompts[0], example.tokens[0], example.drafted[0], decode_bytes)
    console.print()
    console.print(_table(rows))
    loss = training["validation_loss"][0]
    console.print(f"validation loss of head 0: {loss:.3f} nats a byte")
    console.print(f"wrote {report_file}, {out / 'report.png'} and {checkpoint}")
    return True


def standard_library() -> list[Path]:
    """Return the sources of the running interpreter's standard library, its tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    return sorted(
        file
        for file in root.rglob("*.py")
        if not skipped & set(file.relative_to(root).parts) and file.stat().st_size
    )


def held_out_prompts(files: list[Path]) -> list[Tensor]:
    """Cut one prompt of `PROMPT_BYTES` bytes, from the start of a line, out of each long file."""
    prompts: list[Tensor] = []
    for file in files:
        text = file.read_bytes()
        start = text.find(b"\n", len(text) // 3) + 1
        if start and len(text) >= start + PROMPT_BYTES:
            prompts.append(torch.tensor(list(text[start : start + PROMPT_BYTES])))
        if len(prompts) == N_PROMPTS:
            break
    return prompts


def measure_decoding(
    model: MTPTransformer, prompts: list[Tensor]
) -> tuple[list[DecodingRow], GenerateResult]:
    """Continue each prompt greedily, alone, with 1 to n heads; also return one continuation."""
    n_heads, prepared = range(1, len(model.heads) + 1), PreparedModel(model)
    results = {
        k: [generate(prepared, [p], NEW_TOKENS, n_heads=k) for p in prompts] for k in n_heads
    }
    # Repeats are interleaved, so that a disturbance of the machine meets all numbers of heads.
    seconds: dict[int, list[float]] = {k: [] for k in n_heads}
    for _ in range(REPEATS):
        for k in n_heads:
            runs = [generate(prepared, [p], NEW_TOKENS, n_heads=k) for p in prompts]
            seconds[k].append(sum(r.stats.seconds for r in runs))
    rows = []
    for k in n_heads:
        tokens = sum(len(r.tokens[0]) for r in results[k])
        gaps = [
            _gap(model, prompt, one.tokens[0], result.tokens[0])
            for prompt, one, result in zip(prompts, results[1], results[k], strict=True)
        ]
        rows.append(
            DecodingRow(
                heads=k,
                tokens_per_forward=tokens / sum(sum(r.stats.forwards) for r in results[k]),
                tokens_per_second=tokens / statistics.median(seconds[k]),
                speedup=statistics.median(seconds[1]) / statistics.median(seconds[k]),
                acceptance=[
                    statistics.mean(r.stats.acceptance[i] for r in results[k]) for i in range(k - 1)
                ],
                identical=all(gap is None or gap < TIE for gap in gaps),
                ties=sum(gap is not None and gap < TIE for gap in gaps),
            )
        )
    return rows, results[len(model.heads)][0]


@torch.inference_mode()
def _gap(model: MTPTransformer, prompt: Tensor, one: Tensor, other: Tensor) -> float | None:
    """Logit difference of two continuations' first differing tokens; None if they are equal."""
    if torch.equal(one, other):
        return None
    first = int((one != other).nonzero()[0])
    context = torch.cat([prompt, one[:first]]).to(model.unembedding.weight.device)
    logits = model.logits(context[None])[0, -1]
    return float((logits[one[first]] - logits[other[first]]).abs())


def _training_summary(metrics: list[StepMetrics], config: TrainConfig) -> dict[str, Any]:
    last = metrics[-1]
    return {
        **dataclasses.asdict(config),
        "steps": last.step,
        "tokens": last.tokens,
        "seconds": last.seconds,
        "validation_loss": last.validation_loss,
    }


def _table(rows: list[DecodingRow]) -> Table:
    table = Table(title="Greedy decoding of held-out prompts, batch 1")
    for name in ("heads used", "tokens per forward", "tokens/s", "speedup", "identical to 1 head"):
        table.add_column(name, justify="right")
    for row in rows:
        ties = f" ({row.ties} ties)" if row.ties else ""
        table.add_row(
            str(row.heads),
            f"{row.tokens_per_forward:.2f}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.speedup:.2f}x",
            ("yes" if row.identical else "NO") + ties,
        )
    return table


def draw(metrics: list[StepMetrics], rows: list[DecodingRow], file: Path) -> None:
    """Plot loss by head against bytes seen, and speedup against heads, into the PNG `file`."""
    # The Agg canvas straight away: pyplot would pick a backend by the user's display.
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, speed_axes = figure.subplots(1, 2, width_ratios=(3, 2))
    colors = [colormaps["viridis"](0.85 * i / max(1, len(rows) - 1)) for i in range(len(rows))]

    validated = [m for m in metrics if m.validation_loss is not None]
    for k, color in enumerate(colors):
        training = _smooth([m.loss[k] for m in metrics])
        loss_axes.plot([m.tokens / 1e6 for m in metrics], training, color=color, alpha=0.35, lw=1)
        validation = [m.validation_loss[k] for m in validated if m.validation_loss]
        loss_axes.plot(
            [m.tokens / 1e6 for m in validated],
            validation,
            color=color,
            lw=1.8,
            label=f"head {k} (token +{k + 1}): {validation[-1]:.2f}",
        )
    loss_axes.set(
        title="Loss by head: validation, and training behind it",
        xlabel="bytes seen (millions)",
        ylabel="nats per byte",
        ylim=(0.9 * min(m.loss[0] for m in metrics[-20:]), 3.6),
    )
    loss_axes.legend(frameon=False)

    heads = [row.heads for row in rows]
    bars = speed_axes.bar(heads, [row.speedup for row in rows], color=colors, width=0.6)
    labels = [f"{row.speedup:.2f}x" for row in rows]
    speed_axes.bar_label(bars, labels, label_type="center", color="white", weight="bold")
    speed_axes.plot(
        heads, [row.tokens_per_forward for row in rows], "o--", color="0.3", label="tokens/forward"
    )
    speed_axes.set(
        title="Greedy decoding, batch 1",
        xlabel="heads used",
        ylabel="speedup over 1 head (wall clock)",
        xticks=heads,
        ylim=(0, 1.2 * max(max(row.speedup, row.tokens_per_forward) for row in rows)),
    )
    speed_axes.legend(frameon=False, loc="upper left")
    for axes in (loss_axes, speed_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
    figure.savefig(file)


def _smooth(values: list[float], window: int = 25) -> list[float]:
    """Trailing mean."""
    total = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    mean: list[float] = ((total[ends] - total[starts]) / (ends - starts)).tolist()
    return mean
