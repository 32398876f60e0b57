"""Store what a model says of every next token of the data, for train.py --objective distill --teacher FOLDER."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkvpeft.cli.guard import guarded
from rwkvpeft.cli.tuned_model import add_model_flags, content_fingerprint, load_from_flags
from rwkvpeft.config.check_sources import TEXTS, by_source
from rwkvpeft.config.data_files import check_data_files, data_files, without_suffix
from rwkvpeft.config.findings import Findings
from rwkvpeft.config.flags import FlagSpec, specs
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.config.help import help_text
from rwkvpeft.config.values import from_words
from rwkvpeft.errors import UserError

if TYPE_CHECKING:
    from rwkvpeft.data.source import TokenSource
    from rwkvpeft.generation.labelling import LabelSettings

_DATA_FLAGS = ("data_file", "data_type", "ctx_len", "text_key", "sft_field", "sft_split", "my_sample_len")
_SECONDS_BETWEEN_LINES = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return guarded(lambda: _run(arguments), debug="--debug" in arguments)


def _data_specs() -> list[FlagSpec]:
    return [spec for spec in specs(DataConfig) if spec.name in _DATA_FLAGS]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rwkvpeft.teacher", description=__doc__, allow_abbrev=False,
        epilog="Stopped, the same command goes on behind the last complete shard.",
    )
    add_model_flags(parser)
    data = parser.add_argument_group("data", "as in training; every document is read from its beginning")
    for spec in _data_specs():
        choices = "{" + ",".join(spec.choices) + "}" if spec.choices else None
        ctx_len = "label the first tokens of each document alone (default: all)"
        data.add_argument(spec.option, nargs="*" if spec.kind in ("words", "switch") else 1,
                          metavar=spec.metavar or choices, help=ctx_len if spec.name == "ctx_len" else help_text(spec))
    stored = parser.add_argument_group("labels")
    stored.add_argument("--output", required=True, metavar="FOLDER", help="where the labels are written")
    stored.add_argument("--top_k", type=int, default=64, help="tokens that are told apart, the likeliest; of the "
                        "others the sum is kept; 0: all of the vocabulary (default: %(default)s)")
    stored.add_argument("--dtype", choices=["fp16", "bf16", "fp32"], default="fp16",
                        help="of the log-probabilities (default: %(default)s)")
    stored.add_argument("--temperature", type=float, nargs="+", default=[1.0, 2.0], metavar="T",
                        help="what training may take for --distill_temperature (default: 1 2)")
    stored.add_argument("--shard_tokens", type=int, default=1 << 18,
                        help="tokens of a file, which are in memory together; 1 GiB at most (default: %(default)s)")
    stored.add_argument("--tokens_at_once", type=int, default=4096,
                        help="tokens that the model reads at once (default: %(default)s)")
    return parser


def _run(arguments: list[str]) -> int:
    flags = _parser().parse_args(arguments)
    values = {spec.name: from_words(spec, getattr(flags, spec.name)) for spec in _data_specs()
              if getattr(flags, spec.name) is not None}
    data = _checked(values, flags)
    from rwkvpeft.generation.labelling import LabelSettings

    settings = LabelSettings(flags.top_k, flags.dtype, tuple(dict.fromkeys(flags.temperature)), data.ctx_len or 0,
                             flags.shard_tokens, flags.tokens_at_once, chunk_rows=128)
    _label(flags, data, settings)
    return 0


def _checked(values: dict[str, Any], flags: argparse.Namespace) -> DataConfig:
    """The data's settings. Raises: UserError listing every mistake found."""
    if values.get("data_type") in TEXTS:
        raise UserError(
            "stored labels are of documents, and a text is trained in windows that begin anywhere",
            found=f"--data_type {values['data_type']}",
            fix="the model itself: train.py --objective distill --teacher MODEL.pth",
        )
    if not values.get("data_file"):
        raise UserError("--data_file is missing", expected="PREFIX of PREFIX.bin and PREFIX.idx, a .jsonl file, or "
                        "what --data_type says")
    by_source(values)
    if values.get("data_type", "binidx") == "binidx":
        values["data_file"] = without_suffix(values["data_file"])
    # the tokenizer is the model's, which is known when it is loaded; windows have no labels of their own
    data = replace(DataConfig(**values), tokenizer="", dataload="pad")
    findings = Findings()
    check_data_files(data, findings)
    findings.check(flags.top_k >= 0, "--top_k is too small", found=flags.top_k, expected="0 or more")
    for name in ("shard_tokens", "tokens_at_once"):
        found = getattr(flags, name)
        findings.check(found >= 1, f"--{name} is too small", found=found, expected="1 or more")
    findings.check(all(0 < value < float("inf") for value in flags.temperature), "--temperature must be above 0",
                   found=flags.temperature)
    findings.check(data.ctx_len is None or data.ctx_len >= 1, "--ctx_len is too small", found=data.ctx_len,
                   expected="1 or more")
    output = Path(flags.output)
    findings.check(output.is_dir() or not output.exists(), "--output names a file, and labels are a folder",
                   found=output)
    findings.raise_any()
    return data


