"""`mtp-fast train`: its options, and the run that they describe."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from mtp_fast.models import MTPConfig, MTPTransformer
from mtp_fast.text import check_tokenizer, save_tokenizer
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

# Options that shape a new model: the field of MTPConfig, its default here, and what it is.
MODEL = {
    "heads": ("n_future_tokens", 4, "prediction heads"),
    "layers": ("n_layers", 16, "blocks, heads included"),
    "dim": ("dim", 192, "width"),
    "attention_heads": ("n_attention_heads", 3, "query heads"),
    "kv_heads": ("n_kv_heads", 1, "key and value heads"),
    "ffn_dim": ("ffn_dim", 512, "width of the feed-forward"),
    "max_seq_len": ("max_seq_len", 1024, "longest sequence"),
    "dropout": ("dropout", 0.0, "of the embedding and of each branch"),
}
# Those of them that go with a pretrained one.
READING = ("heads", "max_seq_len")
# Options that are numbers in TrainConfig, under the same names.
LOOP = {
    "batch_size": "windows of a micro-batch",
    "context": "tokens of a window",
    "accumulation": "micro-batches of a step",
    "learning_rate": "after the warm-up",
    "final_learning_rate": "at the end of the run",
    "warmup": "share of the run in which the learning rate rises from 0",
    "head_weights_warmup": "share in which the later heads' weights rise from 0",
    "dropout_warmup": "share in which dropout rises from 0",
    "weight_decay": "of matrices",
    "grad_clip": "largest gradient norm",
    "eval_every": "steps between validations",
    "checkpoint_every": "steps between checkpoints",
}
# What does not describe a new run.
NOT_OF_A_RUN = {"command", "run", "device", "files", "resume", "tensorboard"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of training to `parser`; those that are not given are None."""
    parser.add_argument("files", type=Path, nargs="*", help="text files, or what prepare has made")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="checkpoint directory of a new run")
    where.add_argument("--resume", type=Path, metavar="DIR", help="continue the run in DIR")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="log metrics there as well")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="optimizer steps")
    length.add_argument("--minutes", type=float, help="or training time")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--from",
        type=Path,
        metavar="DIR",
        help="start from the model in DIR; of the other options here --heads and --max-seq-len "
        "go with it, and are DIR's by default",
    )
    _add_flag(model, "--freeze-next-token-model", "train its heads 1, 2, ... and nothing else")
    for name, (_, default, meaning) in MODEL.items():
        _add_number(model, name, default, meaning)
    loop = parser.add_argument_group("optimization")
    for name, meaning in LOOP.items():
        _add_number(loop, name, getattr(TrainConfig, name), meaning)
    for name, meaning in (("weights", "weight of each head's loss"), ("dropout", "in each head")):
        loop.add_argument(f"--head-{name}", type=_numbers, metavar="X,...", help=meaning)
    loop.add_argument("--route", choices=["parallel", "headwise"])
    loop.add_argument("--precision", choices=["bfloat16", "float32"], help="default: the faster")
    _add_flag(loop, "--compile", "torch.compile trunk and heads")
    _add_flag(loop, "--document-boundaries", "score no prediction across two documents")


def _add_flag(group: argparse._ArgumentGroup, option: str, meaning: str) -> None:
    group.add_argument(option, action="store_true", default=None, help=meaning)


def _add_number(group: argparse._ArgumentGroup, name: str, default: float, meaning: str) -> None:
    help_ = f"{meaning} (default {default})"
    group.add_argument(_option(name), type=type(default), metavar="X", help=help_)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def run(args: argparse.Namespace, device: torch.device) -> bool:
    """Train as `args` say; return whether the run is complete."""
    with torchrun_group(device) as device:
        return _train(args, device)


def _train(args: argparse.Namespace, device: torch.device) -> bool:
    from mtp_fast.terminal import TrainingProgress

    if args.tensorboard is not None:
        from mtp_fast.training.tensorboard import TensorBoardLog

    trainer = (_new_trainer if args.resume is None else _resumed_trainer)(args, device)
    if process_rank() != 0:
        return trainer.run()
    with ExitStack() as stack:
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
    given = _given(args)
    given.setdefault("seed", TrainConfig.seed)
    given.setdefault("precision", default_precision(device))
    corpus = _corpus(args.files, given["seed"])
    if args.document_boundaries:
        given["separator"] = corpus.separator
    fields = [field.name for field in dataclasses.fields(TrainConfig)]
    config = TrainConfig(**{name: given[name] for name in fields if name in given})
    torch.manual_seed(config.seed)
    make = _pretrained_model if "from" in given else _new_model
    model = make(given, corpus, device)
    train_tokens, validation_tokens = corpus.read()
    trainer = Trainer(model, config, train_tokens, validation_tokens, args.out)
    if process_rank() == 0:
        corpus.save(args.out)
        save_tokenizer(args.out, given.get("from"), corpus)
    return trainer


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that were given of those that describe a new run."""
    return {
        name: value
        for name, value in vars(args).items()
        if value is not None and name not in NOT_OF_A_RUN
    }


def _new_model(
    given: dict[str, Any], corpus: Corpus | PreparedCorpus, device: torch.device
) -> MTPTransformer:
    if "freeze_next_token_model" in given:
        raise ValueError("--freeze-next-token-model goes with --from: a new model has to learn")
    shape = {field: given.get(name, default) for name, (field, default, _) in MODEL.items()}
    return MTPTransformer(MTPConfig(vocab_size=corpus.vocab_size, **shape)).to(device)


def _pretrained_model(
    given: dict[str, Any], corpus: Corpus | PreparedCorpus, device: torch.device
) -> MTPTransformer:
    directory = given["from"]
    if wrong := [_option(name) for name in MODEL if name in given and name not in READING]:
        raise ValueError(f"--from {directory} has a shape of its own; give no {', '.join(wrong)}")
    options = {MODEL[name][0]: given[name] for name in READING if name in given}
    model = MTPTransformer.from_pretrained(directory, device=device, **options)
    check_tokenizer(directory, model.config.vocab_size, corpus)
    return model


def _corpus(files: Sequence[Path], seed: int) -> Corpus | PreparedCorpus:
    if len(files) == 1 and files[0].is_dir():
        return PreparedCorpus.open(files[0])
    return Corpus(tuple(files), seed=seed)


def _resumed_trainer(args: argparse.Namespace, device: torch.device) -> Trainer:
    if args.files:
        raise ValueError("--resume goes on with the files of its run; give none")
    if given := [_option(name) for name in _given(args)]:
        raise ValueError(f"--resume goes on as its run began; give no {', '.join(given)}")
    train_tokens, validation_tokens = load_corpus(args.resume).read()
    return Trainer.resume(args.resume, train_tokens, validation_tokens, device)


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers between commas."""
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers as 1,0.5, got {text!r}") from error
