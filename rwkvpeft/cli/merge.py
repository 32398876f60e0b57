"""Fold adapters or a tuned state into their base model and write a plain checkpoint."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rwkvpeft.cli.guard import guarded
from rwkvpeft.config.findings import Findings
from rwkvpeft.config.methods import check_method
from rwkvpeft.errors import UserError
from rwkvpeft.registry import ADAPTERS, FORMATS

if TYPE_CHECKING:
    from torch import Tensor

    from rwkvpeft.checkpoints.adapter import Recipe
    from rwkvpeft.checkpoints.fold import MergeInput

DEFAULT_ALPHA = 32
_FORMAT_OF_ENDING = {".pth": "pth", ".safetensors": "safetensors", ".st": "safetensors"}
_CHECKPOINTS = ("checkpoint", "lora_checkpoint", "peft_checkpoint", "state_checkpoint")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return guarded(lambda: _run(arguments), debug="--debug" in arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="merge.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--base_model", required=True, metavar="FILE", help="the model the adapter was trained on")
    parser.add_argument("--checkpoint", nargs="+", metavar="FILE", help="the adapters or the tuned state")
    parser.add_argument("--weights", nargs="+", type=float, metavar="X",
                        help="how much of each adapter to add, in the order of --checkpoint (default: 1 of each)")
    parser.add_argument("--output", required=True, metavar="FILE", help="where to write the merged model")
    parser.add_argument("--quant", choices=["none", *FORMATS],
                        help="format the base goes through and back before the adapter is added, so that the result "
                        "equals what was trained (default: as in training); none: the base is merged as it is")
    parser.add_argument("--format", choices=["pth", "safetensors", "hf"],
                        help="kind of file (default: by the ending of --output, else pth; hf is not available yet)")
    parser.add_argument("--device", default="cpu", help="where sums are made (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user error")
    upstream = parser.add_argument_group("RWKV-PEFT's flags, for adapters without a recipe beside them")
    upstream.add_argument("--type", default="none", metavar="METHOD",
                          help=f"{', '.join(ADAPTERS)}; none: as the recipe or the tensor names say (default)")
    for name in _CHECKPOINTS[1:]:
        upstream.add_argument(f"--{name}", metavar="FILE", help="the same as --checkpoint")
    upstream.add_argument("--lora_alpha", type=float,
                          help=f"LoRA's alpha (default: the recipe's, else {DEFAULT_ALPHA}, the default of training)")
    upstream.add_argument("--lora_init", default="none", metavar="FILE",
                          help="PiSSA's start values (init_pissa.pth), for adapter files that lack them")
    return parser


def _run(arguments: list[str]) -> int:
    flags = _parser().parse_args(arguments)
    initial = None if flags.lora_init in ("", "none") else Path(flags.lora_init)
    type_ = _checked_type(flags.type.lower())
    if type_ == "none" and initial is not None:
        # as upstream, whose --type is pissa unless told otherwise
        type_ = "pissa"
    adapters = _adapters(flags, type_)
    weights = _weights(flags, len(adapters))
    format = _format(flags.format, flags.output)
    if initial is not None and len(adapters) > 1:
        raise UserError("--lora_init belongs to one adapter", found=f"{len(adapters)} adapters",
                        fix="merge the one that lacks its start values alone")
    # torch takes a second to import: the checks above must not wait for it
    from rwkvpeft.checkpoints.fold import MergeInput
    from rwkvpeft.checkpoints.merge import merge_several

    inputs = [
        MergeInput(Path(path), weight, _recipe(path, kind, flags.lora_alpha, initial), initial)
        for (path, kind), weight in zip(adapters.items(), weights, strict=True)
    ]
    if flags.lora_alpha is not None and not any(item.recipe and "lora_alpha" in item.recipe.config for item in inputs):
        raise UserError("--lora_alpha has no effect: none of the adapters is LoRA", found=flags.lora_alpha,
                        fix="leave --lora_alpha out")
    report = merge_several(
        flags.base_model, _with_quant(inputs, flags.quant), flags.output, format=format, device=flags.device
    )
    print(f"{flags.output}: {report.total} tensors; {report.method} changed {report.changed}, "
          f"replaced {report.replaced}, added {report.added}")
    print(_base_line(inputs, report.quant))
    if report.added and any(item.recipe is not None and item.recipe.version == "x070" for item in inputs):
        print("note: the rwkv package does not read time_state from a v7 model; there, set state[3 * layer + 1]")
    return 0


def _adapters(flags: argparse.Namespace, type_: str) -> dict[str, str]:
    """The adapter files in the order given, with the method that the flags name for each; ``none`` if none.

    Several flags may name the same file, which is merged once.
    Raises: UserError if there is none, or one flag names the same file twice.
    """
    paths: dict[str, str] = {}
    spelled: dict[Path, str] = {}
    for name in _CHECKPOINTS:
        given = getattr(flags, name) or []
        files = [given] if isinstance(given, str) else given
        places = [Path(path).resolve() for path in files]
        if twice := [path for path, place in zip(files, places, strict=True) if places.count(place) > 1]:
            raise UserError(f"--{name} names the same file more than once", found=twice,
                            fix="name it once, with --weights 2 to add it twice")
        for path, place in zip(files, places, strict=True):
            paths[spelled.setdefault(place, path)] = "state" if name == "state_checkpoint" else type_
    if not paths:
        raise UserError("no adapter is given", fix="--checkpoint FILE")
    return paths


def _format(format: str | None, output: str) -> str:
    """The kind of file to write: as ``--format`` says, which the output's ending must not contradict."""
    by_ending = _FORMAT_OF_ENDING.get(Path(output).suffix)
    if format in _FORMAT_OF_ENDING.values() and by_ending not in (None, format):
        raise UserError(f"--format {format} contradicts the ending of --output", found=output,
                        fix=f"leave --format out, or --output {Path(output).with_suffix('.' + str(format))}")
    return format or by_ending or "pth"


