"""Write a model with its large matrices quantised: smaller on the disk and quicker to load than --quant each time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from rwkvpeft.cli.guard import guarded
from rwkvpeft.registry import FORMATS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return guarded(lambda: _run(arguments), debug="--debug" in arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rwkvpeft.quantize", description=__doc__, allow_abbrev=False,
        epilog="train.py --load_model and rwkvpeft.generate --model take the result as it is; adapters trained on it "
        "are merged into the full-precision model.",
    )
    parser.add_argument("--model", required=True, metavar="FILE", help="the full-precision model, a .pth file")
    parser.add_argument("--quant", required=True, choices=list(FORMATS),
                        help="format of the large matrices; 4bit: fp4, as upstream")
    parser.add_argument("--quant_double", action="store_true", help="store the scales of nf4 and fp4 in 8 bits too")
    parser.add_argument("--quant_head", action="store_true", help="quantise the head beside the blocks' matrices")
    parser.add_argument("--output", required=True, metavar="FILE", help="where to write the quantised model, a .pth")
    parser.add_argument("--device", default="cpu", help="where weights are quantised (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user error")
    return parser


def _run(arguments: list[str]) -> int:
    flags = _parser().parse_args(arguments)
    from rwkvpeft.checkpoints.adapter import load_recipe, save_recipe
    from rwkvpeft.checkpoints.quantised import Quantiser, quantise_file
    from rwkvpeft.generation.tuned import pick_device

    quantiser = Quantiser(
        flags.quant, double=flags.quant_double, head=flags.quant_head, device=pick_device(flags.device)
    )
    report = quantise_file(flags.model, flags.output, quantiser)
    recipe = load_recipe(flags.model)
    if recipe is not None:
        # a model of ours goes on telling its tokenizer and norm
        recipe = replace(recipe, quant=quantiser.format.name, quant_double=quantiser.double,
                         quant_head=quantiser.head)
        save_recipe(flags.output, recipe)
    format = quantiser.format
    print(f"{flags.output}: {report.packed} weights in {format.label}, {format.bits:.2f} bits each; "
          f"{report.output_bytes / 1e6:.1f} MB instead of {report.source_bytes / 1e6:.1f}")
    return 0
