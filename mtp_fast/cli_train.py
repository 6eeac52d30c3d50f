"""`mtp-fast train`: its options, and the run that they describe."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from mtp_fast.models import MTPConfig, MTPTransformer
from mtp_fast.training import (
    Corpus,
    PreparedCorpus,
    StepMetrics,
    TrainConfig,
    Trainer,
    default_precision,
    load_corpus,
)
from mtp_fast.training.distributed import process_rank, torchrun_group


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of training to `parser`."""
    parser.add_argument("files", type=Path, nargs="*", help="text files, or what prepare has made")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="checkpoint directory of a new run")
    where.add_argument("--resume", type=Path, metavar="DIR", help="continue the run in DIR")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="log metrics there as well")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimizer steps")
    length.add_argument("--minutes", type=float, help="or training time")
    shape = parser.add_argument_group("model")
    shape.add_argument("--heads", type=int, default=4, help="prediction heads (default 4)")
    shape.add_argument("--layers", type=int, default=16, help="blocks, heads included")
    shape.add_argument("--dim", type=int, default=192, help="width")
    shape.add_argument("--attention-heads", type=int, default=3)
    shape.add_argument("--kv-heads", type=int, default=1)
    shape.add_argument("--ffn-dim", type=int, default=512)
    shape.add_argument("--max-seq-len", type=int, default=1024, help="longest sequence")
    shape.add_argument("--dropout", type=float, default=0.0)
    defaults = TrainConfig(steps=1)
    loop = parser.add_argument_group("optimization")
    loop.add_argument("--batch-size", type=int, default=defaults.batch_size)
    loop.add_argument("--context", type=int, default=defaults.context)
    loop.add_argument("--accumulation", type=int, default=defaults.accumulation)
    loop.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    loop.add_argument(
        "--head-weights", type=_numbers, metavar="W,...", help="weight of each head's loss"
    )
    loop.add_argument(
        "--head-weights-warmup",
        type=float,
        default=defaults.head_weights_warmup,
        metavar="SHARE",
        help="share of the run in which the later heads' weights rise from 0",
    )
    loop.add_argument("--head-dropout", type=_numbers, metavar="P,...", help="dropout of each head")
    loop.add_argument(
        "--dropout-warmup",
        type=float,
        default=defaults.dropout_warmup,
        metavar="SHARE",
        help="share of the run in which dropout rises from 0",
    )
    loop.add_argument("--weight-decay", type=float, default=defaults.weight_decay)
    loop.add_argument("--eval-every", type=int, default=defaults.eval_every)
    loop.add_argument("--checkpoint-every", type=int, default=defaults.checkpoint_every)
    loop.add_argument("--route", choices=["parallel", "headwise"], default=defaults.route)
    loop.add_argument("--compile", action="store_true", help="torch.compile trunk and heads")
    loop.add_argument("--precision", choices=["bfloat16", "float32"], help="default: the faster")


def run(args: argparse.Namespace, device: torch.device) -> bool:
    """Train as `args` say; return whether the run is complete."""
    from mtp_fast.terminal import TrainingProgress

    if args.tensorboard is not None:
        from mtp_fast.training.tensorboard import TensorBoardLog

    with torchrun_group(device) as device, ExitStack() as stack:
        make = _new_trainer if args.resume is None else _resumed_trainer
        trainer = make(args, device)
        if process_rank() != 0:
            return trainer.run()
        reports = [stack.enter_context(TrainingProgress(trainer)).report]
        if args.tensorboard is not None:
            log = TensorBoardLog(args.tensorboard, trainer.step)
            reports.append(stack.enter_context(log).report)

        def report(metrics: StepMetrics) -> None:
            for to in reports:
                to(metrics)

        finished = trainer.run(report)
    if not finished:
        print(f"stopped; go on with: mtp-fast train --resume {trainer.directory}")
        return False
    print(f"checkpoint: {trainer.directory}")
    return True


def _new_trainer(args: argparse.Namespace, device: torch.device) -> Trainer:
    if (
        process_rank() == 0
        and args.out.exists()
        and (not args.out.is_dir() or any(args.out.iterdir()))
    ):
        raise ValueError(f"--out {args.out} is in use; take another, or --resume it")
    if args.steps is None and args.minutes is None:
        raise ValueError("give --steps or --minutes")
    corpus = _corpus(args.files, args.seed)
    model_config = MTPConfig(
        vocab_size=corpus.vocab_size,
        dim=args.dim,
        n_layers=args.layers,
        n_attention_heads=args.attention_heads,
        n_kv_heads=args.kv_heads,
        n_future_tokens=args.heads,
        ffn_dim=args.ffn_dim,
        max_seq_len=args.max_seq_len,
        dropout=args.dropout,
    )
    config = TrainConfig(
        steps=args.steps,
        minutes=args.minutes,
        batch_size=args.batch_size,
        context=args.context,
        accumulation=args.accumulation,
        learning_rate=args.learning_rate,
        head_weights=args.head_weights,
        head_weights_warmup=args.head_weights_warmup,
        head_dropout=args.head_dropout,
        dropout_warmup=args.dropout_warmup,
        weight_decay=args.weight_decay,
        eval_every=args.eval_every,
        checkpoint_every=args.checkpoint_every,
        route=args.route,
        compile=args.compile,
        precision=args.precision or default_precision(device),
        seed=args.seed,
    )
    train_tokens, validation_tokens = corpus.read()
    torch.manual_seed(args.seed)
    model = MTPTransformer(model_config).to(device)
    trainer = Trainer(model, config, train_tokens, validation_tokens, args.out)
    if process_rank() == 0:
        corpus.save(args.out)
    return trainer


def _corpus(files: Sequence[Path], seed: int) -> Corpus | PreparedCorpus:
    if len(files) == 1 and files[0].is_dir():
        return PreparedCorpus.open(files[0])
    return Corpus(tuple(files), seed=seed)


def _resumed_trainer(args: argparse.Namespace, device: torch.device) -> Trainer:
    if args.files:
        raise ValueError("--resume goes on with the files of its run; give none")
    train_tokens, validation_tokens = load_corpus(args.resume).read()
    return Trainer.resume(args.resume, train_tokens, validation_tokens, device)


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers between commas."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers as 1,0.5, got {text!r}") from error
