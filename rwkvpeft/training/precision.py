"""How Lightning takes an optimizer step: a broken one is left out, and the model's own arithmetic stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.plugins.precision import MixedPrecision, Precision


class SoundSteps(Precision):
    """Takes a step only if the module finds its loss and gradients sound, see ``RwkvModule.sound``."""

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Forward, backward, the figures of the step, and the step."""
        result = closure()
        self._after_closure(model, optimizer)
        if model.sound:
            optimizer.step(**kwargs)
        return result


class ScaledGradients(MixedPrecision):
    """A gradient scaler without autocast: the model itself computes in fp16, from fp32 trained parameters. It leaves
    out steps that overflow."""

    def __init__(self, device_type: str) -> None:
        super().__init__("16-mixed", device_type)

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Run the forward pass as it is."""
        yield