def _label(flags: argparse.Namespace, data: DataConfig, settings: LabelSettings) -> None:
    tuned = load_from_flags(flags)
    from rwkvpeft.generation.labelling import begin, index_of, write_labels

    model, folder = tuned.model, Path(flags.output)
    sources = _sources(replace(data, tokenizer=tuned.tokenizer.name), model.shape.vocab_size)
    index = index_of(Path(flags.model).name, _fingerprint(flags), model.shape.vocab_size, sources, settings)
    shards = begin(folder, index, sources)
    if index.shards > len(shards):
        print(f"{index.shards - len(shards)} of {index.shards} shards are there already", file=sys.stderr)
    ranges = [index.shard_range(shard) for shard in shards]
    with _Pace(sum(stop - start for start, stop in ranges)) as pace:
        write_labels(model, sources, folder, index, settings, shards, pace.count)
    print(f"{folder}: labels of {index.places:,} tokens of {index.documents:,} documents in {index.shards} "
          f"file{'' if index.shards == 1 else 's'}, {index.bytes_per_place} bytes each, "
          f"{index.bytes_per_place * index.places / 1e6:,.1f} MB")


def _sources(data: DataConfig, vocab_size: int) -> list[TokenSource]:
    """The documents of all files. Raises: UserError as the sources do, and if there is nothing to predict."""
    from rwkvpeft.data.dataset import open_source

    sources = [open_source(replace(data, data_file=part.path)) for part in data_files(data.data_file)]
    for source in sources:
        source.check(vocab_size)
    if not any((source.sizes > 1).any() for source in sources):
        raise UserError(f"{data.data_file} holds no document of two tokens or more", fix="other data")
    return sources


def _fingerprint(flags: argparse.Namespace) -> str:
    """Tells the model, and what is on it, from others. Raises: UserError if a file cannot be read."""
    from rwkvpeft.checkpoints.quantised import model_fingerprint

    found = model_fingerprint(flags.model)
    adapter = flags.adapter or flags.state
    if adapter is None:
        return found
    return hashlib.blake2b((found + content_fingerprint(adapter)).encode(), digest_size=16).hexdigest()


class _Pace:
    """Says how far the work is and how long it will take: a bar on a terminal, otherwise a line now and then."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._begun = self._told = time.monotonic()

    def __enter__(self) -> _Pace:
        from tqdm import tqdm

        self._bar = tqdm(total=self._total, unit=" tokens", unit_scale=True, disable=None, leave=False)
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def count(self, places: int) -> None:
        """So many more are done."""
        self._done += places
        self._bar.update(places)
        now = time.monotonic()
        if self._bar.disable and (now - self._told >= _SECONDS_BETWEEN_LINES or self._done == self._total):
            self._told = now
            rate = self._done / max(now - self._begun, 1e-3)
            left = (self._total - self._done) / rate
            sys.stderr.write(f"{100 * self._done / self._total:.0f} %, {self._done:,} of {self._total:,} tokens, "
                             f"{rate:,.0f} a second, {left / 60:.1f} minutes left\n")


if __name__ == "__main__":
    sys.exit(main())
