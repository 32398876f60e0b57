"""Fold an adapter or a tuned state into its base model and write a plain checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rwkvpeft.cli.guard import guarded
from rwkvpeft.errors import UserError
from rwkvpeft.registry import ADAPTERS

if TYPE_CHECKING:
    from rwkvpeft.checkpoints.adapter import Recipe

DEFAULT_ALPHA = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return guarded(lambda: _run(arguments), debug="--debug" in arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="merge.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--base_model", required=True, metavar="FILE", help="the model the adapter was trained on")
    parser.add_argument("--checkpoint", metavar="FILE", help="the adapter or tuned state")
    parser.add_argument("--output", required=True, metavar="FILE", help="where to write the merged model")
    parser.add_argument("--format", choices=["pth", "safetensors", "hf"],
                        help="kind of file (default: by the ending of --output, else pth; hf is not available yet)")
    parser.add_argument("--device", default="cpu", help="where sums are made (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user error")
    upstream = parser.add_argument_group("RWKV-PEFT's flags, for adapters without a recipe beside them")
    upstream.add_argument("--type", default="none", metavar="METHOD",
                          help=f"{', '.join(ADAPTERS)}; none: as the recipe or the tensor names say (default)")
    for name in ("lora", "peft", "state"):
        upstream.add_argument(f"--{name}_checkpoint", metavar="FILE", help="the same as --checkpoint")
    upstream.add_argument("--lora_alpha", type=float,
                          help=f"LoRA's alpha (default: the recipe's, else {DEFAULT_ALPHA}, the default of training)")
    upstream.add_argument("--lora_init", default="none", metavar="FILE", help="for PiSSA only, not available yet")
    upstream.add_argument("--quant", default="none", metavar="TYPE",
                          help="none: the base is merged as it is, also if training quantised it")
    return parser


def _run(arguments: list[str]) -> int:
    flags = _parser().parse_args(arguments)
    adapter = _adapter_path(flags)
    if flags.lora_init not in ("", "none"):
        raise UserError("--lora_init belongs to PiSSA, which this version cannot merge", found=flags.lora_init)
    if flags.quant != "none":
        raise UserError(f"--quant {flags.quant} cannot be used here", expected="none",
                        fix="leave it out: the base model is merged as it is")
    if flags.type != "none" and flags.type not in ADAPTERS:
        raise UserError(f"--type {flags.type} cannot be merged by this version", expected=["none", *ADAPTERS])
    # torch takes a second to import: the checks above must not wait for it
    from rwkvpeft.checkpoints.merge import merge_files

    recipe = _recipe(flags, adapter)
    format = flags.format or ("safetensors" if flags.output.endswith((".safetensors", ".st")) else "pth")
    report = merge_files(flags.base_model, adapter, flags.output, recipe=recipe, format=format, device=flags.device)
    print(f"{flags.output}: {report.total} tensors; {report.method} changed {report.changed}, "
          f"replaced {report.replaced}, added {report.added}")
    if recipe.version == "x070" and recipe.method == "state":
        print("note: the rwkv package does not read time_state from a v7 model; there, set state[3 * layer + 1]")
    return 0


def _adapter_path(flags: argparse.Namespace) -> str:
    given = {
        name: path
        for name in ("checkpoint", "lora_checkpoint", "peft_checkpoint", "state_checkpoint")
        if (path := getattr(flags, name))
    }
    if len(set(given.values())) != 1:
        raise UserError(
            "exactly one adapter is needed",
            found=[f"--{name} {path}" for name, path in given.items()] or "none",
            fix="--checkpoint FILE",
        )
    return str(next(iter(given.values())))


def _recipe(flags: argparse.Namespace, adapter: str) -> Recipe:
    """The recipe beside the adapter, or one made from the flags; where both speak they must agree."""
    from rwkvpeft.checkpoints.adapter import load_adapter
    from rwkvpeft.checkpoints.merge import infer_recipe

    tensors, recipe = load_adapter(adapter)
    if recipe is None:
        recipe = infer_recipe(tensors, adapter, alpha=DEFAULT_ALPHA if flags.lora_alpha is None else flags.lora_alpha)
        if recipe.method == "lora" and flags.lora_alpha is None:
            print(f"note: {adapter} has no recipe beside it and --lora_alpha is not given: "
                  f"taking {DEFAULT_ALPHA}, the default of training", file=sys.stderr)
    implied = "state" if flags.state_checkpoint else flags.type
    if implied not in ("none", recipe.method):
        raise UserError(f"{adapter} holds another kind of adapter", found=recipe.method, expected=implied,
                        fix=f"--type {recipe.method}")
    alpha = recipe.config.get("lora_alpha")
    if recipe.method == "lora" and flags.lora_alpha is not None and alpha != flags.lora_alpha:
        if alpha is not None:
            raise UserError("--lora_alpha disagrees with the recipe beside the adapter", found=flags.lora_alpha,
                            expected=alpha, fix="leave --lora_alpha out")
        recipe = replace(recipe, config={**recipe.config, "lora_alpha": flags.lora_alpha})
    return recipe
