"""What merging does to one tensor: the base's own, what quantisation makes of it, and each adapter's part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvpeft.adapters.base import Adapter
from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.adapters.state import check_states
from rwkvpeft.adapters.targets import few
from rwkvpeft.checkpoints.adapter import Recipe, infer_recipe, load_adapter
from rwkvpeft.checkpoints.files import load_tensors, outline_of
from rwkvpeft.checkpoints.quantised import Quantiser
from rwkvpeft.checkpoints.stream import Spec
from rwkvpeft.errors import UserError
from rwkvpeft.quantization.format import build_format


class MergeInput(NamedTuple):
    """An adapter to merge, its weight, and what its file does not tell.

    ``recipe`` None takes the one beside the file or infers it; ``initial`` is a file of PiSSA's start values.
    """

    path: Path
    weight: float = 1.0
    recipe: Recipe | None = None
    initial: Path | None = None


class Fold(NamedTuple):
    """An adapter ready to be folded in: its method and its trained tensors by our names."""

    path: Path
    weight: float
    recipe: Recipe
    method: Adapter
    tensors: dict[str, Tensor]


class Plan(NamedTuple):
    """The output's tensors, and the names of those that change, are replaced, or come from an adapter alone."""

    specs: dict[str, Spec]
    changed: set[str]
    replaced: set[str]
    added: set[str]


def open_fold(item: MergeInput) -> Fold:
    """Read an adapter.

    Raises: UserError if it is broken, a fully trained model, or PiSSA's start values alone.
    """
    tensors, beside = load_adapter(item.path)
    recipe = item.recipe or beside or infer_recipe(tensors, str(item.path))
    method = build_adapter(recipe.method, recipe.config)
    if method is None:
        raise UserError(f"{item.path} is a fully trained model and needs no merging", fix="use it as it is")
    if item.initial is not None:
        tensors = {**load_tensors(item.initial), **tensors}
    tensors = method.take_constants(method.rename(tensors))
    if not tensors:
        raise UserError(f"{item.path} holds only PiSSA's start values, no adapter",
                        fix="give the adapter that training wrote beside it, such as rwkv-0.pth")
    return Fold(item.path, item.weight, recipe, method, tensors)


def common_quantiser(folds: Sequence[Fold], quant: str | None, device: str) -> Quantiser | None:
    """What the base goes through before the adapters join it; None if nothing.

    Tensors that an adapter replaces are left as they are. An adapter without a recipe says nothing about its base.
    Raises: UserError if the adapters were trained on differently quantised bases and ``quant`` does not decide.
    """
    recipes = [fold.recipe for fold in folds]
    recipes = [recipe for recipe in recipes if recipe.base_fingerprint] or recipes
    kinds = {(_format_name(recipe.quant), recipe.quant_double, recipe.quant_head) for recipe in recipes}
    if quant is not None:
        kinds = {(quant, double, head) for _, double, head in kinds}
    if len(kinds) != 1:
        raise UserError("the adapters were trained on differently quantised bases",
                        found=sorted({kind for kind, _, _ in kinds}), fix="--quant none, or merge them one by one")
    kind, double, head = kinds.pop()
    if kind == "none":
        return None
    trained = {name for fold in folds for name in fold.tensors}
    return Quantiser(kind, double=double, head=head, device=device, keep=trained.__contains__)


def _format_name(quant: str) -> str:
    return quant if quant == "none" else build_format(quant).name


def make_plan(
    folds: Sequence[Fold], base: Mapping[str, Tensor], path: Path, quantiser: Quantiser | None
) -> Plan:
    """Find each adapter tensor's place, to fail before writing.

    Raises: UserError if shapes disagree or a tensor has no place.
    """
    plan = Plan({}, set(), set(), set())
    used: set[str] = set()
    for name, tensor in outline_of(base).items():
        plan.specs[name] = Spec(tuple(tensor.shape), tensor.dtype)
        if quantiser is not None and quantiser.takes(name):
            plan.changed.add(name)
        for fold in folds:
            _place(name, tensor, fold, plan, used, path)
    for fold in folds:
        _check_states(base, fold, path)
        for name, tensor in fold.tensors.items():
            if name not in base and fold.method.is_addition(name):
                plan.specs[name] = Spec(tuple(tensor.shape), tensor.dtype)
                used.add(name)
                plan.added.add(name)
        if unused := [name for name in fold.tensors if name not in used]:
            raise UserError(
                f"{len(unused)} of the adapter's {len(fold.tensors)} tensors have no place in {path}",
                found=few(unused),
                fix="is this the base model, and is --type right?",
            )
    plan.changed.difference_update(plan.replaced)
    return plan


