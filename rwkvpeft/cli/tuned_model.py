"""The flags of commands that run a model: which one, with what on it, and where."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from rwkvpeft.registry import BACKENDS

if TYPE_CHECKING:
    from rwkvpeft.generation.tuned import TunedModel


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags ``load_from_flags`` reads, and --debug."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="FILE", help="base or merged model, a .pth file")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--adapter", metavar="FILE|FOLDER",
                        help="adapter of any method to apply without merging: a .pth file or a Hugging Face folder")
    either.add_argument("--state", metavar="FILE", help="tuned state to start from")
    group.add_argument("--tokenizer", metavar="NAME|FILE",
                       help="world, bytes, utf-16le or a vocabulary file (default: the adapter's, else bytes for "
                       "256 token ids, world for 65536, otherwise vocab.json beside the model)")
    group.add_argument("--head_size_divisor", type=float, help="as in training (default: the adapter's, else 8)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: %(default)s)")
    machine.add_argument("--precision", choices=["fp32", "bf16", "fp16"],
                         help="arithmetic (default: fp32 on a CPU, elsewhere the file's)")
    ops = sorted({name for row in BACKENDS.values() for name in row})
    machine.add_argument("--op", default="auto", metavar="NAME",
                         help=f"program for the WKV recurrence: auto, {', '.join(ops)} (default: %(default)s)")
    machine.add_argument("--debug", action="store_true", help="show the traceback of a user error")


def load_from_flags(flags: argparse.Namespace) -> TunedModel:
    """Load what the flags name. Raises: UserError as ``load_tuned``."""
    from rwkvpeft.generation.tuned import load_tuned

    return load_tuned(
        flags.model,
        flags.adapter or flags.state,
        device=flags.device,
        precision=flags.precision,
        op=flags.op,
        tokenizer=flags.tokenizer,
        head_size_divisor=flags.head_size_divisor,
    )


def content_fingerprint(path: Path | str) -> str:
    """Tells a file, or the files of a folder, from others of that name. Raises: UserError if one cannot be read."""
    from rwkvpeft.checkpoints.files import fingerprint

    path = Path(path)
    if not path.is_dir():
        return fingerprint(path)
    files = sorted(file for file in path.glob("*") if file.is_file())
    return hashlib.blake2b("".join(map(fingerprint, files)).encode(), digest_size=16).hexdigest()
