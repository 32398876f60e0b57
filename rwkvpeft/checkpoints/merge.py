"""Fold an adapter into its base checkpoint, tensor by tensor, so that neither model is ever in memory as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvpeft.adapters.base import Adapter, few
from rwkvpeft.adapters.state import check_states
from rwkvpeft.atomic import write_whole
from rwkvpeft.checkpoints.adapter import Recipe, check_base, load_adapter
from rwkvpeft.checkpoints.files import load_tensors
from rwkvpeft.checkpoints.stream import FORMATS, Spec, write_tensors
from rwkvpeft.errors import UserError
from rwkvpeft.models.shape import normalise_names
from rwkvpeft.registry import ADAPTERS, find

# a memory map counts as the process's memory once read; it is opened anew after this much
_REOPEN_BYTES = 128 << 20
_PROBE = 16


class MergeReport(NamedTuple):
    """How many tensors of the output changed, were replaced by a trained part, were added, and are there at all."""

    method: str
    changed: int
    replaced: int
    added: int
    total: int


def merge_files(
    base: Path | str,
    adapter: Path | str,
    output: Path | str,
    *,
    recipe: Recipe | None = None,
    format: str = "pth",
    device: str = "cpu",
) -> MergeReport:
    """Write the base with the adapter folded in, in the base's dtype.

    Sums are made in fp32 and rounded once. Memory is bounded by the largest tensor and the adapter. The output is
    read back before it gets its name; on any error nothing is left behind.

    Args:
        recipe: how the adapter was made; None takes the one beside the adapter, or infers it from tensor names.
        format: pth or safetensors.
        device: where the sums are made.
    Raises: UserError if the base is another one than the adapter was trained on, its shapes do not fit, the adapter
        has tensors the base has no place for, the output is one of the inputs, or it cannot be written.
    """
    base, adapter, output = Path(base), Path(adapter), Path(output)
    _check_paths(base, adapter, output, format)
    tensors, beside = load_adapter(adapter)
    recipe = recipe or beside or infer_recipe(tensors, str(adapter))
    check_base(recipe, base)
    method = _method(recipe, adapter)
    reader = _Reader(base)
    plan = _plan(method, reader.tensors, tensors, base)
    _check_space(output, sum(spec.bytes for spec in plan.specs.values()))
    probes: dict[str, bytes] = {}

    def produce(name: str) -> Tensor:
        merged = _merged(method, name, reader, tensors, plan, device)
        probes[name] = _probe(merged)
        return merged

    def write(partial: Path) -> None:
        write_tensors(partial, plan.specs, produce, format=format)
        if format == "pth":
            _verify(partial, plan.specs, probes)

    write_whole(output, write)
    return MergeReport(method.name, len(plan.changed), len(plan.replaced), len(plan.added), len(plan.specs))


def infer_recipe(tensors: Mapping[str, Tensor], source: str, *, alpha: float = 32) -> Recipe:
    """Tell the method of an adapter without a recipe from its tensor names.

    Args:
        alpha: LoRA's alpha, which a file of tensors does not tell.
    Raises: UserError if the names are those of no known method.
    """
    if any(name.endswith(".lora_A") for name in tensors):
        return Recipe(method="lora", config={"lora_alpha": alpha})
    if all(name.endswith(".time_state") for name in tensors):
        return Recipe(method="state")
    raise UserError(
        f"{source} has no recipe beside it and no tensor name of a known method",
        found=few(list(tensors)),
        expected="names ending in .lora_A and .lora_B, or in .time_state",
    )


class _Plan(NamedTuple):
    specs: dict[str, Spec]
    changed: set[str]
    replaced: set[str]
    added: set[str]


def _check_paths(base: Path, adapter: Path, output: Path, format: str) -> None:
    for source in (base, adapter):
        if output.resolve() == source.resolve() or (output.exists() and source.exists() and output.samefile(source)):
            raise UserError("--output would overwrite an input", found=output, fix="choose another name for --output")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder", expected="the name of a file")
    if format == "hf":
        raise UserError("--format hf cannot be written", found="no Hugging Face layout exists for all of v5, v6 and v7",
                        expected=FORMATS, fix="--format safetensors")
    if format not in FORMATS:
        raise UserError("--format is unknown", found=format, expected=FORMATS)


def _check_space(output: Path, needed: int) -> None:
    folder = output.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{output} cannot be written: the disk is too full",
            found=f"{free / 1e9:.1f} GB free",
            expected=f"{needed / 1e9:.1f} GB",
        )


def _method(recipe: Recipe, source: Path) -> Adapter:
    if recipe.method == "none":
        raise UserError(f"{source} is a fully trained model and needs no merging", fix="use it as it is")
    method: Adapter = find(ADAPTERS, recipe.method, flag="--type").from_settings(recipe.config)
    return method


def _plan(method: Adapter, base: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> _Plan:
    """Find each adapter tensor's place, and do the whole merge on tensors without data, to fail before writing."""
    if method.name == "state":
        _check_states(base, tensors, path)
    blank = {name: tensor.to("meta") for name, tensor in tensors.items()}
    plan = _Plan({}, set(), set(), set())
    used: set[str] = set()
    for name, tensor in base.items():
        plan.specs[name] = Spec(tuple(tensor.shape), tensor.dtype)
        if name in tensors:
            if tensors[name].shape != tensor.shape:
                raise UserError(f"the adapter does not fit {path}", found=f"{name} {tuple(tensors[name].shape)}",
                                expected=str(tuple(tensor.shape)))
            used.add(name)
            plan.replaced.add(name)
        elif method.merge(name, tensor.to("meta"), blank) is not None:
            used.update(source for source in method.sources(name) if source in tensors)
            plan.changed.add(name)
    for name in tensors:
        if name not in base and method.is_addition(name):
            plan.specs[name] = Spec(tuple(tensors[name].shape), tensors[name].dtype)
            used.add(name)
            plan.added.add(name)
    if unused := [name for name in tensors if name not in used]:
        raise UserError(
            f"{len(unused)} of the adapter's {len(tensors)} tensors have no place in {path}",
            found=few(unused),
            fix="is this the base model, and is --type right?",
        )
    return plan


