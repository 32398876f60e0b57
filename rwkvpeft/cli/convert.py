"""Bring an adapter into Hugging Face peft's folder format, or such a folder into an adapter file. Nothing is lost."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rwkvpeft.cli.guard import guarded
from rwkvpeft.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return guarded(lambda: _run(arguments), debug="--debug" in arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rwkvpeft.convert", description=__doc__, allow_abbrev=False,
        epilog="LoRA, rsLoRA, DoRA, MiSS and all methods of Hugging Face peft can be converted. Trained norms, "
        "embedding and head become modules_to_save; for trained time parameters see --set_aside.",
    )
    parser.add_argument("input", metavar="IN", help="an adapter file with its recipe beside it, or a folder with "
                        "adapter_config.json and adapter_model.safetensors")
    parser.add_argument("output", metavar="OUT", help="the folder, or the adapter file (.pth), to be written")
    parser.add_argument("--lora_alpha", type=float, help="LoRA's alpha, for adapter files without a recipe")
    parser.add_argument("--set_aside", action="store_true", help="write trained time parameters into a file beside the "
                        "adapter that only this toolkit applies; Hugging Face's format has no place for them")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a user error")
    return parser


def _run(arguments: list[str]) -> int:
    flags = _parser().parse_args(arguments)
    source, target = Path(flags.input), Path(flags.output)
    if source.is_dir():
        return _to_file(source, target, flags.lora_alpha)
    return _to_folder(source, target, flags.lora_alpha, flags.set_aside)


def _to_folder(source: Path, target: Path, alpha: float | None, set_aside: bool) -> int:
    if target.suffix in (".pth", ".safetensors"):
        raise UserError(f"{target} names a file", expected="the name of a folder")
    # torch takes a second to import: the check above must not wait for it
    from rwkvpeft.adapters.build import build_adapter
    from rwkvpeft.checkpoints.adapter import infer_recipe, load_adapter
    from rwkvpeft.checkpoints.huggingface import write_folder
    from rwkvpeft.checkpoints.huggingface_names import has_no_place

    tensors, recipe = load_adapter(source)
    if recipe is not None and alpha is not None:
        raise UserError("--lora_alpha is for adapters without a recipe", found=f"a recipe beside {source}",
                        fix="leave --lora_alpha out")
    if recipe is None:
        recipe = infer_recipe(tensors, str(source), alpha=alpha)
        if "lora_alpha" in recipe.config and alpha is None:
            raise UserError(f"{source} has no recipe beside it", expected="LoRA's alpha, which tensors do not tell",
                            fix="--lora_alpha 32")
    adapter = build_adapter(recipe.method, recipe.config)
    foreign = write_folder(target, adapter.rename(tensors) if adapter else tensors, recipe, set_aside=set_aside)
    print(f"{target}: {foreign.config['peft_type']}, {len(foreign.tensors)} tensors for Hugging Face peft")
    if foreign.config["modules_to_save"]:
        print(f"trained beside the adapter, as modules_to_save: {len(foreign.config['modules_to_save'])} modules")
    if aside := sum(has_no_place(name) for name in foreign.extras):
        print(f"note: {aside} tensors stand aside: with peft the adapter computes something else without them")
    return 0


def _to_file(source: Path, target: Path, alpha: float | None) -> int:
    if target.suffix != ".pth":
        raise UserError(f"{target} is not the name of an adapter file", expected="a name ending in .pth",
                        fix=f"{target.with_suffix('.pth')}")
    if alpha is not None:
        raise UserError("--lora_alpha is for adapter files without a recipe", fix="leave --lora_alpha out")
    if target.exists():
        raise UserError(f"{target} is there already", fix="choose another name")
    from rwkvpeft.checkpoints.adapter import recipe_path, save_adapter
    from rwkvpeft.checkpoints.huggingface import read_folder

    tensors, recipe = read_folder(source)
    save_adapter(target, tensors, recipe)
    print(f"{target}: {recipe.method}, {len(tensors)} tensors; its recipe is {recipe_path(target)}")
    return 0
