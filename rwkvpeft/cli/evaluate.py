"""Loss and perplexity of a model, with or without an adapter or a tuned state, on data, or its results in lm_eval."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rwkvpeft.cli.evaluate_tasks import (
    add_task_flags,
    check_tasks,
    evaluate_tasks,
    refuse_task_flags,
    task_lines,
)
from rwkvpeft.cli.guard import guarded
from rwkvpeft.cli.tuned_model import add_model_flags, load_from_flags
from rwkvpeft.config.check_sources import by_source
from rwkvpeft.config.data_files import check_data_files, data_files, without_suffix
from rwkvpeft.config.findings import Findings
from rwkvpeft.config.flags import FlagSpec, specs
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.config.help import help_text
from rwkvpeft.config.values import from_words
from rwkvpeft.errors import UserError

if TYPE_CHECKING:
    from rwkvpeft.data.batches import TokenBatch
    from rwkvpeft.data.tokenizer import Tokenizer
    from rwkvpeft.generation.tuned import TunedModel

_DATA_FLAGS = (
    "data_file", "data_type", "ctx_len", "dataload", "loss_mask", "mask_id", "mask_think", "text_key", "sft_field",
    "sft_split", "my_sample_len",
)  # fmt: skip
_CTX_LEN = 1024
_CHUNK = 4096


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return guarded(lambda: _run(arguments), debug="--debug" in arguments)


def _data_specs() -> list[FlagSpec]:
    return [spec for spec in specs(DataConfig) if spec.name in _DATA_FLAGS]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rwkvpeft.evaluate", description=__doc__, allow_abbrev=False)
    add_model_flags(parser)
    data = parser.add_argument_group("data", "as in training; of several files each is evaluated, then all together")
    for spec in _data_specs():
        choices = "{" + ",".join(spec.choices) + "}" if spec.choices else None
        ctx_len = f"tokens per row (default: the adapter's, else {_CTX_LEN})"
        data.add_argument(spec.option, nargs="*" if spec.kind in ("words", "switch") else 1,
                          metavar=spec.metavar or choices, help=ctx_len if spec.name == "ctx_len" else help_text(spec))
    data.add_argument("--micro_bsz", type=int, default=1, help="rows computed at once (default: %(default)s)")
    add_task_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser


def _run(arguments: list[str]) -> int:
    flags = _parser().parse_args(arguments)
    given = [spec for spec in _data_specs() if getattr(flags, spec.name) is not None]
    if flags.tasks:
        _refuse_both(given)
        check_tasks(flags)
        found = evaluate_tasks(flags, load_from_flags(flags))
        print(json.dumps(found) if flags.json else "\n".join(task_lines(found)))
        return 0
    refuse_task_flags(flags)
    config = _data_config({spec.name: from_words(spec, getattr(flags, spec.name)) for spec in given}, flags)
    result = _evaluate(config, load_from_flags(flags), flags.micro_bsz)
    print(json.dumps(result) if flags.json else "\n".join(_lines(result)))
    return 0


def _refuse_both(given: list[FlagSpec]) -> None:
    if given:
        options = ", ".join(spec.option for spec in given)
        raise UserError("--tasks asks for lm_eval, which has its own data", found=options, fix="one of them at a time")


def _data_config(values: dict[str, Any], flags: argparse.Namespace) -> DataConfig:
    """What to evaluate on, checked. Raises: UserError listing every mistake found."""
    if values.get("data_type") != "dummy" and not values.get("data_file"):
        raise UserError("--data_file is missing, and no --tasks are given",
                        expected="PREFIX of PREFIX.bin and PREFIX.idx, a .jsonl file, or what --data_type says")
    by_source(values)
    if values.get("data_type", "binidx") == "binidx":
        values["data_file"] = without_suffix(values["data_file"])
    # the model's own is taken, which is known when it is loaded
    config = replace(DataConfig(**values), tokenizer="")
    findings = Findings()
    check_data_files(config, findings)
    findings.check(flags.micro_bsz >= 1, "--micro_bsz is out of range", found=flags.micro_bsz, expected="1 or more")
    findings.check(config.ctx_len is None or config.ctx_len >= 1, "--ctx_len is out of range", found=config.ctx_len,
                   expected="1 or more")
    findings.check(config.dataload != "only" or flags.micro_bsz == 1,
                   "--dataload only needs --micro_bsz 1: its rows differ in length", fix="--micro_bsz 1")
    findings.raise_any()
    return config


def _evaluate(config: DataConfig, tuned: TunedModel, micro_bsz: int) -> dict[str, Any]:
    """The figures of all files together, and of each under ``files`` if there are several."""
    ctx_len = config.ctx_len or (tuned.recipe.ctx_len if tuned.recipe else None) or _CTX_LEN
    config = replace(config, tokenizer=tuned.tokenizer.name, ctx_len=ctx_len)
    parts = data_files(config.data_file)
    found = [_evaluate_file(replace(config, data_file=part.path), tuned, micro_bsz) for part in parts]
    result = _summary(found)
    if len(found) > 1:
        result["files"] = {part.path: _summary([sums]) for part, sums in zip(parts, found, strict=True)}
    return result


def _evaluate_file(config: DataConfig, tuned: TunedModel, micro_bsz: int) -> dict[str, float]:
    """Sums over the data of one file."""
    from tqdm import tqdm

    from rwkvpeft.data.dataset import open_dataset
    from rwkvpeft.data.loader import evaluation_batches
    from rwkvpeft.objectives.evaluation import add_up

    assert config.ctx_len is not None
    dataset = open_dataset(config, ctx_len=config.ctx_len, vocab_size=tuned.model.shape.vocab_size, seed=0)
    letters = _Letters(tuned.tokenizer)
    batches = tqdm(
        letters.counted(evaluation_batches(dataset, micro_bsz)),
        total=-(-len(dataset) // micro_bsz),
        # no bar in a file
        disable=None,
        leave=False,
    )
    loss, tokens = add_up(tuned.model, batches, chunk=_CHUNK)
    report = dataset.report()
    return {"loss": loss, "tokens": tokens, "bytes": letters.bytes, "rows": len(dataset),
            "documents": report.documents, "cut": report.cut_endings}


class _Letters:
    """Counts the bytes that the evaluated tokens spell, each by its weight."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._lengths = tokenizer.byte_lengths
        self.bytes = 0.0

    def counted(self, batches: Iterable[TokenBatch]) -> Iterator[TokenBatch]:
        """The batches, each counted as it passes."""
        for batch in batches:
            # ids that the model has and the tokenizer does not spell nothing
            known = (batch.weights > 0) & (batch.labels < len(self._lengths))
            lengths = self._lengths[batch.labels[known].numpy()]
            self.bytes += float((lengths * batch.weights[known].numpy()).sum())
            yield batch


