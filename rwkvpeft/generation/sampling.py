"""From logits to the next token, of one text or of many side by side.

Letters: B rows, V vocabulary, K candidates. Source: the ``rwkv`` package, ``utils.PIPELINE``: penalties on the logits,
then the nucleus cut on untempered probabilities, then the temperature.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvpeft.data.sampling import mix
from rwkvpeft.errors import UserError

_FEW = 256
"""Most often the nucleus has fewer tokens; to find these takes a small part of the time of sorting all."""
_SEED_BITS = 31
# in 32 bits logits stay finite numbers, and different ones, when they are divided by these, and less these
_LEAST, _MOST = 1e-6, 1e6
_DRAW_BITS = 48


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
            "temperature": (self.temperature == 0 or _LEAST <= self.temperature <= _MOST,
                            f"0, or {_LEAST:g} to {_MOST:g}"),
            "top_p": (0 <= self.top_p <= 1, "0 to 1"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "presence_penalty": (-_MOST <= self.presence_penalty <= _MOST, f"{-_MOST:g} to {_MOST:g}"),
            "frequency_penalty": (-_MOST <= self.frequency_penalty <= _MOST, f"{-_MOST:g} to {_MOST:g}"),
            "penalty_decay": (0 <= self.penalty_decay <= 1, "0 to 1"),
        }
        for name, (fits, expected) in ranges.items():
            if not fits:
                raise UserError(f"--{name} is out of range", found=getattr(self, name), expected=expected)


class Drawn(NamedTuple):
    """Of each row the token, (B,) int64 on the host, and its log-probability, (B,) float32 there.

    The log-probability is that of the model at the sampling temperature, at 1 where the likeliest token is taken:
    without penalties, and before anything is cut off.
    """

    tokens: Tensor
    logprobs: Tensor


class RowSampler:
    """Draws the next token of each of some rows; every row has random numbers and penalties of its own.

    The n-th number of a row depends on its seed and n alone, so a row's tokens do not depend on the other rows.

    Args:
        seeds: one for each row, any integers; ``config.seed`` is not read.
    """

    def __init__(self, config: SamplingConfig, seeds: Sequence[int]) -> None:
        self.config = config
        self._seeds = list(seeds)
        self._drawn = [0] * len(self._seeds)
        self._penalties: _Penalties | None = None

    def draw(self, logits: Tensor) -> Drawn:
        """The next token of each row.

        Args:
            logits: (B, V) of any dtype and device; left as they are.
        Raises: UserError if all logits of a row are NaN or infinite.
        """
        # where there are no numbers of 64 bits the host draws
        raw = logits.detach().to("cpu" if logits.device.type == "mps" else logits.device, torch.float32)
        if not raw.isfinite().any(1).all():
            raise UserError("the model's logits are not finite", fix="--precision fp32; or the adapter has diverged")
        raw = raw.nan_to_num(nan=-torch.inf, posinf=torch.finfo(torch.float32).max, neginf=-torch.inf)
        if self.config.presence_penalty or self.config.frequency_penalty:
            if self._penalties is None:
                self._penalties = _Penalties(self.config, raw)
            tokens = self._choose(self._penalties.taken_from(raw))
            self._penalties.remember(tokens)
        else:
            tokens = self._choose(raw)
        self._drawn = [count + 1 for count in self._drawn]
        return Drawn(tokens.cpu(), self._logprobs(raw, tokens).cpu())

    def restart(self, row: int, seed: int) -> None:
        """Let another text begin in a row."""
        self._seeds[row], self._drawn[row] = seed, 0
        if self._penalties is not None:
            self._penalties.forget(row)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        self._seeds = [self._seeds[row] for row in rows]
        self._drawn = [self._drawn[row] for row in rows]
        if self._penalties is not None:
            self._penalties.select(rows)

    def forget(self) -> None:
        """Start the penalties of all rows anew; the random numbers go on."""
        self._penalties = None

    def _choose(self, logits: Tensor) -> Tensor:
        """Tokens (B,) by the inverse of the distribution function, taken in the order of the vocabulary."""
        config = self.config
        if config.temperature == 0 or config.top_k == 1:
            return logits.argmax(1)
        ids, kept = self._candidates(logits)
        # relative to the largest, so that a small temperature does not underflow everywhere
        weights = ((kept - kept.amax(1, keepdim=True)) / config.temperature).exp()
        # in 32 bits the sums over a vocabulary lose the unlikely tokens
        sums = weights.cumsum(1, dtype=torch.float64)
        places = torch.searchsorted(sums, self._uniforms(logits.device) * sums[:, -1:], right=True)
        return (places if ids is None else ids.gather(1, places))[:, 0]

    def _uniforms(self, device: torch.device) -> Tensor:
        """(B, 1) float64 in [0, 1)."""
        drawn = zip(self._seeds, self._drawn, strict=True)
        numbers = [(mix(seed, count) >> 64 - _DRAW_BITS) / (1 << _DRAW_BITS) for seed, count in drawn]
        return torch.tensor(numbers, dtype=torch.float64, device=device)[:, None]

    def _candidates(self, logits: Tensor) -> tuple[Tensor | None, Tensor]:
        """Ids (B, K) and logits (B, K), -inf for what is cut off; no ids where the candidates are the vocabulary."""
        config, size = self.config, logits.shape[1]
        most = min(config.top_k or size, size)
        if config.top_p == 1 and most == size:
            return None, logits
        totals = logits.logsumexp(1, keepdim=True)
        few = min(most + 1, _FEW)
        if few < size:
            ordered, ids = logits.topk(few, dim=1)
            last = self._last(ordered, totals, most)
            least = ordered.gather(1, last.clamp(max=few - 1))
            # tokens as likely as the last one stay too, and some of them may be beyond these few
            if bool(((last < few) & (least > ordered[:, -1:])).all()):
                ids = ids.sort(1).values
                kept = logits.gather(1, ids)
                return ids, kept.masked_fill(kept < least, -torch.inf)
        ordered = logits.sort(1, descending=True).values
        least = ordered.gather(1, self._last(ordered, totals, most))
        return None, logits.masked_fill(logits < least, -torch.inf)

    def _last(self, ordered: Tensor, totals: Tensor, most: int) -> Tensor:
        """Places (B, 1) of the last tokens to keep among the likeliest, (B, K); K where it lies beyond them."""
        before = (ordered - totals).exp().cumsum(1) < self.config.top_p
        return before.sum(1, keepdim=True).clamp(max=most - 1)

    def _logprobs(self, logits: Tensor, tokens: Tensor) -> Tensor:
        scaled = (logits - logits.amax(1, keepdim=True)) / (self.config.temperature or 1.0)
        return scaled.gather(1, tokens[:, None])[:, 0] - scaled.logsumexp(1)


class _Penalties:
    """What each row has drawn: (B, V) whether, and how often, fading."""

    def __init__(self, config: SamplingConfig, like: Tensor) -> None:
        self._config = config
        self._seen = torch.zeros_like(like, dtype=torch.bool)
        self._counts = torch.zeros_like(like)

    def taken_from(self, logits: Tensor) -> Tensor:
        """The logits less their penalties."""
        lower = logits - self._config.presence_penalty - self._config.frequency_penalty * self._counts
        return torch.where(self._seen, lower, logits)

    def remember(self, tokens: Tensor) -> None:
        """Count one more token (B,) in each row."""
        self._counts *= self._config.penalty_decay
        self._counts.scatter_add_(1, tokens[:, None], torch.ones_like(self._counts[:, :1]))
        self._seen.scatter_(1, tokens[:, None], True)

    def forget(self, row: int) -> None:
        """A row has drawn nothing."""
        self._seen[row], self._counts[row] = False, 0.0

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        self._seen, self._counts = self._seen[list(rows)], self._counts[list(rows)]


class Sampler:
    """Draws tokens of one text, one after another, and remembers them for the penalties."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self._rows = RowSampler(config, [new_seed() if config.seed < 0 else config.seed])

    def draw(self, logits: Tensor) -> int:
        """The next token.

        Args:
            logits: (V,) of any dtype and device.
        Raises: UserError if all logits are NaN or infinite.
        """
        return int(self._rows.draw(logits[None]).tokens)

    def forget(self) -> None:
        """Start the penalties anew; the random numbers go on."""
        self._rows.forget()


def new_seed() -> int:
    """A seed nobody asked for."""
    return secrets.randbits(_SEED_BITS)
