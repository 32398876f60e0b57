"""What RWKV-LM's stages and a number of tokens to end at say about other settings.

Source: RWKV-LM, ``train.py`` of RWKV-v5 and of RWKV-v7/train_temp.
"""

from __future__ import annotations

from typing import Any

STAGE_SAMPLES = 40320
"""Rows of a mini-epoch of stages 1 to 3, on all devices together."""

# as many mini-epochs as the tokens take, where only the data tell how many that are; RWKV-LM's scripts write it
_UNLIMITED = 999999


def by_stage(values: dict[str, Any]) -> None:
    """Fill in what ``--train_stage`` and ``--my_exit_tokens`` decide. ``ctx_len`` and rates are resolved already.

    A given ``epoch_count`` stays as an upper limit, since RWKV-LM's scripts give one that is never reached.
    """
    if values.get("load_model") == "0":
        # how RWKV-LM's scripts say that there is no model
        values["load_model"] = ""
    stage = values.get("train_stage", 0)
    if stage:
        values.setdefault("dataload", "get")
        values.setdefault("epoch_steps", STAGE_SAMPLES // rows_at_once(values) or 1)
        if stage == 1 and values.get("load_model"):
            values.setdefault("load_partial", 1)
        if values.get("my_exit_tokens", 0) <= 0:
            values.setdefault("lr_schedule", "exp" if values["lr_final"] else "linear")
    count = _epoch_count(values, stage)
    if count is not None:
        values["epoch_count"] = min(count, values.get("epoch_count", count))


def _epoch_count(values: dict[str, Any], stage: int) -> int | None:
    """Mini-epochs of the whole run, as far as the settings tell; None if they leave it to ``--epoch_count``.

    A later stage counts those before it too.
    """
    tokens = abs(values.get("my_exit_tokens", 0))
    if tokens:
        epoch_steps = values.get("epoch_steps", 1000)
        if epoch_steps <= 0:
            return _UNLIMITED
        per_epoch = epoch_steps * rows_at_once(values) * max(values["ctx_len"], 1)
        begun = 0 if stage else values.get("epoch_begin", 0)
        return max(-(-tokens // per_epoch) - begun, 1)
    return max(values.get("magic_prime", 0) // STAGE_SAMPLES, 1) if stage else None


def rows_at_once(values: dict[str, Any]) -> int:
    """Rows of one batch on all devices together."""
    sizes = [values.get(name, default) for name, default in (("micro_bsz", 12), ("devices", 1), ("num_nodes", 1))]
    return max(sizes[0] * sizes[1] * sizes[2], 1)
