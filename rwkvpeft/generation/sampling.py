"""From logits to the next token.

Source: the ``rwkv`` package, ``utils.PIPELINE``: penalties on the logits, then the nucleus cut on untempered
probabilities, then the temperature.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rwkvpeft.errors import UserError


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn. Raises UserError for a value out of range.

    ``temperature`` 0 takes the likeliest token. ``top_p`` keeps the likeliest tokens that together have this
    probability, ``top_k`` at most so many (0: no limit). ``presence_penalty`` is taken from the logit of every token
    drawn before, ``frequency_penalty`` for each time it was drawn; a count fades by ``penalty_decay`` per token.
    ``seed`` -1 draws a new one.
    """

    temperature: float = 1.0
    top_p: float = 0.5
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 0.996
    seed: int = -1

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_p": (0 <= self.top_p <= 1, "0 to 1"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "penalty_decay": (0 <= self.penalty_decay <= 1, "0 to 1"),
        }
        for name, (fits, expected) in ranges.items():
            if not fits:
                raise UserError(f"--{name} is out of range", found=getattr(self, name), expected=expected)


class Sampler:
    """Draws tokens one after another and remembers them for the penalties."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self._counts: dict[int, float] = {}
        self._generator = torch.Generator()
        if config.seed < 0:
            self._generator.seed()
        else:
            self._generator.manual_seed(config.seed)

    def draw(self, logits: Tensor) -> int:
        """The next token.

        Args:
            logits: (V,) of any dtype and device.
        Raises: UserError if all logits are NaN or infinite.
        """
        logits = self._penalised(logits.detach().float().cpu())
        if not logits.isfinite().any():
            raise UserError("the model's logits are not finite", fix="--precision fp32; or the adapter has diverged")
        token = self._choose(logits.nan_to_num(nan=-torch.inf, posinf=torch.finfo(torch.float32).max))
        self._remember(token)
        return token

    def forget(self) -> None:
        """Start the penalties anew; the random numbers go on."""
        self._counts.clear()

    def _penalised(self, logits: Tensor) -> Tensor:
        config = self.config
        if not self._counts or not (config.presence_penalty or config.frequency_penalty):
            return logits
        ids = torch.tensor(list(self._counts))
        counts = torch.tensor(list(self._counts.values()))
        return logits.index_add(0, ids, -(config.presence_penalty + config.frequency_penalty * counts))

    def _choose(self, logits: Tensor) -> int:
        config = self.config
        if config.temperature == 0 or config.top_k == 1:
            return int(logits.argmax())
        probabilities = torch.softmax(logits, dim=0)
        ordered = probabilities.sort(descending=True).values
        kept = int((ordered.cumsum(0) < config.top_p).sum()) + 1
        if config.top_k:
            kept = min(kept, config.top_k)
        kept = min(kept, len(ordered))
        probabilities = probabilities.where(probabilities >= ordered[kept - 1], 0)
        # relative to the largest, so that a small temperature does not underflow everywhere
        probabilities = (probabilities / probabilities.max()) ** (1 / config.temperature)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def _remember(self, token: int) -> None:
        for known in self._counts:
            self._counts[known] *= self.config.penalty_decay
        self._counts[token] = self._counts.get(token, 0.0) + 1
