"""Resume points: all a run needs to go on as if nothing had happened.

``proj_dir/resume/step-00000120/`` holds ``tensors.pth``, the trained parameters and the optimizer's moments, and
``resume.json``, how far the run is and the settings that must not change. Random numbers need no saving: each batch
draws from a stream of its own, and the order of the data is a function of seed and position. Points are written
between optimizer steps only, so that no part of a step's gradient has to be saved; and nothing in them depends on how
many processes trained or how rows were split into batches.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkvpeft.atomic import NotWrittenError, make_durable, write_whole, writing
from rwkvpeft.checkpoints.files import load_tensors
from rwkvpeft.config.groups import OutputConfig
from rwkvpeft.errors import ContractError, UserError
from rwkvpeft.training.module import RunProgress
from rwkvpeft.training.point_order import RECORD, newest_first

FORMAT = 2
KEPT = 2

_TENSORS = "tensors.pth"
_CONSTANT = "constant."


@dataclass(frozen=True)
class Standing:
    """What a resume point says beside its tensors.

    ``progress`` is how far the run was, ``essentials`` the settings that must not change, ``split`` how its rows were
    dealt out, ``checkpoints`` the names of those the run has written, oldest first, and ``owed`` of those it should
    have ended with and could not write. ``start`` counts the starts of the command in a folder: a point of a later one
    is newer whatever its step, as that may have started anew or gone back.
    """

    progress: RunProgress
    essentials: Mapping[str, Any]
    split: Mapping[str, Any]
    checkpoints: Sequence[str] = ()
    owed: Sequence[str] = ()
    start: int = 0


@dataclass(frozen=True)
class ResumePoint:
    """A whole resume point, and where it is."""

    path: Path
    standing: Standing

    @property
    def progress(self) -> RunProgress:
        """How far the run was."""
        return self.standing.progress

    @property
    def essentials(self) -> Mapping[str, Any]:
        """The settings it was written under."""
        return self.standing.essentials

    def is_of(self, output: OutputConfig) -> bool:
        """Whether a run wrote it in this very folder, and with it the checkpoints it names."""
        return self.path.parent.resolve() == resume_folder(output).resolve()

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, through a memory map."""
        return load_tensors(self.path / _TENSORS)

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


