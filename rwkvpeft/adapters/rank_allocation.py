"""AdaLoRA's sharing out of ranks: while it trains, the least important singular values are set to zero.

Source: Zhang et al., AdaLoRA (arXiv 2303.10512), computed by Hugging Face peft's RankAllocator. Its running averages
decide what is cut next, so that they stand in adapter files: ``...key.lora_E_importance``, ``..._uncertainty`` and,
for the values that are left, ``...key.lora_E_kept``. The paper's orthogonality term of the loss is not added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rwkvpeft.adapters.huggingface_settings import STEPS_UNKNOWN
from rwkvpeft.errors import UserError

_AVERAGES = {"_importance": "exp_avg_ipt", "_uncertainty": "exp_avg_unc"}
_KEPT = "_kept"
_ADAPTER = ".default"


def is_allocation_state(name: str) -> bool:
    """Whether a file's tensor ``name`` belongs to the sharing out of ranks."""
    return name.endswith((*_AVERAGES, _KEPT))


class RankAllocation:
    """Drives the allocator of a peft tuner that has one.

    Args:
        tuner: peft's AdaLoraModel.
        model: the model it sits on.
        state: what a file holds of an earlier run, by the names of ``tensors``.
    """

    def __init__(self, tuner: Any, model: Any, state: Mapping[str, Tensor]) -> None:
        self._tuner = tuner
        self._model = model
        self._config = tuner.peft_config["default"]
        self._own_total = None if self._config.total_step == STEPS_UNKNOWN else self._config.total_step
        self._kept: dict[str, list[bool]] = {}
        if self._config.target_r >= self._config.init_r:
            raise UserError("adalora has no rank to take away", found=f"init_r {self._config.init_r}",
                            expected=f"more than target_r {self._config.target_r}")
        self._restore(state)

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        allocator = self._tuner.rankallocator
        parameters = dict(self._model.named_parameters())
        for name, tensor in state.items():
            for suffix, attribute in _AVERAGES.items():
                if name.endswith(suffix):
                    key = name.removesuffix(suffix) + _ADAPTER
                    like = parameters[key]
                    getattr(allocator, attribute)[key] = tensor.to(like.device, copy=True)
                    allocator.ipt[key] = torch.zeros_like(like)
            if name.endswith(_KEPT):
                self._kept[name.removesuffix(_KEPT) + _ADAPTER] = tensor.bool().tolist()

    def after_step(self, step: int, total_steps: int) -> None:
        """Update the averages and cut what is over the budget of this step.

        Raises: UserError if the run is too short for the settings.
        """
        config = self._config
        config.total_step = self._own_total or total_steps
        if config.tinit >= config.total_step - config.tfinal:
            raise UserError("adalora has no steps to take ranks away in", found=f"{config.total_step} steps",
                            expected=f"more than tinit + tfinal = {config.tinit + config.tfinal}",
                            fix="a smaller tinit or tfinal")
        # with a pattern in its settings the package would write shortened tensors into files
        config.rank_pattern = self._kept or None
        self._follow_model()
        if step <= config.total_step - config.tfinal or self._kept:
            self._tuner.update_and_allocate(step)
        self._kept, config.rank_pattern = config.rank_pattern or {}, None

    def _follow_model(self) -> None:
        """A model moves to its device after the file was read, and the allocator's averages are not part of it."""
        parameters = dict(self._model.named_parameters())
        for attribute in _AVERAGES.values():
            averages = getattr(self._tuner.rankallocator, attribute)
            for key, tensor in averages.items():
                averages[key] = tensor.to(parameters[key].device)

    def tensors(self) -> dict[str, Tensor]:
        """What going on needs, by its names in files."""
        allocator = self._tuner.rankallocator
        found: dict[str, Tensor] = {}
        for suffix, attribute in _AVERAGES.items():
            for key, tensor in getattr(allocator, attribute).items():
                found[key.removesuffix(_ADAPTER) + suffix] = tensor
        for key, kept in self._kept.items():
            found[key.removesuffix(_ADAPTER) + _KEPT] = torch.tensor(kept, dtype=torch.uint8)
        return found
