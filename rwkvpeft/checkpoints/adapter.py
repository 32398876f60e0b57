"""An adapter on disk: a file of tensors that every RWKV tool reads, and beside it the recipe that made them.

The recipe ("sidecar") is a small json with the name of the adapter's file. It holds what merging, generation and
further training would otherwise ask the user for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkvpeft import __version__
from rwkvpeft.adapters.build import recognise
from rwkvpeft.atomic import write_whole
from rwkvpeft.checkpoints.files import load_tensors, save_tensors
from rwkvpeft.checkpoints.quantised import model_fingerprint
from rwkvpeft.errors import UserError
from rwkvpeft.reading import LARGEST_RECORD_BYTES, read_text

FORMAT = 1
_LARGEST_NUMBER = 1 << 63


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint was made.

    ``method`` is ``--peft``; ``config`` that method's full settings; ``shape`` the model's sizes by name;
    ``base_fingerprint`` is ``quantised.model_fingerprint`` of the base; ``quant`` how its large linears were stored in
    training (``quant_double``: the scales too; ``quant_head``: the head too); ``step`` counts optimizer steps;
    ``val_loss`` is the held-out loss of a checkpoint that was kept for it.
    """

    method: str
    config: dict[str, Any] = field(default_factory=dict)
    train_parts: list[str] = field(default_factory=list)
    base_model: str = ""
    base_fingerprint: str = ""
    version: str = ""
    shape: dict[str, Any] = field(default_factory=dict)
    quant: str = "none"
    quant_double: bool = False
    quant_head: bool = False
    tokenizer: str = ""
    ctx_len: int | None = None
    head_size_divisor: float = 8
    step: int = 0
    epoch: int = 0
    loss: float | None = None
    val_loss: float | None = None
    toolkit_version: str = __version__
    format: int = FORMAT

    def to_json(self) -> str:
        """The recipe as indented json, ending in a newline."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> Recipe:
        """Read a recipe; keys of later toolkit versions are ignored.

        Args:
            source: the file's name, for messages.
        Raises: UserError if it is not a recipe, or of a format this version cannot read.
        """
        try:
            values = json.loads(text)
            # half of a surrogate pair, which no file can hold
            json.dumps(values, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as reason:
            raise UserError(f"{source} is not valid json", found=reason, fix="delete it and give the flags instead") \
                from reason
        if not isinstance(values, dict) or "method" not in values:
            raise UserError(f"{source} does not describe an adapter", expected="a json object with the key method")
        known = {item.name: str(item.type) for item in fields(cls)}
        for name, value in values.items():
            if name in known and not _is_of(value, known[name]):
                raise UserError(f"{source}: {name} cannot be used", found=f"{value!r:.80}", expected=known[name],
                                fix="copy it again, or delete it and give the flags instead")
        if values.get("format", FORMAT) > FORMAT:
            raise UserError(f"{source} was written by a newer version of this toolkit", found=values["format"],
                            expected=f"format {FORMAT}", fix="pip install --upgrade rwkvpeft")
        return cls(**{key: value for key, value in values.items() if key in known})


def _is_of(value: object, kind: str) -> bool:
    """Whether a value read from json is of a field's type."""
    if kind.endswith(" | None"):
        return value is None or _is_of(value, kind.removesuffix(" | None"))
    if kind == "list[str]":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool):
        return kind == "bool"
    if kind == "float":
        # a loss may be infinite, and a whole number too large for a float
        return isinstance(value, float) or (isinstance(value, int) and abs(value) < _LARGEST_NUMBER)
    if kind == "int":
        return isinstance(value, int) and abs(value) < _LARGEST_NUMBER
    return isinstance(value, dict if kind.startswith("dict") else str)


def infer_recipe(tensors: Mapping[str, Tensor], source: str, *, alpha: float | None = None) -> Recipe:
    """Tell the method of an adapter without a recipe from its tensors.

    Args:
        alpha: LoRA's alpha, which a file of tensors does not tell; None means the default.
    Raises: UserError if the names are those of no known method.
    """
    method, config = recognise(tensors, source)
    if alpha is not None and "lora_alpha" in config:
        config["lora_alpha"] = alpha
    return Recipe(method=method, config=config)


