"""Choose the backend of an operator once per run, and say which and why.

On a GPU a backend first proves itself (``trial``), and the fastest at the run's own sizes is taken (``bench``).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from rwkvpeft.errors import UserError
from rwkvpeft.ops.bench import Bench, GpuLost, first_line
from rwkvpeft.ops.contract import Backend, Needs, Wkv
from rwkvpeft.ops.sequences import taking_sequences
from rwkvpeft.ops.trial import COARSE
from rwkvpeft.registry import BACKENDS, find

_PORTABLE = ("torch", "reference")
"""Written in PyTorch alone, for any device: the truth of every trial, so that they take none themselves. The others run
on GPUs, and nothing of them is imported for a run elsewhere."""
_FOR_CHECKING = "reference"
_FEW_TOKENS = 16
"""A chunk of most kernels: where T is no longer, going through it token by token costs least."""


@dataclass(frozen=True)
class Choice:
    """The operator that will run.

    Args:
        run: keyword-only and without ``op``.
        report: one line for the start report.
        listing: one line for each backend: what it is, how fast, or why it is not taken.
    """

    run: Wkv
    report: str
    listing: tuple[str, ...] = ()


@dataclass
class _Field:
    """The backends of an operator that are still in question, and what speaks against the others."""

    operator: str
    backends: dict[str, Backend] = field(default_factory=dict)
    objections: dict[str, str] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    passed: set[str] = field(default_factory=set)

    def drop(self, name: str, reason: str) -> None:
        """Take ``name`` out of the choice."""
        del self.backends[name]
        self.times.pop(name, None)
        self.objections[name] = reason


@functools.cache
def choose_backend(operator: str, op: str, needs: Needs, bench: Bench | None = None) -> Choice:
    """Find the backend that serves ``needs``.

    Args:
        operator: ``"wkv5"``, ``"wkv6"`` or ``"wkv7"``.
        op: a backend's name, or ``"auto"`` for the fastest that can: on a GPU, when gradients are wanted and the sizes
            are known, by measurement, now or in an earlier run; otherwise by rule.
        needs: what the run asks.
        bench: where backends are tried; None means the current GPU where the run is on one, and no trial elsewhere.
    Raises:
        UserError: ``op`` is unknown, absent from this version, cannot serve ``needs``, or fails on this GPU.
    """
    if bench is None and needs.device_type == "cuda":
        bench = Bench.of(torch.device("cuda", torch.cuda.current_device()))
    found = _look_up(operator, needs)
    if op == "auto":
        return _fastest(found, needs, bench)
    reason = found.objections.get(op)
    if op not in found.backends and reason is None:
        _refuse_unknown(op, found)
    if reason is None and bench is not None and op not in _PORTABLE:
        reason = bench.objection(operator, found.backends[op], needs, COARSE)
    if reason:
        working = [name for name in found.backends if name != op]
        raise UserError(
            f"--op {op} cannot run this job",
            found=reason,
            expected=["auto", *working] if working else None,
            fix="--op auto" if working else None,
        )
    return _choice(found, op, "as asked")


def rule(names: Iterable[str], needs: Needs, processors: int) -> list[str]:
    """Backends in the order of their likely speed where none is measured.

    Triton's kernels split the tokens, so that few heads fill a GPU; CUDA's go through them with one block to a head,
    which is least work as soon as there are two for each processor, or hardly any tokens.
    Otherwise: the order of the registry.
    """
    order = list(names)
    one_block_a_head = needs.groups >= 2 * processors or 0 < needs.tokens <= _FEW_TOKENS
    if one_block_a_head and "cuda" in order:
        order.insert(0, order.pop(order.index("cuda")))
    return order


def _look_up(operator: str, needs: Needs) -> _Field:
    """Every backend of the operator's row that can be imported and says that it can."""
    found = _Field(operator)
    for name in BACKENDS[operator]:
        if name not in _PORTABLE and needs.device_type in ("cpu", "mps"):
            found.objections[name] = f"device {needs.device_type}"
            continue
        try:
            backend: Backend = find(BACKENDS[operator], name, flag="--op")
        except ModuleNotFoundError as reason:
            if (reason.name or "").startswith("rwkvpeft"):
                raise
            found.objections[name] = f"{reason.name} is not installed"
            continue
        except Exception as reason:  # noqa: BLE001 a package that does not fit this machine may fail in any way
            found.objections[name] = f"it cannot be imported: {first_line(reason)}"
            continue
        reasons = backend.supports.objections(needs)
        if reasons:
            found.objections[name] = ", ".join(reasons)
        else:
            found.backends[name] = backend
    return found