def _weights(flags: argparse.Namespace, count: int) -> list[float]:
    weights: list[float] = flags.weights or [1.0] * count
    if len(weights) != count:
        raise UserError("--weights needs one number for each adapter", found=len(weights), expected=count)
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError("--weights must be finite numbers", found=weights)
    return weights


def _checked_type(type_: str) -> str:
    findings = Findings()
    check_method(type_, findings, flag="--type")
    findings.raise_any()
    return _one_name(type_)


def _one_name(method: str) -> str:
    """The method under the first of its names: miss for bone and disha."""
    return "+".join(
        next((name for name, place in ADAPTERS.items() if place == ADAPTERS.get(part)), part)
        for part in method.split("+")
    )


def _recipe(path: str, type_: str, alpha: float | None, initial: Path | None) -> Recipe:
    """The recipe beside the adapter, or one made from the flags; where both speak they must agree.

    Args:
        type_: the method the flags name; ``none`` if they name none.
    """
    from rwkvpeft.checkpoints.adapter import load_adapter

    tensors, recipe = load_adapter(path)
    is_told = recipe is not None
    if recipe is None:
        recipe = _guessed_recipe(path, tensors, type_, alpha, initial)
    if type_ not in ("none", _one_name(recipe.method)):
        raise UserError(f"{path} holds another kind of adapter", found=recipe.method, expected=type_,
                        fix=f"--type {recipe.method}")
    if initial is not None and "pissa" not in recipe.method.split("+"):
        raise UserError("--lora_init belongs to PiSSA alone", found=f"{path} of {recipe.method}",
                        fix="leave --lora_init out")
    return recipe if alpha is None else _with_alpha(recipe, alpha, is_told)


def _guessed_recipe(
    path: str, tensors: Mapping[str, Tensor], type_: str, alpha: float | None, initial: Path | None
) -> Recipe:
    from rwkvpeft.checkpoints.adapter import infer_recipe

    recipe = infer_recipe(tensors, path, alpha=DEFAULT_ALPHA if alpha is None else alpha)
    if type_ == "pissa" and recipe.method == "lora":
        # without its start values PiSSA's file looks like LoRA's
        if initial is None:
            raise UserError(f"{path} lacks PiSSA's start values, without which it cannot be merged",
                            fix="--lora_init init_pissa.pth, which training wrote beside it")
        config = {name: recipe.config[name] for name in ("r", "target_modules")}
        return replace(recipe, method="pissa", config=config)
    if "lora_alpha" in recipe.config and alpha is None:
        print(f"note: {path} has no recipe beside it and --lora_alpha is not given: "
              f"taking {DEFAULT_ALPHA}, the default of training", file=sys.stderr)
    return recipe


def _with_alpha(recipe: Recipe, alpha: float, is_told: bool) -> Recipe:
    found = recipe.config.get("lora_alpha")
    if found is None and recipe.method not in ("lora", "dora"):
        return recipe
    if is_told and found not in (None, alpha):
        raise UserError("--lora_alpha disagrees with the recipe beside the adapter", found=alpha, expected=found,
                        fix="leave --lora_alpha out")
    return replace(recipe, config={**recipe.config, "lora_alpha": alpha})


def _with_quant(inputs: Sequence[MergeInput], quant: str | None) -> list[MergeInput]:
    """The adapters, with the format the flag names as what their base was quantised to.

    Double scales and a quantised head stay where training had them in that same format.
    """
    if quant is None:
        return list(inputs)
    changed = []
    for item in inputs:
        assert item.recipe is not None
        same = FORMATS.get(item.recipe.quant) == FORMATS.get(quant)
        recipe = item.recipe if same else replace(item.recipe, quant=quant, quant_double=False, quant_head=False)
        changed.append(item._replace(recipe=recipe))
    return changed


def _base_line(inputs: Sequence[MergeInput], used: str) -> str:
    """What merging did to the base before the adapters joined it, and whether training did the same."""
    trained = {item.recipe.quant for item in inputs if item.recipe is not None}
    told = ", ".join(sorted(trained))
    if used == "none":
        return "base: as it is" if trained == {"none"} else (
            f"base: as it is, although it was {told} in training: the result differs by what quantising lost")
    if trained == {used}:
        return f"base: quantised to {used} and back, as in training: the result equals what was trained"
    return f"base: quantised to {used} and back, as --quant says (the recipe: {told})"