def _check_states(base: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    layers = {name.split(".")[1] for name in base if name.startswith("blocks.")}
    width = base.get("blocks.0.att.receptance.weight")
    if width is None:
        raise UserError(f"{path} is not an RWKV checkpoint", expected="a tensor blocks.0.att.receptance.weight")
    heads = [base[name] for key in ("r_k", "time_faaaa", "time_decay") if (name := f"blocks.0.att.{key}") in base]
    two_axes = [tuple(tensor.shape) for tensor in heads if tensor.dim() == 2]
    check_states(
        tensors, n_layer=len(layers), dim_att=width.shape[0], head_size=two_axes[0][1] if two_axes else None
    )


class _Reader:
    """The base's tensors through a memory map that is given back from time to time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = normalise_names(load_tensors(path))
        self._read_bytes = 0

    def get(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        if self._read_bytes + tensor.nbytes > _REOPEN_BYTES:
            self.tensors = normalise_names(load_tensors(self.path))
            self._read_bytes = 0
            tensor = self.tensors[name]
        self._read_bytes += tensor.nbytes
        return tensor


def _merged(
    method: Adapter, name: str, reader: _Reader, tensors: Mapping[str, Tensor], plan: _Plan, device: str
) -> Tensor:
    if name in plan.replaced or name in plan.added:
        return tensors[name].to(plan.specs[name].dtype)
    tensor = reader.get(name)
    if name not in plan.changed:
        return tensor
    sources = {source: tensors[source].to(device) for source in method.sources(name) if source in tensors}
    merged = method.merge(name, tensor.to(device), sources)
    return tensor if merged is None else merged.cpu()


def _probe(tensor: Tensor) -> bytes:
    """The first and last few elements. Bytes: small tensors would pin the heap between the large ones."""
    flat = tensor.reshape(-1)
    return b"".join(bytes(end.contiguous().view(torch.uint8).tolist()) for end in (flat[:_PROBE], flat[-_PROBE:]))


def _verify(path: Path, specs: Mapping[str, Spec], probes: Mapping[str, bytes]) -> None:
    """Read the written file back and compare names, shapes, dtypes and both ends of every tensor."""
    written = load_tensors(path)
    found = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in written.items()}
    wrong = [name for name in specs if found.get(name) != specs[name]]
    wrong = wrong or [name for name, probe in probes.items() if _probe(written[name]) != probe]
    if wrong or len(found) != len(specs):
        raise UserError(
            "the merged file reads back differently from what was written",
            found=few(wrong) or f"{len(found)} tensors instead of {len(specs)}",
            fix="check the disk and its free space, then merge again",
        )

