"""What the evaluations of a run found, which its ``val_data.jsonl`` holds line by line."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

BEST = "rwkv-best.pth"
"""The checkpoint with the lowest held-out loss."""


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation. Losses are in nats a token; None where there are no such data.

    ``step`` counts optimizer steps, 0 is the untouched base. ``best``: no trained model before it had so low a
    ``val_loss``. ``general_loss`` is that of ``--general_data_file``. ``t_cost`` is in seconds. ``metrics`` are the
    objective's further figures of the held-out data: where an objective has its own, there is no perplexity.
    """

    step: int
    epoch: int
    val_loss: float | None
    perplexity: float | None
    best: bool
    general_loss: float | None
    t_cost: float
    metrics: dict[str, float] | None = None

    def line(self) -> dict[str, Any]:
        """The record as ``val_data.jsonl`` holds it; JSON has no infinity."""
        values = asdict(self)
        metrics = values.pop("metrics")
        if metrics is not None:
            values["metrics"] = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        broken = [key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        return {**values, **dict.fromkeys(broken)}

    @classmethod
    def from_line(cls, line: dict[str, Any]) -> EvaluationRecord:
        """Read a line back; keys of later versions are ignored. Raises: KeyError for a missing key."""
        known = {item.name: line[item.name] for item in fields(cls) if item.name != "metrics"}
        return cls(**known, metrics=line.get("metrics"))


class History:
    """The evaluations of a run, oldest first."""

    def __init__(self, records: list[EvaluationRecord] | None = None) -> None:
        self.records = list(records or [])

    def add(
        self,
        *,
        step: int,
        epoch: int,
        val_loss: float | None,
        general_loss: float | None,
        t_cost: float,
        metrics: dict[str, float] | None = None,
    ) -> EvaluationRecord:
        """Take a new evaluation in and say whether it is the best of the trained model so far."""
        best = self.best
        record = EvaluationRecord(
            step=step,
            epoch=epoch,
            val_loss=val_loss,
            perplexity=None if val_loss is None or metrics is not None else _exp(val_loss),
            best=step > 0 and val_loss is not None and math.isfinite(val_loss) and (
                best is None or val_loss < _loss(best)
            ),
            general_loss=general_loss,
            t_cost=t_cost,
            metrics=metrics,
        )
        self.records.append(record)
        return record

    @property
    def base(self) -> EvaluationRecord | None:
        """The evaluation before training, if there was one."""
        return next((record for record in self.records if record.step == 0), None)

    @property
    def newest(self) -> EvaluationRecord | None:
        """The last evaluation, that of the base included."""
        return self.records[-1] if self.records else None

    @property
    def best(self) -> EvaluationRecord | None:
        """The trained model's evaluation with the lowest held-out loss."""
        return next((record for record in reversed(self.records) if record.best), None)

    @property
    def without_better(self) -> int:
        """Evaluations of the trained model since the best one."""
        best = self.best
        return 0 if best is None else len([record for record in self.records if record.step > best.step])

    @property
    def is_overfitted(self) -> bool:
        """Whether the last held-out loss is above an earlier one."""
        return self.excess > 0

    @property
    def excess(self) -> float:
        """How far the last held-out loss lies above the best, in nats; 0 without held-out data."""
        best, newest = self.best, self.newest
        if best is None or newest is None or newest.val_loss is None:
            return 0.0
        return newest.val_loss - _loss(best)

    def forgotten(self, record: EvaluationRecord | None = None) -> float:
        """How far the loss of the general data has risen above the base's at ``record``, by default the newest."""
        base, record = self.base, record or self.newest
        if base is None or record is None or base.general_loss is None or record.general_loss is None:
            return 0.0
        return record.general_loss - base.general_loss

    def alarm_is_new(self, limit: float) -> bool:
        """Whether the newest evaluation is above ``limit`` of forgetting and the one before it was not."""
        before = self.forgotten(self.records[-2]) if len(self.records) > 1 else 0.0
        return self.forgotten() > limit >= before


def _loss(record: EvaluationRecord) -> float:
    assert record.val_loss is not None
    return record.val_loss


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
