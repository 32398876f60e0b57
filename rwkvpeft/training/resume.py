"""Resume points: all a run needs to go on as if nothing had happened.

``proj_dir/resume/step-00000120/`` holds ``tensors.pth``, the trained parameters and the optimizer's moments, and
``resume.json``, how far the run is and the settings that must not change. Random numbers need no saving: each batch
draws from a stream of its own, and the order of the data is a function of seed and position.
"""

from __future__ import annotations

import json
import os
import pickle
import secrets
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkvpeft.atomic import make_durable, writing
from rwkvpeft.config.groups import OutputConfig
from rwkvpeft.errors import ContractError, UserError
from rwkvpeft.training.module import RunProgress

FORMAT = 1
KEPT = 2

_TENSORS = "tensors.pth"
_RECORD = "resume.json"
_CONSTANT = "constant."
_FIRST_DIFFERENCES = 8


@dataclass(frozen=True)
class ResumePoint:
    """A readable resume point: where it is, how far the run was, and its essential settings."""

    path: Path
    progress: RunProgress
    essentials: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, through a memory map."""
        loaded: dict[str, Tensor] = torch.load(self.path / _TENSORS, map_location="cpu", weights_only=True, mmap=True)
        return loaded

    def constants(self) -> dict[str, Tensor]:
        """What the adapter needs but does not train, by the names of ``Adapter.constants``."""
        return {
            name.removeprefix(_CONSTANT): tensor.clone()
            for name, tensor in self.tensors().items()
            if name.startswith(_CONSTANT)
        }


def resume_folder(output: OutputConfig) -> Path:
    """Where this run's resume points go."""
    return Path(output.proj_dir) / "resume"


def save_point(
    folder: Path, tensors: Mapping[str, Tensor], progress: RunProgress, essentials: Mapping[str, Any]
) -> Path:
    """Write a resume point into ``folder``; it appears there complete or not at all.

    Returns: the point's own folder.
    Raises: UserError if it cannot be written.
    """
    place = folder / f"step-{progress.step:08d}"
    partial = folder / f".partial-{os.getpid()}-{secrets.token_hex(4)}"
    with writing(place):
        try:
            partial.mkdir(parents=True)
            torch.save(dict(tensors), partial / _TENSORS)
            record = {
                "format": FORMAT,
                "progress": asdict(progress),
                "essentials": dict(essentials),
                "tensors_bytes": (partial / _TENSORS).stat().st_size,
            }
            (partial / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            for path in (partial / _TENSORS, partial / _RECORD, partial):
                make_durable(path)
            if place.exists():
                # the same step, written by a run that a later start went back behind
                shutil.rmtree(place)
            partial.rename(place)
            make_durable(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return place


def prune_points(folder: Path, written: list[Path]) -> None:
    """Remove all points but the last ``KEPT`` of ``written``; those of other runs and partial ones go too."""
    newest = set(written[-KEPT:])
    for path in [*folder.glob("step-*"), *folder.glob(".partial-*")]:
        if path not in newest:
            shutil.rmtree(path, ignore_errors=True)


def find_point(output: OutputConfig, report: Callable[[str], None]) -> ResumePoint | None:
    """The newest readable resume point that ``--resume`` means; None if the run is to start anew.

    Broken points are reported and passed over.
    Raises: UserError if ``--resume`` names a folder without a readable one.
    """
    if output.resume == "none":
        return None
    folder = resume_folder(output) if output.resume == "auto" else Path(output.resume)
    candidates = [folder] if (folder / _RECORD).is_file() else sorted(folder.glob("step-*"), reverse=True)
    for path in candidates:
        try:
            return _read_point(path)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError,
                zipfile.BadZipFile) as reason:
            report(f"warning: the resume point {path} is broken and passed over ({reason})")
    if output.resume != "auto":
        raise UserError(
            f"--resume {output.resume}: no readable resume point there",
            expected="a folder resume/ of an earlier run, or one step-... folder in it",
            fix="--resume none",
        )
    return None


def _read_point(path: Path) -> ResumePoint:
    record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
    if record["format"] != FORMAT:
        raise ValueError(f"format {record['format']}, this version reads {FORMAT}")
    size = (path / _TENSORS).stat().st_size
    if size != record["tensors_bytes"]:
        raise ValueError(f"{_TENSORS} has {size} bytes instead of {record['tensors_bytes']}")
    point = ResumePoint(path, RunProgress(**record["progress"]), record["essentials"])
    # opened here, where a broken file can still be passed over
    point.tensors()
    return point


def check_essentials(point: ResumePoint, essentials: Mapping[str, Any]) -> None:
    """Compare the settings a run may not change on its way.

    Raises: UserError naming each that differs.
    """
    # through json, as the saved ones went: a tuple is a list there
    current = json.loads(json.dumps(dict(essentials)))
    names = [name for name in {**point.essentials, **current} if point.essentials.get(name) != current.get(name)]
    if not names:
        return
    shown = names[:_FIRST_DIFFERENCES]
    raise UserError(
        f"the run in {point.path.parent} was started with other settings and cannot go on with these",
        found=", ".join(f"{name} {current.get(name)}" for name in shown),
        expected=", ".join(f"{name} {point.essentials.get(name)}" for name in shown),
        fix="the earlier settings, --resume none to start anew, or another --proj_dir",
    )


def capture(
    model: nn.Module, moments: Mapping[str, Tensor], scaler: Mapping[str, Any], constants: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Copies on the CPU of trained parameters, which must be whole, of the optimizer's ``moments`` (see
    ``Sharing.moments``), the gradient scaler's numbers and ``constants``."""
    tensors = {f"{_CONSTANT}{name}": tensor.detach().cpu() for name, tensor in constants.items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"param.{name}"] = parameter.detach().cpu()
    tensors |= moments
    for key, value in scaler.items():
        tensors[f"scaler.{key}"] = torch.tensor(float(value), dtype=torch.float64)
    return tensors


def restore_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved values into the trained parameters.

    Raises: ContractError if names or shapes do not match.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = {name.removeprefix("param."): tensor for name, tensor in tensors.items() if name.startswith("param.")}
    if saved.keys() != trained.keys():
        raise ContractError(f"a resume point of other parameters: {sorted(saved.keys() ^ trained.keys())[:4]}")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])


def restored_scaler(tensors: Mapping[str, Tensor], current: Mapping[str, Any]) -> dict[str, Any]:
    """The gradient scaler's numbers, in the types of its ``current`` ones."""
    return {
        key: type(value)(tensors[f"scaler.{key}"].item()) if f"scaler.{key}" in tensors else value
        for key, value in current.items()
    }
