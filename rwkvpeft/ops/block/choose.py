"""Choose once per run what computes a block's operators, and say which and why."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from rwkvpeft.errors import UserError
from rwkvpeft.ops.bench import first_line
from rwkvpeft.ops.block.contract import BlockOps
from rwkvpeft.ops.block.plain import PLAIN
from rwkvpeft.ops.block.trial import objection
from rwkvpeft.ops.contract import Needs
from rwkvpeft.registry import BLOCK_OPS, find

FLAG = "--fused_kernel"
FAILED = "failed its trial here"


@dataclass(frozen=True)
class BlockChoice:
    """The operators that will run.

    Args:
        report: one line for the start report.
        listing: one line for each set of operators that is not taken, and why.
    """

    ops: BlockOps
    report: str
    listing: tuple[str, ...] = ()


@functools.cache
def choose_block_ops(name: str, needs: Needs) -> BlockChoice:
    """Find what serves ``needs``.

    Args:
        name: an entry of ``registry.BLOCK_OPS``, or ``"auto"`` for the first of them that can. On a GPU the fused
            kernels first prove themselves.
        needs: what the run asks.
    Raises:
        UserError: ``name`` is unknown or cannot serve ``needs``.
    """
    if name not in ("auto", *BLOCK_OPS):
        raise UserError(f"{FLAG} does not know {name!r}", found=name, expected=["auto", *BLOCK_OPS])
    passed_over: dict[str, str] = {}
    for candidate in BLOCK_OPS if name == "auto" else (name,):
        ops, reason = _look_up(candidate, needs)
        if ops is not None:
            said = [f"{ops.summary}, as asked" if name != "auto" else ops.summary]
            # what could run here and does not is worth a word
            said += [f"{other} {reason.partition(':')[0]}" for other, reason in passed_over.items()
                     if reason.startswith(FAILED)]
            listing = (f"block by {other}: {reason}" for other, reason in passed_over.items())
            return BlockChoice(ops, "; ".join(said), tuple(listing))
        passed_over[candidate] = reason
    if name == "auto":
        raise UserError("nothing can compute a block of this run", found="; ".join(passed_over.values()))
    raise UserError(
        f"{FLAG} cannot run this job", found=passed_over[name],
        fix=f"leave {FLAG} out, or {FLAG} false" if name != PLAIN.name else None,
    )


def _look_up(name: str, needs: Needs) -> tuple[BlockOps | None, str]:
    """The operators of that name, or None and why they cannot be used."""
    if name != PLAIN.name and needs.device_type in ("cpu", "mps"):
        return None, f"device {needs.device_type}"
    try:
        ops: BlockOps = find(BLOCK_OPS, name, flag=FLAG)
    except ModuleNotFoundError as reason:
        if (reason.name or "").startswith("rwkvpeft"):
            raise
        return None, f"{reason.name} is not installed"
    except Exception as reason:  # noqa: BLE001 a package that does not fit this machine may fail in any way
        return None, f"it cannot be imported: {first_line(reason)}"
    refused = ", ".join(ops.supports.objections(needs))
    if not refused and name != PLAIN.name and needs.device_type == "cuda":
        found = objection(ops, needs, torch.device("cuda", torch.cuda.current_device()))
        refused = f"{FAILED}: {found}" if found else ""
    return (None, refused) if refused else (ops, "")
