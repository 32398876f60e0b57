"""Loss and perplexity of a model, with or without an adapter or a tuned state, on a data file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from rwkvpeft.cli.guard import guarded
from rwkvpeft.cli.tuned_model import add_model_flags, load_from_flags
from rwkvpeft.config.flags import specs
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.config.help import help_text
from rwkvpeft.config.values import from_words
from rwkvpeft.errors import UserError

_DATA_FLAGS = ("data_file", "data_type", "ctx_len", "dataload", "loss_mask", "mask_id", "text_key")
_CTX_LEN = 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return guarded(lambda: _run(arguments), debug="--debug" in arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rwkvpeft.evaluate", description=__doc__, allow_abbrev=False)
    add_model_flags(parser)
    data = parser.add_argument_group("data")
    for spec in specs(DataConfig):
        if spec.name in _DATA_FLAGS:
            choices = "{" + ",".join(spec.choices) + "}" if spec.choices else None
            ctx_len = f"tokens per row (default: the adapter's, else {_CTX_LEN})"
            help = ctx_len if spec.name == "ctx_len" else help_text(spec)
            data.add_argument(spec.option, nargs=1, metavar=spec.metavar or choices, help=help)
    data.add_argument("--micro_bsz", type=int, default=1, help="rows computed at once (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser


def _run(arguments: list[str]) -> int:
    flags = _parser().parse_args(arguments)
    values = {
        spec.name: from_words(spec, getattr(flags, spec.name))
        for spec in specs(DataConfig)
        if spec.name in _DATA_FLAGS and getattr(flags, spec.name) is not None
    }
    if not values.get("data_file"):
        raise UserError("--data_file is missing", expected="PREFIX of PREFIX.bin and PREFIX.idx, or a .jsonl file")
    if flags.micro_bsz < 1:
        raise UserError("--micro_bsz is out of range", found=flags.micro_bsz, expected="1 or more")
    result = _evaluate(flags, values)
    if flags.json:
        print(json.dumps(result))
    else:
        print(f"loss {result['loss']:.6f}  perplexity {result['perplexity']:.4f}  tokens {result['tokens']:,}")
    return 0


def _evaluate(flags: argparse.Namespace, values: dict[str, Any]) -> dict[str, Any]:
    from tqdm import tqdm

    from rwkvpeft.data.dataset import open_dataset
    from rwkvpeft.data.loader import evaluation_batches
    from rwkvpeft.objectives.evaluation import evaluate

    tuned = load_from_flags(flags)
    ctx_len = values.get("ctx_len") or (tuned.recipe.ctx_len if tuned.recipe else None) or _CTX_LEN
    data = DataConfig(**values, tokenizer=tuned.tokenizer.name)
    dataset = open_dataset(data, ctx_len=ctx_len, vocab_size=tuned.model.shape.vocab_size, seed=0)
    batches = tqdm(
        evaluation_batches(dataset, flags.micro_bsz),
        total=-(-len(dataset) // flags.micro_bsz),
        # no bar in a file
        disable=None,
        leave=False,
    )
    found = evaluate(tuned.model, batches)
    return {"loss": found.loss, "perplexity": found.perplexity, "tokens": int(found.tokens), "rows": len(dataset)}
