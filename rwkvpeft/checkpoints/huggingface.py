"""Adapters in the folder format of Hugging Face peft: ``adapter_config.json`` and ``adapter_model.safetensors``.

LoRA (rsLoRA, DoRA) and MiSS are the same methods there under longer names; every tuner of ``adapters.huggingface`` is
theirs anyway. Norms, embedding and head trained beside an adapter become ``modules_to_save``. What the format has no
place for stands beside it in ``rwkvpeft.json`` (the recipe) and ``rwkvpeft.safetensors`` (running averages,
directions computed from the base, parts set aside), which other programs pass over: a file comes back as it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkvpeft.adapters.targets import few
from rwkvpeft.atomic import make_durable, writing
from rwkvpeft.checkpoints.adapter import Recipe, check_finite
from rwkvpeft.checkpoints.huggingface_names import Foreign, from_foreign, to_foreign
from rwkvpeft.errors import UserError
from rwkvpeft.reading import LARGEST_RECORD_BYTES, read_text

CONFIG = "adapter_config.json"
_TENSORS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_RECIPE = "rwkvpeft.json"
_EXTRAS = "rwkvpeft.safetensors"
_ABOUT_THE_FILE = ("peft_version", "base_model_name_or_path", "task_type", "revision", "auto_mapping", "inference_mode")


def write_folder(
    folder: Path | str, tensors: Mapping[str, Tensor], recipe: Recipe, *, set_aside: bool = False
) -> Foreign:
    """Write an adapter so that peft reads it; the folder appears whole or not at all.

    Args:
        tensors: an adapter file's, by our names.
        set_aside: trained tensors without a place in the format go into a file of ours, which only we apply.
    Returns: what was written.
    Raises: UserError if the method or a trained tensor has no place in that format, the folder has something in it,
        or it cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and is not an empty folder", fix="choose another name")
    check_finite(tensors, "the adapter cannot be used")
    foreign = to_foreign(recipe.method, recipe.config, tensors, set_aside=set_aside)
    config = {**foreign.config, "base_model_name_or_path": recipe.base_model or None, "task_type": None,
              "inference_mode": True}
    partial = folder.absolute().with_name(f".{folder.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    with writing(folder):
        try:
            partial.mkdir(parents=True)
            (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            (partial / _RECIPE).write_text(recipe.to_json(), encoding="utf-8")
            _save(partial / _TENSORS, foreign.tensors)
            if foreign.extras:
                _save(partial / _EXTRAS, foreign.extras)
            for path in (*partial.iterdir(), partial):
                make_durable(path)
            os.replace(partial, folder)
            make_durable(folder.absolute().parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return foreign


def read_folder(folder: Path | str) -> tuple[dict[str, Tensor], Recipe]:
    """Read an adapter that peft or ``write_folder`` wrote: its tensors by our names and its recipe.

    Raises: UserError if a file is missing or broken, or the adapter computes something ours cannot.
    """
    folder = Path(folder)
    config = _read_json(folder / CONFIG)
    tensors = _load(folder)
    check_finite(tensors, f"{folder} cannot be used")
    with _of_their_types(folder / CONFIG):
        method, settings, ours = from_foreign(config, tensors)
    extras = _read_safetensors(folder / _EXTRAS) if (folder / _EXTRAS).is_file() else {}
    beside = _recipe_beside(folder)
    # a program that changed the adapter leaves the recipe behind: then it is no longer true
    if beside is not None and beside.method == method:
        with _of_their_types(folder / _RECIPE):
            expected = to_foreign(method, beside.config, ours).config
        if _computing(expected) == _computing(config):
            return {**ours, **extras}, beside
    if extras:
        raise UserError(f"{_EXTRAS} belongs to an adapter that has been changed since", found=folder / _EXTRAS,
                        fix=f"delete {_EXTRAS} and {_RECIPE} to take what peft reads, without it")
    return ours, Recipe(method=method, config=settings, base_model=_base_name(config))


@contextlib.contextmanager
def _of_their_types(path: Path) -> Iterator[None]:
    """Turn what a value of another type, or none, leads to in this block into a UserError that names ``path``."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as reason:
        raise UserError(f"{path} cannot be used: a value in it is missing or of another type", found=repr(reason)[:200],
                        fix="copy it again") from reason


def _computing(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what says nothing about the computation; lists of names in one order."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(config)))
    return {
        key: sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value
        for key, value in plain.items() if key not in _ABOUT_THE_FILE
    }


def _base_name(config: Mapping[str, Any]) -> str:
    return Path(str(config.get("base_model_name_or_path") or "")).name


def _recipe_beside(folder: Path) -> Recipe | None:
    path = folder / _RECIPE
    return Recipe.from_json(read_text(path, LARGEST_RECORD_BYTES), str(path)) if path.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} does not exist", expected="a folder as Hugging Face peft writes it")
    try:
        values = json.loads(read_text(path, LARGEST_RECORD_BYTES))
    except (ValueError, RecursionError) as reason:
        raise UserError(f"{path} is not valid json", found=reason) from reason
    if not isinstance(values, dict):
        raise UserError(f"{path} does not describe an adapter", expected="a json object")
    return values


def _load(folder: Path) -> dict[str, Tensor]:
    if not (folder / _TENSORS).is_file():
        pickled = (folder / _PICKLED).is_file()
        raise UserError(
            f"{folder} has no {_TENSORS}",
            found=f"{_PICKLED}, which may run code when it is opened" if pickled else None,
            fix="load and save it once with peft, which writes safetensors" if pickled else None,
        )
    return _read_safetensors(folder / _TENSORS)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    library = _safetensors()
    try:
        loaded: dict[str, Tensor] = library.load_file(str(path))
    except (OSError, ValueError, RuntimeError, _error_class()) as reason:
        raise UserError(
            f"{path} cannot be read",
            found=str(reason).splitlines()[0],
            expected="a whole safetensors file",
            fix="download or copy it again and compare its size",
        ) from reason
    return loaded


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # the format refuses tensors that share memory
    plain = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
             for name, tensor in tensors.items()}
    _safetensors().save_file(plain, str(path), metadata={"format": "pt"})


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as reason:
        raise UserError("this format needs safetensors", found=few([str(reason)]), fix="pip install 'rwkvpeft[peft]'") \
            from reason
    return safetensors.torch


def _error_class() -> type[Exception]:
    from safetensors import SafetensorError

    error: type[Exception] = SafetensorError
    return error
