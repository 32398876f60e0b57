"""Choose the backend of an operator once per run, and say which and why."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from rwkvpeft.errors import UserError
from rwkvpeft.ops.contract import Backend, Needs, Wkv
from rwkvpeft.ops.sequences import taking_sequences
from rwkvpeft.registry import BACKENDS, find

ABSENT = {
    "cuda": "this version has no CUDA kernels",
    "triton": "this version has no Triton kernels",
    "fla": "this version does not call flash-linear-attention",
}
"""Values of ``--op`` other programs know and no backend answers to here, each with its reason."""


@dataclass(frozen=True)
class Choice:
    """The operator that will run, keyword-only and without ``op``, and one line for the start report."""

    run: Wkv
    report: str


@functools.cache
def choose_backend(operator: str, op: str, needs: Needs) -> Choice:
    """Find the backend that serves ``needs``.

    Args:
        operator: ``"wkv5"``, ``"wkv6"`` or ``"wkv7"``.
        op: a backend's name, or ``"auto"`` for the first of the registry's row that can; rows list the fastest first.
        needs: what the run asks.
    Raises:
        UserError: ``op`` is unknown, absent from this version, or cannot serve ``needs``.
    """
    objections = {
        name: find(BACKENDS[operator], name, flag="--op").supports.objections(needs) for name in BACKENDS[operator]
    }
    working = [name for name, reasons in objections.items() if not reasons]
    if op == "auto":
        if not working:
            reasons = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in objections.items())
            raise UserError(f"no program for {operator} can run this job", found=reasons)
        return _choice(operator, working[0], _passed_over(working[0], objections))
    if op not in objections:
        reason = ABSENT.get(op)
        what = f"--op {op} cannot run: {reason}" if reason else f"--op does not know {op!r}"
        raise UserError(what, found=op, expected=["auto", *working], fix="--op auto")
    if objections[op]:
        raise UserError(
            f"--op {op} cannot run this job",
            found=objections[op],
            expected=["auto", *working] if working else None,
            fix="--op auto" if working else None,
        )
    return _choice(operator, op, "as asked")


def _choice(operator: str, name: str, why: str) -> Choice:
    backend: Backend = find(BACKENDS[operator], name, flag="--op")
    return Choice(taking_sequences(operator, backend), f"{operator}: {name}, {backend.summary} ({why})")


def _passed_over(taken: str, objections: dict[str, list[str]]) -> str:
    rest = {name: reasons for name, reasons in objections.items() if name != taken}
    told = [f"{name}: {', '.join(reasons) or 'slower'}" for name, reasons in rest.items()]
    told += [f"{name}: {reason}" for name, reason in ABSENT.items()]
    return "fastest that can; not taken: " + "; ".join(told)