def save_point(folder: Path, tensors: Mapping[str, Tensor], standing: Standing) -> Path:
    """Write a resume point into ``folder``; it appears there complete or not at all.

    Returns: the point's own folder.
    Raises: NotWrittenError if it cannot be written; then nothing of it stays behind.
    """
    place = folder / f"step-{standing.progress.step:08d}"
    partial = folder / f".partial-{os.getpid()}-{secrets.token_hex(4)}"
    with writing(place):
        try:
            partial.mkdir(parents=True)
            with (partial / _TENSORS).open("wb") as file:
                torch.save(dict(tensors), file)
            record = {"format": FORMAT, **asdict(standing), "tensors_bytes": (partial / _TENSORS).stat().st_size}
            (partial / RECORD).write_text(_sealed(record), encoding="utf-8")
            for path in (partial / _TENSORS, partial / RECORD, partial):
                make_durable(path)
            if place.exists():
                # the same step, written by a run that a later start went back behind: a crash must find it whole or not
                place.rename(partial.with_name(f"{partial.name}-before"))
            partial.rename(place)
            make_durable(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return place


def replace_points(folder: Path, written: list[Path], save: Callable[[], Path]) -> list[Path]:
    """``save`` a point and remove all but the last ``KEPT`` of ``written`` and it; those of other runs and partial ones
    go too.

    A disk that has no room for one more loses the older ones first, if the newest of ``written`` is whole.

    Returns: the points that this run has there now, oldest first.
    Raises: NotWrittenError if it cannot be written all the same; what is there stays.
    """
    try:
        place = save()
    except NotWrittenError:
        if not (written and is_whole(written[-1]) and _remove_others(folder, written[-1:])):
            raise
        written = written[-1:]
        place = save()
    kept = [*(path for path in written if path != place), place][-KEPT:]
    _remove_others(folder, kept)
    return kept


def _remove_others(folder: Path, kept: list[Path]) -> bool:
    """Remove all points and what was left of points but those; whether there were any."""
    others = [path for path in (*folder.glob("step-*"), *folder.glob(".partial-*")) if path not in kept]
    for path in others:
        shutil.rmtree(path, ignore_errors=True)
    return bool(others)


def find_point(output: OutputConfig, report: Callable[[str], None]) -> ResumePoint | None:
    """The newest whole resume point that ``--resume`` means; None if the run is to start anew.

    Broken points are reported and passed over.
    Raises: UserError if ``--resume`` names a folder without a whole one, or if the point is of a newer version.
    """
    if output.resume == "none":
        return None
    folder = resume_folder(output) if output.resume == "auto" else Path(output.resume)
    for path in [folder] if (folder / RECORD).is_file() else newest_first(folder):
        try:
            return _read_point(path)
        except _BrokenError as reason:
            report(f"warning: the resume point {path} is broken and passed over ({reason})")
    if output.resume != "auto":
        raise UserError(
            f"--resume {output.resume}: no readable resume point there",
            expected="a folder resume/ of an earlier run, or one step-... folder in it",
            fix="--resume none",
        )
    return None


def is_whole(path: Path) -> bool:
    """Whether a point can be read."""
    try:
        _read_point(path)
    except _BrokenError:
        return False
    return True


class _BrokenError(Exception):
    """A point that is damaged; the message says how."""


def _read_point(path: Path) -> ResumePoint:
    """Raises: _BrokenError if anything of it is missing or changed; UserError if it is of a newer version."""
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        seal, format_ = record.pop("seal", None), record.pop("format")
        if isinstance(format_, int) and format_ > FORMAT:
            raise UserError(
                f"the resume point {path} was written by a newer version of this toolkit",
                found=f"format {format_}", expected=f"format {FORMAT}", fix="pip install --upgrade rwkvpeft",
            )
        if format_ != FORMAT:
            record = _of_format_1(record)
        elif seal != _seal({"format": format_, **record}):
            raise _BrokenError(f"{RECORD} was changed")
        size = record.pop("tensors_bytes")
        record["progress"] = RunProgress(**record["progress"])
        point = ResumePoint(path, Standing(**record))
        found = (path / _TENSORS).stat()
        if found.st_size != size:
            raise _BrokenError(f"{_TENSORS} has {found.st_size} bytes instead of {size}")
        damage = _damaged_part(path / _TENSORS, found.st_size, found.st_mtime_ns)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as reason:
        raise _BrokenError(f"{type(reason).__name__}: {reason}") from reason
    if damage:
        raise _BrokenError(damage)
    return point


@lru_cache(maxsize=8)
def _damaged_part(path: Path, size: int, changed: int) -> str:
    """What is wrong with a file of tensors, by the checksums that PyTorch writes into it; empty if nothing is.

    A start looks for its point twice: ``size`` and ``changed``, the time of its last change in ns, let the file be read
    once.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, zlib.error) as reason:
        return f"{_TENSORS}: {reason}"
    return f"{_TENSORS} was changed, at {part}" if part else ""


def _of_format_1(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a point that counted batches of a device, from before rows were counted."""
    progress, essentials = dict(record["progress"]), dict(record["essentials"])
    names = ("epoch_steps", "micro_bsz", "accumulate_grad_batches", "devices", "num_nodes")
    epoch_steps, micro_bsz, accumulated, devices, num_nodes = (essentials.pop(name) for name in names)
    at_once = micro_bsz * devices * num_nodes
    progress["rows"] = progress.pop("batches") * at_once
    essentials["rows of a step"] = min(accumulated, epoch_steps) * at_once
    essentials["rows of a mini-epoch"] = epoch_steps * at_once
    if essentials.get("length_buckets"):
        essentials["rows of a batch on all devices"] = at_once
    split = {"micro_bsz": micro_bsz, "processes": devices * num_nodes}
    return {**record, "progress": progress, "essentials": essentials, "split": split}


def _sealed(record: Mapping[str, Any]) -> str:
    return json.dumps({**record, "seal": _seal(record)}, indent=2) + "\n"


def _seal(record: Mapping[str, Any]) -> str:
    """A checksum of what a point says."""
    text = json.dumps(as_written(record), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def as_written(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they come back from JSON."""
    written: dict[str, Any] = json.loads(json.dumps(dict(values)))
    return written


def capture(
    model: nn.Module,
    moments: dict[str, Tensor],
    scaler: Mapping[str, Any],
    constants: Mapping[str, Tensor],
    *,
    apart: bool = False,
) -> dict[str, Tensor]:
    """Trained parameters, which must be whole, the optimizer's ``moments`` (see ``Sharing.moments``), the gradient
    scaler's numbers and ``constants``, on the CPU.

    Args:
        apart: with copies of what is on the CPU already, which the next step changes. Empties ``moments``, so that no
            more than one of them is there twice.
    """
    def own(tensor: Tensor) -> Tensor:
        on_cpu = tensor.detach().cpu()
        # a copy from another device is one already; a view would drag its whole storage into the file
        is_view = on_cpu.untyped_storage().nbytes() != on_cpu.nbytes
        return on_cpu.clone() if is_view or (apart and on_cpu.data_ptr() == tensor.data_ptr()) else on_cpu

    tensors = {f"{_CONSTANT}{name}": own(tensor) for name, tensor in constants.items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"param.{name}"] = own(parameter)
    for name in list(moments):
        tensors[name] = own(moments.pop(name))
    for key, value in scaler.items():
        tensors[f"scaler.{key}"] = torch.tensor(float(value), dtype=torch.float64)
    return tensors


def settle(point: ResumePoint) -> None:
    """Note that nothing is owed any more. Raises: NotWrittenError if that cannot be written."""
    record = json.loads((point.path / RECORD).read_text(encoding="utf-8"))
    record = {name: value for name, value in record.items() if name != "seal"} | {"owed": []}
    write_whole(point.path / RECORD, lambda partial: partial.write_text(_sealed(record), encoding="utf-8"))


def parameters_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained parameters of a point, by their names in the model."""
    return {name.removeprefix("param."): tensor for name, tensor in tensors.items() if name.startswith("param.")}


def restore_parameters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved values into the trained parameters.

    Raises: ContractError if names or shapes do not match.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = parameters_in(tensors)
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
