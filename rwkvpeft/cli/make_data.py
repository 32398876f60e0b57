"""``python make_data.py IN.jsonl N_EPOCH CTX_LEN``: a jsonl file becomes shuffled, tokenised binidx."""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rwkvpeft.cli.guard import guarded
from rwkvpeft.config.check_sources import check_sources
from rwkvpeft.config.data_files import format_of
from rwkvpeft.config.findings import Findings
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.errors import UserError

if TYPE_CHECKING:
    from rwkvpeft.data.binidx import BinidxSource
    from rwkvpeft.data.convert import Converted
    from rwkvpeft.data.source import Tokens
    from rwkvpeft.data.tokenizer import Tokenizer

_EPILOG = """\
Each line of IN.jsonl is one JSON object, in one of these layouts:
  {"text": "..."}                                              taken as it is
  {"messages": [{"role": "user", "content": "..."}, ...]}      System / User / Assistant turns
  {"conversations": [{"from": "human", "value": "..."}, ...]}  the same
  {"instruction": "...", "input": "...", "output": "..."}      Instruction / Input / Response
  {"prompt": "...", "completion": "..."}                       User / Assistant

The lines are shuffled once for each epoch. With the same --seed the files come out the same, byte for byte.
"""
_PREVIEW_TOKENS = 100
_EXIT_TERMINATED = 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for a mistake of the user, 130 when interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    with contextlib.suppress(AttributeError):
        # a preview in any script must not fail on a terminal that lacks it
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    with _terminated_cleanly():
        return guarded(lambda: _run(_parser().parse_args(arguments)), debug="--debug" in arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make_data.py",
        description="Tokenise and shuffle a jsonl file: writes NAME.bin and NAME.idx into the current folder.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="IN.jsonl", type=Path, help="the documents, one a line; or .csv, .parquet")
    parser.add_argument("epochs", metavar="N_EPOCH", type=_positive, help="how many shuffled copies to write")
    parser.add_argument("ctx_len", metavar="CTX_LEN", type=_positive, help="tokens per row, for the magic prime")
    parser.add_argument("--seed", type=int, help="seed of the order; default: a new one, printed")
    parser.add_argument("--output", metavar="PREFIX", type=Path, help="write PREFIX.bin and PREFIX.idx instead")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME|FILE",
        default="world",
        help="world, bytes, utf-16le, or a vocabulary file; default: world",
    )
    parser.add_argument("--workers", metavar="N", type=_positive, help="processes; default: one for each processor")
    parser.add_argument("--skip_bad_lines", action="store_true", help="count bad lines and leave them out")
    parser.add_argument(
        "--mask",
        action="store_true",
        help="write NAME.mask too: who says each token, for train.py --loss_mask qa or last and --mask_think",
    )
    parser.add_argument(
        "--sft_field",
        metavar="NAME",
        nargs="+",
        default=[],
        help="columns of prompt and answer, or that of the text; default: the layouts below",
    )
    parser.add_argument("--text_key", metavar="NAME", default="text", help="field of a whole document; default: text")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user error")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


_positive.__name__ = "number"


def _run(options: argparse.Namespace) -> int:
    # numpy and the tokenizer take a while to import: --help does not wait for them
    from rwkvpeft.data.binidx import BinidxSource
    from rwkvpeft.data.convert import Conversion, convert
    from rwkvpeft.data.jsonl import require_readable
    from rwkvpeft.data.progress import ProgressLines
    from rwkvpeft.data.tokenizer import load_tokenizer

    require_readable(options.file)
    findings = Findings()
    check_sources(DataConfig(data_type="sft", sft_field=options.sft_field), ["sft"], findings)
    findings.raise_any()
    prefix = _output_prefix(options.file, options.output)
    seed = secrets.randbelow(1 << 31) if options.seed is None else options.seed
    job = Conversion(
        path=options.file,
        origin=options.file,
        prefix=prefix,
        epochs=options.epochs,
        seed=seed,
        tokenizer=options.tokenizer,
        text_key=options.text_key,
        workers=options.workers,
        skip_bad=options.skip_bad_lines,
        with_mask=options.mask,
    )
    written = ", ".join(f"{prefix}.{kind}" for kind in ("bin", "idx", *(("mask",) if job.with_mask else ())))
    print(f"### {job.name} -> {written}: {job.epochs} shuffled, --seed {seed}", flush=True)
    with _as_jsonl(options, prefix) as path, ProgressLines(sys.stderr.isatty()) as progress:
        converted = convert(replace(job, path=path), progress.show)
    _print_result(converted, BinidxSource(prefix), load_tokenizer(options.tokenizer), prefix, options.ctx_len)
    return 0


