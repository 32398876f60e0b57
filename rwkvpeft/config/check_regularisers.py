"""Whether dropout, noise, smoothing and what is logged of a run's parts are in their ranges."""

from __future__ import annotations

from rwkvpeft.config.findings import Findings
from rwkvpeft.config.groups import TrainConfig


def check_regularisers(config: TrainConfig, findings: Findings) -> None:
    """Note every such value out of its range."""
    method, optimizer = config.method, config.optimizer
    for name in ("dropout", "label_smoothing"):
        value = getattr(method, name)
        findings.check(0 <= value < 1, f"--{name} is out of range", found=value, expected="0 up to below 1")
    findings.check(
        method.neftune_alpha >= 0, "--neftune_alpha is too small", found=method.neftune_alpha, expected="0 or more"
    )
    findings.check(
        config.evaluation.log_parts >= 0,
        "--log_parts is too small",
        found=config.evaluation.log_parts,
        expected="0 or more",
    )
    findings.check(
        optimizer.weight_decay_final <= 0 or optimizer.weight_decay > 0,
        "--weight_decay_final has no effect without --weight_decay: what is decayed at the end is so from the start",
        found=f"--weight_decay {optimizer.weight_decay:g}",
        fix=f"--weight_decay {optimizer.weight_decay_final:g}",
    )
