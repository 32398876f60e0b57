"""A base model with an adapter or a tuned state on it, unmerged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvpeft.adapters.base import Adapter, check_tensors
from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.adapter import Recipe, check_base, infer_recipe, load_adapter, load_recipe
from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.checkpoints.quantised import Quantiser
from rwkvpeft.data.tokenizer import WORLD_VOCABULARY_SIZE, Tokenizer, load_tokenizer
from rwkvpeft.errors import UserError
from rwkvpeft.models.backbone import Rwkv

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_VOCABULARY = "vocab.json"
_TOKENIZERS = {256: "bytes", WORLD_VOCABULARY_SIZE: "world"}


class TunedModel(NamedTuple):
    """A model ready to run, its tokenizer, and the adapter's recipe if it has one."""

    model: Rwkv
    tokenizer: Tokenizer
    recipe: Recipe | None


def load_tuned(
    base: Path | str,
    adapter: Path | str | None = None,
    *,
    device: str = "auto",
    precision: str | None = None,
    op: str = "auto",
    tokenizer: str | None = None,
    head_size_divisor: float | None = None,
    quant: str | None = None,
) -> TunedModel:
    """Load a base model and put an adapter or a tuned state on it.

    Args:
        adapter: a file of an adapter or of tuned states; its recipe beside it supplies what is not given here.
        device: auto takes an accelerator if there is one.
        precision: fp32, bf16 or fp16; None means fp32 on a CPU, elsewhere the file's own.
        tokenizer: None means the recipe's, else bytes for 256 ids, world for 65536 and, for another number, the
            vocab.json beside the model if there is one.
        head_size_divisor: None means the recipe's, else 8.
        quant: how the base's large linears are stored; None means as in the adapter's training, else as in the file.
    Raises: UserError if a file is broken or they do not belong together.
    """
    recipe = load_recipe(base) if Path(base).is_file() else None
    method: Adapter | None = None
    tensors: dict[str, Tensor] = {}
    if adapter is not None:
        tensors, beside = load_adapter(adapter)
        recipe = beside or infer_recipe(tensors, str(adapter))
        check_base(recipe, base)
        method = method_of(recipe, str(adapter))
        tensors = method.take_constants(method.rename(tensors))
    place = pick_device(device)
    dtype = PRECISIONS[precision] if precision else torch.float32 if place.type == "cpu" else None
    model = load_model(
        base,
        device=place,
        dtype=dtype,
        op=op,
        head_size_divisor=head_size_divisor or (recipe.head_size_divisor if recipe else 8),
        quantiser=_quantiser(quant, recipe if method is not None else None, tensors, place),
        prepare=method.prepare if method is not None else None,
    )
    if method is not None:
        apply_adapter(model, tensors, method)
    folders = [Path(file).parent for file in (adapter, base) if file is not None]
    name = tokenizer or _find_tokenizer(recipe, model.shape.vocab_size, folders)
    return TunedModel(model.eval().requires_grad_(False), load_tokenizer(name), recipe)


def _find_tokenizer(recipe: Recipe | None, vocab_size: int, folders: list[Path]) -> str:
    name = recipe.tokenizer if recipe else ""
    is_text = name.lower().endswith(".json") or (not name and vocab_size not in _TOKENIZERS)
    if is_text and not Path(name).is_file():
        # the vocabulary of a text lies beside what was trained on it, and folders are moved
        there = [folder / _VOCABULARY for folder in folders if (folder / _VOCABULARY).is_file()]
        name = str(there[0]) if there else name
    return name or _TOKENIZERS.get(vocab_size, "world")


def method_of(recipe: Recipe, source: str) -> Adapter:
    """The adapter a recipe describes.

    Raises: UserError if it describes a fully trained model.
    """
    method = build_adapter(recipe.method, recipe.config)
    if method is None:
        raise UserError(f"{source} is a fully trained model, not an adapter", fix=f"--model {source}")
    return method


def _quantiser(
    quant: str | None, recipe: Recipe | None, tensors: Mapping[str, Tensor], device: torch.device
) -> Quantiser | None:
    """An adapter runs on a base stored as in its training, unless ``quant`` says otherwise."""
    kind = quant or (recipe.quant if recipe else "none")
    if kind == "none":
        return None
    double, head = (recipe.quant_double, recipe.quant_head) if recipe else (False, False)
    return Quantiser(kind, double=double, head=head, device=device, keep=tensors.__contains__)


def apply_adapter(model: Rwkv, tensors: Mapping[str, Tensor], method: Adapter) -> None:
    """Attach the adapter of a file: its own tensors beside the base, trained parts in place of the base's.

    Raises: UserError if a tensor has no place in the model or another shape.
    """
    parameters = dict(model.named_parameters())
    method.attach(model)
    own = method.trained_tensors(model)
    parts = {name: tensor for name, tensor in tensors.items() if name in parameters and name not in own}
    check_tensors({name: parameters[name] for name in parts}, parts)
    method.load(model, {name: tensor for name, tensor in tensors.items() if name not in parts})
    with torch.no_grad():
        for name, tensor in parts.items():
            parameters[name].copy_(tensor)


def pick_device(name: str) -> torch.device:
    """The device of that name; auto is the accelerator of this machine, or the CPU.

    Raises: UserError if there is no such device.
    """
    if name == "auto":
        # torch.accelerator came with torch 2.6
        if hasattr(torch, "accelerator") and torch.accelerator.is_available():
            return torch.accelerator.current_accelerator() or torch.device("cpu")
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as reason:
        raise UserError(f"--device {name} is not available here", found=str(reason).splitlines()[0],
                        fix="--device cpu") from reason
    return device
