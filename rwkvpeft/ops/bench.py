"""What choosing a backend wants of the GPU at hand, and what it remembers of earlier runs there."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from rwkvpeft.atomic import alone, write_whole
from rwkvpeft.errors import UserError
from rwkvpeft.ops.contract import Backend, Needs
from rwkvpeft.ops.trial import complaint, errors_of, milliseconds

_PACKAGES = ("torch", "triton", "fla-core", "rwkvpeft")
"""Whose versions speed depends on."""


class GpuLost(UserError):
    """A program has broken off so badly that this process can no longer use its GPU: no other can be taken instead."""


@dataclass(frozen=True)
class Bench:
    """A GPU on which backends are tried and timed. Tests put functions of their own in place of the measuring ones.

    Args:
        device: its name, e.g. ``"NVIDIA H200"``.
        processors: its streaming multiprocessors.
        errors: the relative errors of a backend there, as ``trial.errors_of``; raises whatever the backend raises.
        milliseconds: the time of a backend there, as ``trial.milliseconds``; raises likewise.
        memory: the file that keeps times from one run to the next; None keeps nothing.
        say: is told a line when something will take seconds.
    """

    device: str
    processors: int
    errors: Callable[[str, Backend, Needs], Mapping[str, float]] = field(hash=False)
    milliseconds: Callable[[str, Backend, Needs], float] = field(hash=False)
    memory: Path | None = None
    say: Callable[[str], object] = field(default=str, hash=False)

    @classmethod
    @functools.cache
    def of(cls, device: torch.device) -> Bench:
        """The bench of a CUDA device."""

        def errors(operator: str, backend: Backend, needs: Needs) -> Mapping[str, float]:
            with surviving(device, f"--op {backend.name}", "--op torch"), torch.cuda.device(device):
                return errors_of(backend.run, operator, needs, device)

        def timed(operator: str, backend: Backend, needs: Needs) -> float:
            try:
                with surviving(device, f"--op {backend.name}", "--op torch"), torch.cuda.device(device):
                    return milliseconds(backend.run, operator, needs, device)
            finally:
                # the model comes next and may need all of it
                torch.cuda.empty_cache()

        properties = torch.cuda.get_device_properties(device)
        return cls(properties.name, properties.multi_processor_count, errors, timed, memory_file(), _say)

    def objection(self, operator: str, backend: Backend, needs: Needs, slack: float = 1.0) -> str:
        """Why ``backend`` cannot be used here although it says so; empty when its results are right.

        Args:
            slack: errors up to so many times the limits are excused.
        Raises: UserError of a backend that can say itself what is wrong.
        """
        try:
            return complaint(self.errors(operator, backend, needs), needs.dtype, slack)
        except UserError:
            raise
        except Exception as reason:  # noqa: BLE001 a program that fails on this GPU may fail in any way
            return first_line(reason)

    def remembered(self, operator: str, names: Iterable[str], needs: Needs) -> dict[str, float] | None:
        """What an earlier run measured when it had these backends to choose from; None if none has."""
        return read_times(self.memory).get(self._key(operator, names, needs))

    def times(self, operator: str, backends: Mapping[str, Backend], needs: Needs) -> dict[str, float]:
        """Milliseconds a layer by backend, measured now; those that fail at this size are left out."""
        self.say(f"timing {', '.join(backends)} for {operator} on this GPU, once for these sizes")
        found = {}
        for name, backend in backends.items():
            try:
                found[name] = self.milliseconds(operator, backend, needs)
            except GpuLost:
                raise
            except Exception:  # noqa: BLE001 most likely too little memory at this size: the others go on
                continue
        return found

    def remember(self, operator: str, names: Iterable[str], needs: Needs, times: Mapping[str, float]) -> None:
        """Keep times for runs that have the backends ``names`` to choose from."""
        if times and self.memory is not None:
            keep_times(self.memory, self._key(operator, names, needs), times)

    def alone(self) -> AbstractContextManager[None]:
        """Keep other processes from measuring meanwhile: they wait, and then find what this one kept."""
        if self.memory is None:
            return nullcontext()
        waiting = "waiting for another process that tries programs on this machine"
        return alone(self.memory.with_suffix(".lock"), lambda: self.say(waiting))

    def _key(self, operator: str, names: Iterable[str], needs: Needs) -> str:
        versions = [*(f"{package} {_version(package)}" for package in _PACKAGES), f"kernels {_sources()}"]
        sizes = [f"B*H {_bucket(needs.groups)}", f"T {_bucket(needs.tokens)}", f"N {needs.head_size}"]
        return ", ".join([self.device, *versions, operator, str(needs.dtype), *sizes, "/".join(sorted(names))])


@contextmanager
def surviving(device: torch.device | str, program: str, instead: str) -> Iterator[None]:
    """Do what may fail on a GPU.

    Args:
        program: the flag that asks for what is tried. instead: the one that does without.
    Raises: whatever is raised inside; GpuLost if nothing can run on the device afterwards.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as reason:
        if torch.device(device).type == "cuda":
            try:
                torch.cuda.synchronize(device)
            except RuntimeError:
                raise GpuLost(f"{program} failed so badly on this GPU that nothing else can run after it",
                              found=first_line(reason), fix=instead) from reason
        raise


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def first_line(reason: BaseException) -> str:
    """What an exception says, short enough for a line of a report."""
    lines = str(reason).strip().splitlines()
    return f"{type(reason).__name__}: {lines[0][:160]}" if lines else type(reason).__name__


def memory_file() -> Path | None:
    """Where times are kept: in the user's own cache folder; None for a user who has none."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return folder / "rwkvpeft" / "wkv-times.json"


def read_times(path: Path | None) -> dict[str, dict[str, float]]:
    """Milliseconds by key and backend; nothing if the file is missing or not whole."""
    if path is None:
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {key: {name: float(time) for name, time in times.items()} for key, times in kept.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def keep_times(path: Path, key: str, times: Mapping[str, float]) -> None:
    """Add one entry to the file. A folder that cannot be written is no fault: the next run measures again."""
    kept = {**read_times(path), key: dict(times)}
    text = json.dumps(kept, indent=1)
    try:
        write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    except UserError:
        return


def _bucket(number: int) -> int:
    """The next power of two: speed hardly differs between."""
    return 1 << max(0, number - 1).bit_length()


@functools.cache
def _sources() -> str:
    """A digest of the kernels: one that is changed is timed again."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for folder, pattern in ((package / "ops", "*.py"), (package, "*.cu*"), (package.parent / "cuda", "*.cu*")):
        for path in sorted(folder.rglob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
