"""Hugging Face peft's methods through ``--peft <name>``, for every tuner that works on linears.

Names are looked up in the installed package, and each tuner is tried before it is used (``huggingface_trial``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rwkvpeft.adapters.huggingface_adapter import PeftAdapter
from rwkvpeft.adapters.huggingface_layers import linear_of
from rwkvpeft.adapters.huggingface_settings import find_tuner, method_settings, tuner_names
from rwkvpeft.adapters.huggingface_trial import reason_against, trial_of

__all__ = ["PeftAdapter", "find_tuner", "linear_of", "method_settings", "peft_adapter", "reason_against", "tuner_names"]


def peft_adapter(name: str, settings: Mapping[str, Any], train_parts: Iterable[str] = ()) -> PeftAdapter:
    """The method of that name with a user's ``--peft_config``.

    Raises: UserError if the package is missing, has no such method, does not take these settings, or if the method
        breaks a promise an adapter makes.
    """
    config, verdict = trial_of(name, settings)
    return PeftAdapter(config, verdict.traits, train_parts)
