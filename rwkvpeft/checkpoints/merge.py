"""Fold adapters into their base checkpoint, tensor by tensor, so that no model is ever in memory as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvpeft.adapters.targets import few
from rwkvpeft.atomic import write_whole
from rwkvpeft.checkpoints.adapter import Recipe, check_base
from rwkvpeft.checkpoints.files import MappedTensors, load_tensors
from rwkvpeft.checkpoints.fold import MergeInput, common_quantiser, fold_tensor, make_plan, open_fold
from rwkvpeft.checkpoints.quantised import refuse_quantised
from rwkvpeft.checkpoints.stream import FORMATS, Spec, write_tensors
from rwkvpeft.errors import UserError

_PROBE = 16


class MergeReport(NamedTuple):
    """How many tensors of the output changed, were replaced by a trained part, were added, and are there at all.

    ``quant`` is the format the base went through, as in training; ``none`` if it did not.
    """

    method: str
    changed: int
    replaced: int
    added: int
    total: int
    quant: str = "none"


def merge_files(
    base: Path | str,
    adapter: Path | str,
    output: Path | str,
    *,
    recipe: Recipe | None = None,
    quant: str | None = None,
    initial: Path | str | None = None,
    format: str = "pth",
    device: str = "cpu",
) -> MergeReport:
    """Write the base with one adapter folded in; see ``merge_several``.

    Args:
        recipe: how the adapter was made; None takes the one beside the adapter, or infers it from tensor names.
        initial: PiSSA's start values, for adapter files that lack them.
    """
    one = MergeInput(Path(adapter), recipe=recipe, initial=None if initial is None else Path(initial))
    return merge_several(base, [one], output, quant=quant, format=format, device=device)


def merge_several(
    base: Path | str,
    adapters: Sequence[MergeInput],
    output: Path | str,
    *,
    quant: str | None = None,
    format: str = "pth",
    device: str = "cpu",
) -> MergeReport:
    """Write the base with adapters folded in, each by its weight, in the base's dtype.

    The result is ``W + sum of weight * (W with that adapter alone - W)``. Sums are made in fp32 and rounded once.
    Memory is bounded by the largest tensor and the adapters. The output is read back before it gets its name; on any
    error nothing is left behind.

    Args:
        quant: the base goes through this format and back first, so that the result equals what was trained on it;
            None takes what the recipes say, "none" merges into the base as it is.
        format: pth or safetensors.
        device: where the sums are made.
    Raises: UserError if the base is another one than an adapter was trained on, its shapes do not fit, an adapter
        has tensors the base has no place for, the output is one of the inputs, or it cannot be written.
    """
    base, output = Path(base), Path(output)
    _check_paths([base, *(item.path for item in adapters)], output, format)
    folds = [open_fold(item) for item in adapters]
    for fold in folds:
        check_base(fold.recipe, base)
    reader = MappedTensors(base)
    refuse_quantised(reader, base, "merging")
    quantiser = common_quantiser(folds, quant, device)
    plan = make_plan(folds, reader, base, quantiser)
    _check_space(output, sum(spec.bytes for spec in plan.specs.values()))
    probes: dict[str, bytes] = {}

    def produce(name: str) -> Tensor:
        merged = fold_tensor(name, reader, folds, plan, quantiser, device)
        probes[name] = _probe(merged)
        return merged

    def write(partial: Path) -> None:
        write_tensors(partial, plan.specs, produce, format=format)
        if format == "pth":
            _verify(partial, plan.specs, probes)

    write_whole(output, write)
    return MergeReport(
        ", ".join(fold.method.name for fold in folds),
        len(plan.changed), len(plan.replaced), len(plan.added), len(plan.specs),
        "none" if quantiser is None else quantiser.quant,
    )


def _check_paths(inputs: Sequence[Path], output: Path, format: str) -> None:
    for source in inputs:
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

