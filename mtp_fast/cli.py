"""The command line: `mtp-fast demo | prepare | train | generate | bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

import mtp_fast
from mtp_fast import cli_train
from mtp_fast.decoding import generate
from mtp_fast.models import MTPTransformer
from mtp_fast.text import load_codec
from mtp_fast.training import default_precision, prepare

# The extra that holds a package.
EXTRAS = {
    "matplotlib": "cli",
    "pytest_benchmark": "bench",
    "rich": "cli",
    "safetensors": "cli",
    "tensorboard": "tensorboard",
    "tokenizers": "tokenizers",
}
EXIT_FAILED = 1
SHIPPED_CHECKPOINT = Path(__file__).parent / "checkpoints" / "stdlib"
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0; 1 if a bench failed; 2 for bad input; 130 if interrupted.
    """
    args = _parser().parse_args(arguments)
    try:
        code: int = args.run(args)
    except (ValueError, TypeError, OSError) as error:
        # What a user can get wrong is raised as one of these, with the argument's name and value.
        message = " ".join(str(error).split())
        print(f"mtp-fast {args.command}: error: {message}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        print(
            f"mtp-fast {args.command}: error: {error.name} is missing; "
            f"pip install 'mtp-fast[{EXTRAS[error.name]}]'",
            file=sys.stderr,
        )
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(f"mtp-fast {args.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mtp-fast", description="Multi-token prediction: train and decode.")
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("demo", help="train on the standard library, then decode faster")
    run.add_argument("--minutes", type=float, default=3.0, help="training time (default 3)")
    run.add_argument("--out", type=Path, default=Path("runs/demo"), help="where results go")
    _add_common(run)
    run.set_defaults(run=_demo)

    run = commands.add_parser("prepare", help="turn large text files into tokens, for train")
    run.add_argument("files", type=Path, nargs="+", help="text files, each a document")
    run.add_argument("--out", type=Path, required=True, help="directory to make")
    run.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="tokenizer.json; without: bytes"
    )
    run.add_argument("--separator", metavar="TOKEN", help="the tokenizer's token between documents")
    run.add_argument("--validation-share", type=float, default=0.05, help="share that is held out")
    run.add_argument("--seed", type=int, default=0, help="of the held-out files")
    run.set_defaults(run=_prepare)

    run = commands.add_parser("train", help="train a model on text files or a prepared corpus")
    cli_train.add_options(run)
    _add_common(run)
    run.set_defaults(run=_train, seed=None)  # as the others of its options, if not given

    run = commands.add_parser("generate", help="continue prompts with a checkpoint")
    run.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        default=SHIPPED_CHECKPOINT,
        help="checkpoint directory (default: the shipped model of Python code)",
    )
    source = run.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", help="text to continue; may be repeated")
    source.add_argument("--prompt-file", type=Path, help="or a file that holds it")
    run.add_argument("--max-new-tokens", type=int, default=256)
    run.add_argument("--heads", type=int, help="heads in use (default: all)")
    run.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    run.add_argument("--top-k", type=int)
    run.add_argument("--top-p", type=float)
    run.add_argument("--min-p", type=float)
    run.add_argument("--rule", choices=["exact", "block", "typical"], default="exact")
    run.add_argument("--stream", action="store_true", help="print one prompt's text as it comes")
    _add_common(run)
    run.set_defaults(run=_generate)

    run = commands.add_parser("bench", help="compare the ops with their bounds and peers")
    run.add_argument("--quick", action="store_true", help="small shapes: within 3 minutes")
    run.add_argument("--out", type=Path, default=Path("runs/bench"), help="where results go")
    run.set_defaults(run=_bench)
    return parser


class _Version(argparse.Action):
    """Print what the build holds. Not argparse's own: building it would cost every command."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print version and build, then exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        for key, value in mtp_fast.build_info().items():
            print(f"{key}: {value}")
        parser.exit()


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--seed", type=int, default=0)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu or cuda, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    return device


def _bench(args: argparse.Namespace) -> int:
    from mtp_fast import benchmark

    return 0 if benchmark.run(args.out, args.quick) else EXIT_FAILED


def _demo(args: argparse.Namespace) -> int:
    from mtp_fast import demo

    finished = demo.run(args.out, args.minutes, _device(args.device), args.seed)
    return 0 if finished else EXIT_INTERRUPTED


def _prepare(args: argparse.Namespace) -> int:
    corpus = prepare(
        args.files,
        args.out,
        tokenizer=args.tokenizer,
        separator=args.separator,
        validation_share=args.validation_share,
        seed=args.seed,
    )
    print(
        f"{corpus.directory}: {corpus.train_tokens:,} tokens for training and "
        f"{corpus.validation_tokens:,} for validation, vocabulary {corpus.vocab_size:,}"
    )
    return 0


def _train(args: argparse.Namespace) -> int:
    return 0 if cli_train.run(args, _device(args.device)) else EXIT_INTERRUPTED


def _generate(args: argparse.Namespace) -> int:
    from mtp_fast.terminal import TextStream, print_continuation

    device = _device(args.device)
    dtype = getattr(torch, default_precision(device))
    model = MTPTransformer.from_pretrained(args.checkpoint, dtype=dtype, device=device).eval()
    codec = load_codec(args.checkpoint, model.config.vocab_size)
    texts = [args.prompt_file.read_bytes()] if args.prompt is None else map(str.encode, args.prompt)
    prompts = [torch.tensor(codec.encode(text), dtype=torch.int64) for text in texts]
    if args.stream and len(prompts) > 1:
        raise ValueError(f"--stream prints one prompt, got {len(prompts)}")
    stream = TextStream(prompts[0], codec.decode) if args.stream else None
    result = generate(
        model,
        prompts,
        args.max_new_tokens,
        n_heads=args.heads,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        rule=args.rule,
        seed=args.seed,
        eos_token_id=codec.eos_token_id,
        on_tokens=None if stream is None else stream.write,
    )
    if stream is not None:
        stream.close()
    else:
        for prompt, tokens, drafted in zip(prompts, result.tokens, result.drafted, strict=True):
            print_continuation(prompt, tokens, drafted, codec.decode)
    stats = result.stats
    print(
        f"{sum(map(len, result.tokens))} tokens in {stats.seconds:.2f} s, "
        f"{stats.tokens_per_forward:.2f} tokens per forward",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
