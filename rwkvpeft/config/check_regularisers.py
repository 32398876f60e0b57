"""Whether dropout, noise, smoothing, headQK and what is logged of a run's parts are in their ranges."""

from __future__ import annotations

from rwkvpeft.config.findings import Findings
from rwkvpeft.config.groups import TrainConfig


def check_regularisers(config: TrainConfig, findings: Findings) -> None:
    """Note every such value out of its range."""
    method, optimizer = config.method, config.optimizer
    for name in ("dropout", "label_smoothing"):
        value = getattr(method, name)
        findings.check(0 <= value < 1, f"--{name} is out of range", found=value, expected="0 up to below 1")
    for name, value in (
        ("neftune_alpha", method.neftune_alpha),
        ("log_parts", config.evaluation.log_parts),
        ("head_qk", config.model.head_qk or 0),
    ):
        findings.check(value >= 0, f"--{name} is too small", found=value, expected="0 or more")
    findings.check(
        optimizer.weight_decay_final <= 0 or optimizer.weight_decay > 0,
        "--weight_decay_final has no effect without --weight_decay: what is decayed at the end is so from the start",
        found=f"--weight_decay {optimizer.weight_decay:g}",
        fix=f"--weight_decay {optimizer.weight_decay_final:g}",
    )