@contextlib.contextmanager
def _as_jsonl(options: argparse.Namespace, prefix: Path) -> Iterator[Path]:
    """The file itself, or its rows as a jsonl file that is there for a while.

    Each stands in the line of its number, so that messages tell where to look.
    """
    if format_of(str(options.file), "jsonl") != "sft" and not options.sft_field:
        yield options.file
        return
    from rwkvpeft.atomic import writing
    from rwkvpeft.data.huggingface import sft_records

    with contextlib.ExitStack() as stack:
        with writing(prefix):
            prefix.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(tempfile.TemporaryDirectory(dir=prefix.parent))
        path = Path(folder) / "rows.jsonl"
        line = 1
        # closed before it is read: Windows opens no file twice
        with writing(prefix), path.open("w", encoding="utf-8", newline="\n") as file:
            for record in sft_records(str(options.file), "train", options.sft_field, options.text_key):
                # dates and the like are none of a document's parts
                text = json.dumps(record.value, default=str)
                file.write("\n" * (record.line - line) + text)
                line = record.line
        yield path


def _output_prefix(source: Path, output: Path | None) -> Path:
    prefix = Path(source.stem) if output is None else output
    if prefix.suffix in (".bin", ".idx"):
        prefix = prefix.with_suffix("")
    if not prefix.name:
        raise UserError("--output has no file name", found=str(output), expected="a prefix, for instance data/train")
    for suffix in (".bin", ".idx", ".mask"):
        target = prefix.with_name(prefix.name + suffix)
        if target.exists() and target.samefile(source):
            raise UserError(f"the output {target} would replace the input", fix="--output with another prefix")
    return prefix


def _print_result(
    converted: Converted, source: BinidxSource, tokenizer: Tokenizer, prefix: Path, ctx_len: int
) -> None:
    from rwkvpeft.data.prime import magic_prime

    for index in (0, len(source) - 1):
        print(f"{'-' * 50} document {index}, {source.sizes[index]} tokens")
        print(_preview(source.read(index)[:-1], tokenizer))
    print("-" * 80)
    if converted.skipped:
        print(f"### skipped {converted.skipped} bad lines, the first: {converted.first_skipped}")
    if converted.unkept:
        documents = "1 document" if converted.unkept == 1 else f"{converted.unkept} documents"
        print(f'### note: {documents} with a "weight" of turns, or turns not to be trained: only --mask keeps that')
    print(f"### {prefix}.bin/idx: {source.n_tokens} tokens, {len(source)} documents ({converted.documents} different)")
    prime = magic_prime(source.n_tokens, ctx_len)
    if prime is not None:
        print(f"\n### magic_prime = {prime} (for ctx_len {ctx_len})")
        print(f"\n--my_exit_tokens {source.n_tokens} --magic_prime {prime} --ctx_len {ctx_len}\n")


def _preview(tokens: Tokens, tokenizer: Tokenizer) -> str:
    """A document's text; of a long one the beginning and the end, cut between characters."""
    if len(tokens) <= 2 * _PREVIEW_TOKENS:
        return tokenizer.decode(tokens.tolist())
    head = tokenizer.decode(tokens[:_PREVIEW_TOKENS].tolist()).rstrip("\ufffd")
    tail = tokenizer.decode(tokens[-_PREVIEW_TOKENS:].tolist()).lstrip("\ufffd")
    return f"{head}\n{'· ' * 30}\n{tail}"


@contextlib.contextmanager
def _terminated_cleanly() -> Iterator[None]:
    """Let SIGTERM end the command as an exception does, so that nothing half written stays behind."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(_EXIT_TERMINATED)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:
        # only the main thread of a program may set handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
