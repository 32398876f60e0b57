"""A base model with an adapter or a tuned state on it, unmerged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkvpeft.adapters.base import Adapter, check_tensors, few
from rwkvpeft.checkpoints.adapter import Recipe, check_base, load_adapter, load_recipe
from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.checkpoints.merge import infer_recipe
from rwkvpeft.data.tokenizer import Tokenizer, load_tokenizer
from rwkvpeft.errors import UserError
from rwkvpeft.models.backbone import Rwkv
from rwkvpeft.registry import ADAPTERS, find

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_TOKENIZERS = {256: "bytes"}


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
) -> TunedModel:
    """Load a base model and put an adapter or a tuned state on it.

    Args:
        adapter: a file of LoRA or state tensors; its recipe beside it supplies what is not given here.
        device: auto takes an accelerator if there is one.
        precision: fp32, bf16 or fp16; None means fp32 on a CPU, elsewhere the file's own.
        tokenizer: None means the recipe's, else bytes for 256 ids and world for all others.
        head_size_divisor: None means the recipe's, else 8.
    Raises: UserError if a file is broken or they do not belong together.
    """
    tensors: dict[str, Tensor] = {}
    recipe = load_recipe(base) if Path(base).is_file() else None
    if adapter is not None:
        tensors, beside = load_adapter(adapter)
        recipe = beside or infer_recipe(tensors, str(adapter))
        check_base(recipe, base)
    place = pick_device(device)
    dtype = PRECISIONS[precision] if precision else torch.float32 if place.type == "cpu" else None
    divisor = head_size_divisor or (recipe.head_size_divisor if recipe else 8)
    model = load_model(base, device=place, dtype=dtype, op=op, head_size_divisor=divisor)
    if adapter is not None and recipe is not None:
        apply_adapter(model, tensors, recipe)
    name = tokenizer or (recipe.tokenizer if recipe else "") or _TOKENIZERS.get(model.shape.vocab_size, "world")
    return TunedModel(model.eval().requires_grad_(False), load_tokenizer(name), recipe)


def apply_adapter(model: Rwkv, tensors: Mapping[str, Tensor], recipe: Recipe) -> Adapter:
    """Attach the adapter of a file: its own tensors beside the base, trained parts in place of the base's.

    What a file's tensors tell (targets, rank) is read from them.
    Raises: UserError if a tensor has no place in the model or another shape.
    """
    method: Adapter = find(ADAPTERS, recipe.method, flag="method").from_settings(_settings(tensors, recipe))
    parameters = dict(model.named_parameters())
    parts = {name: tensor for name, tensor in tensors.items() if name in parameters and not method.is_addition(name)}
    check_tensors({name: parameters[name] for name in parts}, parts)
    method.attach(model)
    method.load(model, {name: tensor for name, tensor in tensors.items() if name not in parts})
    with torch.no_grad():
        for name, tensor in parts.items():
            parameters[name].copy_(tensor)
    return method


def _settings(tensors: Mapping[str, Tensor], recipe: Recipe) -> dict[str, Any]:
    if recipe.method != "lora":
        return recipe.config
    thin = {name.removesuffix(".lora_A"): tensor for name, tensor in tensors.items() if name.endswith(".lora_A")}
    ranks = {tensor.shape[0] for tensor in thin.values()}
    if len(ranks) != 1:
        raise UserError("the adapter's matrices differ in rank", found=few(sorted(map(str, ranks))),
                        expected="one rank", fix="merge it instead: python merge.py")
    return {**recipe.config, "r": ranks.pop(), "target_modules": list(thin)}


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
