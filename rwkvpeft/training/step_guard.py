"""What is made of a step whose loss or gradient is not finite, or whose loss stands out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from rwkvpeft.training.fault_log import FaultLog
from rwkvpeft.training.spikes import KEPT_LOSSES, height
from rwkvpeft.training.suspects import SHOWN, Suspects, shortened

if TYPE_CHECKING:
    from rwkvpeft.training.module import RunProgress

# a scaler halves its scale after each overflow: from 2^16 this many in a row leave less than 2^-8
_OVERFLOWS_IN_A_ROW = 24


class StepFigures(NamedTuple):
    """One optimizer step as a guard sees it, the same on every process.

    ``step`` counts from 1; ``loss`` is the mean over its tokens, ``norm`` that of the gradients before clipping;
    ``batches`` are the numbers of its batches; ``scaled``: gradients were scaled for fp16, so that a norm that is not
    finite alone may be an overflow, which the scaler mends by itself.
    """

    step: int
    loss: float
    norm: float
    batches: range
    scaled: bool

    @property
    def is_sound(self) -> bool:
        """Whether the step could be taken."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)

    @property
    def overflowed(self) -> bool:
        """Whether the scaler left the step out and tries a smaller scale."""
        return self.scaled and math.isfinite(self.loss) and not math.isfinite(self.norm)


class StepGuard:
    """Looks at every step after it was taken, or left out because it was not sound.

    All processes see the same figures and keep the same count, so that they decide the same.

    Args:
        progress: of the run; ``broken`` and ``losses`` of it are kept here.
        skip: broken steps in a row that are left out; the next one ends the run.
        spike: standard deviations above the last losses that are noted; 0 for none.
        suspects: tell what a step was made of.
        log: takes what happened.
    """

    def __init__(self, progress: RunProgress, *, skip: int, spike: float, suspects: Suspects, log: FaultLog) -> None:
        self._progress = progress
        self._skip = skip
        self._spike = spike
        self._suspects = suspects
        self._log = log
        self._overflows = 0

    def look(self, figures: StepFigures) -> None:
        """Count the step and note what is wrong with it.

        Raises: UserError if training is to end, with a diagnosis.
        """
        self._overflows = self._overflows + 1 if figures.overflowed else 0
        if figures.is_sound:
            self._progress.broken = 0
            self._look_for_spike(figures)
            self._progress.losses = [*self._progress.losses, figures.loss][-KEPT_LOSSES:]
        elif not figures.overflowed or self._overflows >= _OVERFLOWS_IN_A_ROW:
            self._progress.broken += 1
            self._leave_out(figures)

    def _leave_out(self, figures: StepFigures) -> None:
        documents = self._suspects.documents(figures.batches)
        what = "loss" if not math.isfinite(figures.loss) else "gradient"
        self._log.add(
            {
                "step": figures.step,
                "kind": f"{what} not finite",
                "loss": figures.loss if math.isfinite(figures.loss) else None,
                "grad_norm": figures.norm if math.isfinite(figures.norm) else None,
                "documents": documents,
            },
            f"step {figures.step} is left out: its {what} is not finite; it held {shortened(documents)}",
        )
        if self._progress.broken > self._skip or figures.overflowed:
            raise self._suspects.diagnosis(
                figures.step, found=f"loss {figures.loss:g}, gradient norm {figures.norm:g}",
                in_a_row=self._overflows if figures.overflowed else self._progress.broken, documents=documents,
                losses=self._progress.losses,
            )

    def _look_for_spike(self, figures: StepFigures) -> None:
        above = height(self._progress.losses, figures.loss) if self._spike else None
        if above is None or above < self._spike:
            return
        losses = self._suspects.losses(figures.step, figures.batches)
        documents = self._suspects.documents(figures.batches)
        worst = shortened(documents)
        record = {
            "step": figures.step, "kind": "loss spike", "loss": figures.loss, "grad_norm": figures.norm,
            "deviations": round(above, 1), "documents": documents,
        }
        if losses:
            record["losses"] = losses
            worst = ", ".join(f"{name} ({loss:.2f})" for name, loss in _by_loss(documents, losses)[:SHOWN])
        self._log.add(
            record,
            f"step {figures.step}: the loss of {figures.loss:.4f} lies {above:.0f} standard deviations above those "
            f"before; it held {worst}",
        )


def _by_loss(documents: list[str], losses: list[float | None]) -> list[tuple[str, float]]:
    """Documents with their losses, the highest first."""
    known = [(name, loss) for name, loss in zip(documents, losses, strict=True) if loss is not None]
    return sorted(known, key=lambda pair: -pair[1])