def _place(name: str, tensor: Tensor, fold: Fold, plan: Plan, used: set[str], path: Path) -> None:
    if name in fold.tensors:
        if fold.tensors[name].shape != tensor.shape:
            raise UserError(f"the adapter does not fit {path}", found=f"{name} {tuple(fold.tensors[name].shape)}",
                            expected=str(tuple(tensor.shape)))
        used.add(name)
        plan.replaced.add(name)
    elif fold.method.changes(name, tuple(tensor.shape), fold.tensors):
        used.update(source for source in fold.method.sources(name) if source in fold.tensors)
        plan.changed.add(name)


def _check_states(base: Mapping[str, Tensor], fold: Fold, path: Path) -> None:
    if not any(name.endswith(".time_state") for name in fold.tensors):
        return
    layers = {name.split(".")[1] for name in base if name.startswith("blocks.")}
    first = next((layer for layer in (0, 1) if f"blocks.{layer}.att.receptance.weight" in base), None)
    if first is None:
        raise UserError(f"{path} is not an RWKV checkpoint", expected="a tensor blocks.0.att.receptance.weight")
    width = base[f"blocks.{first}.att.receptance.weight"]
    heads = [base[name] for key in ("r_k", "time_faaaa", "time_decay")
             if (name := f"blocks.{first}.att.{key}") in base]
    two_axes = [tuple(tensor.shape) for tensor in heads if tensor.dim() == 2]
    check_states(
        fold.tensors,
        n_layer=len(layers),
        dim_att=width.shape[0],
        head_size=two_axes[0][1] if two_axes else None,
        every_layer=fold.recipe.method != "profile",
        pre_ffn=first,
    )


@torch.no_grad()
def fold_tensor(
    name: str, base: Mapping[str, Tensor], folds: Sequence[Fold], plan: Plan, quantiser: Quantiser | None, device: str
) -> Tensor:
    """One tensor of the output, in the dtype the plan says."""
    dtype = plan.specs[name].dtype
    if name in plan.added:
        return _sum(fold.weight * fold.tensors[name].float() for fold in folds if name in fold.tensors).to(dtype)
    tensor = base[name]
    if name not in plan.changed and name not in plan.replaced:
        return tensor
    if len(folds) == 1 and folds[0].weight == 1:
        return _with(folds[0], name, tensor, quantiser, device).to(dtype).cpu()
    start = _quantised(name, tensor.to(device).float(), quantiser)
    changes = (fold.weight * (_with(fold, name, tensor, quantiser, device) - start) for fold in folds)
    return (start + _sum(changes)).to(dtype).cpu()


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    total: Tensor | None = None
    for tensor in tensors:
        total = tensor.clone() if total is None else total.add_(tensor)
    assert total is not None
    return total


def _with(fold: Fold, name: str, tensor: Tensor, quantiser: Quantiser | None, device: str) -> Tensor:
    """The base's tensor with one adapter alone, fp32; the base's own storage is never changed."""
    if name in fold.tensors:
        return fold.tensors[name].to(device).float()
    weight = tensor.to(device=device, dtype=torch.float32, copy=True)
    if name.endswith(".weight"):
        weight = fold.method.prepare(name.removesuffix(".weight"), weight)
    weight = _quantised(name, weight, quantiser)
    sources = {source: fold.tensors[source].to(device) for source in fold.method.sources(name)
               if source in fold.tensors}
    merged = fold.method.merge(name, weight, sources) if sources else None
    return weight if merged is None else merged


def _quantised(name: str, weight: Tensor, quantiser: Quantiser | None) -> Tensor:
    return quantiser.round_trip(name, weight) if quantiser is not None and quantiser.takes(name) else weight