def _summary(found: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Means over all tokens of several files: ``loss`` in nats a token."""
    from rwkvpeft.objectives.evaluation import mean_of

    sums = {name: sum(part[name] for part in found) for name in found[0]}
    mean = mean_of(sums["loss"], sums["tokens"])
    return {
        "loss": mean.loss,
        "perplexity": mean.perplexity,
        "bits_per_byte": sums["loss"] / math.log(2) / sums["bytes"] if sums["bytes"] else None,
        **{name: int(sums[name]) for name in ("tokens", "rows", "documents", "cut")},
    }


def _lines(result: dict[str, Any]) -> list[str]:
    """The figures for people, those of each file first."""
    lines = [f"{path}: {_line(part)}" for path, part in result.get("files", {}).items()]
    lines.append(_line(result))
    if result["cut"]:
        documents = "1 document is" if result["cut"] == 1 else f"{result['cut']:,} documents are"
        lines.append(f"{documents} longer than --ctx_len; what did not fit was not evaluated")
    return lines


def _line(figures: dict[str, Any]) -> str:
    per_byte = figures["bits_per_byte"]
    bits = "" if per_byte is None else f"  bits a byte {per_byte:.4f}"
    return (f"loss {figures['loss']:.6f}  perplexity {figures['perplexity']:.4f}{bits}  tokens {figures['tokens']:,}  "
            f"rows {figures['rows']:,}")