def _fastest(found: _Field, needs: Needs, bench: Bench | None) -> Choice:
    for name, backend in list(found.backends.items()):
        if waits_for := backend.waits_for():
            found.drop(name, waits_for)
        elif needs.packed and not backend.packed:
            # timed on one long row it may be the fastest, and then launch once for each short document
            found.drop(name, "runs each document of a packed row alone")
    if bench is None:
        order = list(found.backends)
    elif needs.training and needs.groups and needs.tokens:
        order = _by_time(found, needs, bench)
    else:
        order = rule(found.backends, needs, bench.processors)
    for name in order:
        if bench is None or _passes(found, name, needs, bench):
            return _choice(found, name, "")
    reasons = "; ".join(f"{name}: {reason}" for name, reason in found.objections.items())
    raise UserError(f"no program for {found.operator} can run this job", found=reasons)


def _by_time(found: _Field, needs: Needs, bench: Bench) -> list[str]:
    """Backends, the fastest first; those without a time last, by rule."""
    names = [name for name in found.backends if name != _FOR_CHECKING]
    known = bench.remembered(found.operator, names, needs)
    if known is None:
        # the processes of a run that measured side by side would disturb each other, and might choose differently
        with bench.alone():
            known = bench.remembered(found.operator, names, needs) or _measured(found, names, needs, bench)
    found.times = {name: time for name, time in known.items() if name in found.backends}
    untimed = [name for name in found.backends if name not in found.times]
    return [*sorted(found.times, key=found.times.__getitem__), *rule(untimed, needs, bench.processors)]


def _measured(found: _Field, names: list[str], needs: Needs, bench: Bench) -> dict[str, float]:
    bench.say(f"trying what can compute {found.operator} on this GPU; kernels are compiled the first time")
    # what fails its trial is not worth its time
    passed = {name: found.backends[name] for name in names if _passes(found, name, needs, bench)}
    times = bench.times(found.operator, passed, needs)
    bench.remember(found.operator, names, needs, times)
    return times


def _passes(found: _Field, name: str, needs: Needs, bench: Bench) -> bool:
    if name in _PORTABLE or name in found.passed:
        return True
    try:
        reason = bench.objection(found.operator, found.backends[name], needs)
    except GpuLost:
        raise
    except UserError as said:
        reason = said.what
    if reason:
        found.drop(name, f"failed its trial here: {reason}")
    else:
        found.passed.add(name)
    return not reason


def _refuse_unknown(op: str, found: _Field) -> None:
    raise UserError(f"--op does not know {op!r}", found=op, expected=["auto", *found.backends], fix="--op auto")


def _choice(found: _Field, name: str, why: str) -> Choice:
    backend = found.backends[name]
    listing = [f"{found.operator} by {other}: {reason}" for other, reason in found.objections.items()]
    for other, program in found.backends.items():
        time = f", {found.times[other]:.3g} ms a layer" if other in found.times else ""
        listing.append(f"{found.operator} by {other}: {program.summary}{time}{', taken' if other == name else ''}")
    return Choice(taking_sequences(found.operator, backend), _report(found, name, why), tuple(listing))


def _report(found: _Field, name: str, why: str) -> str:
    """``wkv7 by triton, 0.21 ms a layer (torch 3.4); cuda: not built``."""
    said = [f"{found.operator} by {name}"]
    if name in found.times:
        others = ", ".join(f"{other} {time:.2g}" for other, time in found.times.items() if other != name)
        said.append(f"{found.times[name]:.2g} ms a layer" + (f" ({others})" if others else ""))
    else:
        said.append(why or found.backends[name].summary)
    short = [f"{other} {reason.partition(':')[0]}" for other, reason in found.objections.items()
             if reason.startswith(("failed", "not built"))]
    return "; ".join([", ".join(said), *short])
