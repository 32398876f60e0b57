"""Choose once per run what works on the loss head's rows of logits, after a trial on the device.

The truth is the PyTorch program in fp64 on the CPU, given the same rounded logits. Errors are relative Frobenius norms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkvpeft.errors import UserError
from rwkvpeft.ops import cross_entropy_torch
from rwkvpeft.ops.bench import GpuLost, first_line, surviving
from rwkvpeft.ops.contract import Needs
from rwkvpeft.ops.cross_entropy import RowChoice
from rwkvpeft.ops.cross_entropy_torch import RowProgram, Trained
from rwkvpeft.ops.trial import relative_error

FLAG = "--fused_kernel"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LIMITS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 1e-2}
# two blocks of columns of the Triton program, the second cut short
_ROWS, _VOCABULARY = 4, 5000


@dataclass(frozen=True)
class RowsChoice:
    """The program that will run.

    Args:
        report: a few words for the start report.
        listing: a line for the program that is not taken, and why.
    """

    program: RowProgram
    report: str
    listing: tuple[str, ...] = ()


def choose_rows(name: RowChoice, needs: Needs, device: torch.device | str) -> RowsChoice:
    """Find what serves ``needs`` on ``device``; Triton first proves itself there.

    Raises: UserError if Triton is asked for by name and cannot serve; GpuLost if its trial made the device unusable.
    """
    if name == "torch":
        return RowsChoice(cross_entropy_torch.rows, "PyTorch")
    if needs.device_type != "cuda":
        program, reason, failed = None, f"device {needs.device_type}", False
    elif needs.dtype not in _DTYPES:
        program, reason, failed = None, f"dtype {needs.dtype}", False
    else:
        program, reason = _triton()
        failed = False
        if program is not None and (found := objection(program, needs.dtype, device)):
            program, reason, failed = None, found, True
    if program is not None:
        return RowsChoice(program, "Triton")
    if name == "triton":
        raise UserError(f"{FLAG} cannot compute the loss of this job", found=reason,
                        fix=f"leave {FLAG} out, or {FLAG} false")
    said = "PyTorch, Triton failed its trial here" if failed else "PyTorch"
    return RowsChoice(cross_entropy_torch.rows, said, (f"loss by triton: {reason}",))


def objection(program: RowProgram, dtype: torch.dtype, device: torch.device | str) -> str:
    """Why the program cannot be trusted on this device, in a few words; empty when it computes what it should.

    Raises: GpuLost if trying it made the device unusable.
    """
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(_ROWS, _VOCABULARY, generator=generator)).to(dtype)
    labels = torch.tensor([0, _VOCABULARY - 1, 17, 17])
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0])
    try:
        with surviving(device, FLAG, f"{FLAG} false"):
            found = _results(program, logits.to(device, copy=True), labels.to(device), weights.to(device))
    except GpuLost:
        raise
    except Exception as reason:  # noqa: BLE001 a compiler or a driver may fail in any way
        return f"the loss fails: {first_line(reason)}"
    expected = _results(cross_entropy_torch.rows, logits.double(), labels, weights.double())
    for name, result in expected.items():
        error = relative_error(found[name], result)
        if not error < _LIMITS[dtype]:
            return f"the loss's {name} is off by {error:.0e}"
    return ""


def _results(program: RowProgram, logits: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """What the program gives at its fullest; ``logits`` are used up."""
    losses, top, index = program(logits, Trained(labels, weights, 0.1), gradient=True, top=True)
    assert losses is not None
    assert top is not None
    assert index is not None
    return {"sum": losses, "gradient": logits, "largest logit": top, "index": index}


def _triton() -> tuple[RowProgram | None, str]:
    """The Triton program, or None and why there is none."""
    try:
        from rwkvpeft.ops import cross_entropy_triton
    except ModuleNotFoundError as reason:
        if (reason.name or "").startswith("rwkvpeft"):
            raise
        return None, f"{reason.name} is not installed"
    except Exception as reason:  # noqa: BLE001 a package that does not fit this machine may fail in any way
        return None, f"it cannot be imported: {first_line(reason)}"
    return cross_entropy_triton.rows, ""