def check_base(recipe: Recipe, base_model: Path | str) -> None:
    """Compare a base checkpoint with the one the adapter was trained on.

    Raises: UserError if it is another file. A recipe without a fingerprint is not compared.
    """
    base_model = Path(base_model)
    if not recipe.base_fingerprint or not base_model.is_file():
        return
    found = model_fingerprint(base_model)
    if found != recipe.base_fingerprint:
        raise UserError(
            f"{base_model} is not the model this adapter was trained on",
            found=f"fingerprint {found}",
            expected=f"{recipe.base_model or 'the base'}, fingerprint {recipe.base_fingerprint}",
            fix=f"give the original {recipe.base_model}" if recipe.base_model else None,
        )


def recipe_path(path: Path | str) -> Path:
    """Where the recipe of the tensor file ``path`` stands: ``rwkv-0.json`` for rwkv-0.pth and rwkv-0-adapter.pth."""
    path = Path(path)
    return path.with_name(path.stem.removesuffix("-adapter") + ".json")


def save_adapter(path: Path | str, tensors: Mapping[str, Tensor], recipe: Recipe) -> None:
    """Write the trained tensors to ``path`` and the recipe beside it, each whole or not at all.

    Raises: UserError if there is nothing to save, a tensor holds NaN or infinity, or a file cannot be written.
    """
    path = Path(path)
    if not tensors:
        raise UserError(f"there is no trained tensor to save in {path}")
    check_finite(tensors, "the training diverged and is not saved")
    # the recipe first: tensors must not stand there without it
    save_recipe(path, recipe)
    save_tensors(path, tensors)


def save_recipe(path: Path | str, recipe: Recipe) -> None:
    """Write the recipe of the tensor file ``path``.

    Raises: UserError if it cannot be written.
    """
    write_whole(recipe_path(path), lambda partial: partial.write_text(recipe.to_json(), encoding="utf-8"))


def load_adapter(path: Path | str) -> tuple[dict[str, Tensor], Recipe | None]:
    """Read an adapter's tensors and, if there is one, its recipe; a folder of Hugging Face peft has one.

    Names lose a leading ``model.`` or ``_forward_module.``, which some trainers leave there.
    Raises: UserError if the file is missing, broken or empty, holds NaN or infinity, or if its recipe is broken.
    """
    path = Path(path)
    if (path / "adapter_config.json").is_file():
        # imported here, as it needs what stands in this file
        from rwkvpeft.checkpoints.huggingface import read_folder

        return read_folder(path)
    tensors = {_plain_name(name): tensor for name, tensor in load_tensors(path).items()}
    if not tensors:
        raise UserError(f"{path} holds no tensor")
    check_finite(tensors, f"{path} cannot be used")
    return tensors, load_recipe(path)


def load_recipe(path: Path | str) -> Recipe | None:
    """The recipe of the tensor file ``path``; None if it has none.

    Raises: UserError if it is broken.
    """
    place = recipe_path(path)
    if not os.path.exists(place):
        return None
    return Recipe.from_json(read_text(place, LARGEST_RECORD_BYTES), str(place))


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Look for NaN and infinity.

    Raises: UserError starting with ``what``, with the number of broken tensors and the first one's name.
    """
    broken = [name for name, tensor in tensors.items() if not _as_computed(tensor).isfinite().all()]
    if broken:
        raise UserError(
            f"{what}: tensors hold NaN or infinity",
            found=f"{len(broken)} of {len(tensors)} tensors, the first is {broken[0]}",
            fix="lower --lr_init, or train with --precision bf16 or fp32",
        )


def _as_computed(tensor: Tensor) -> Tensor:
    # PyTorch looks for infinity in no float of 8 bits
    return tensor.half() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def _plain_name(name: str) -> str:
    for prefix in ("_forward_module.", "module.", "model.", "base_model.model."):
        name = name.removeprefix(prefix)
    return name
