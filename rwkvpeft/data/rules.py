"""``--loss_mask``: the rule that gives every token of a document its weight as a target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache

import numpy as np

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.jsonl import JsonlSource
from rwkvpeft.data.masks import QA_LOOKAHEAD, Weights, qa_weights, se_weights
from rwkvpeft.data.source import TokenSource
from rwkvpeft.data.tokenizer import Tokenizer, load_tokenizer
from rwkvpeft.errors import UserError


class MaskRule(ABC):
    """Weights of a document's tokens. Cheap to pickle: a tokenizer is known by name and loaded where it is used."""

    trains_everything = False

    @abstractmethod
    def weights(self, source: TokenSource, document: int, length: int) -> Weights:
        """(length,) fp32, weights of the first ``length`` tokens of a document that has at least as many."""


class EveryToken(MaskRule):
    """``none`` and ``pad``: whatever is not padding."""

    trains_everything = True

    def weights(self, source: TokenSource, document: int, length: int) -> Weights:
        """Ones."""
        return np.ones(length, dtype=np.float32)


class AnswersOnly(MaskRule):
    """``qa``: what an assistant says, known from the roles of a record or else found in the text."""

    def __init__(self, tokenizer: str) -> None:
        self.tokenizer = tokenizer

    def weights(self, source: TokenSource, document: int, length: int) -> Weights:
        """1 for answers, the separators behind them and the end of a document that they end."""
        if isinstance(source, JsonlSource):
            return source.trained(document)[:length].astype(np.float32)
        tokens = source.read(document)[: length + QA_LOOKAHEAD]
        return qa_weights(tokens, shared_tokenizer(self.tokenizer))[:length]


class BetweenMarkers(MaskRule):
    """``se``: what stands between two texts."""

    def __init__(self, tokenizer: str, start: str, end: str) -> None:
        self.tokenizer = tokenizer
        self.start = start
        self.end = end

    def weights(self, source: TokenSource, document: int, length: int) -> Weights:
        """1 between the markers."""
        tokenizer = shared_tokenizer(self.tokenizer)
        # a token has at least a byte, so a marker that begins before the cut ends within as many tokens
        lookahead = max(len(tokenizer.to_bytes(marker)) for marker in (self.start, self.end))
        tokens = source.read(document)[: length + lookahead]
        return se_weights(tokens, tokenizer, self.start, self.end)[:length]


def mask_rule(config: DataConfig) -> MaskRule:
    """The rule of ``--loss_mask``. Raises: UserError for ``se`` without two marker texts."""
    if config.loss_mask == "qa":
        return AnswersOnly(config.tokenizer)
    if config.loss_mask == "se":
        markers = [config.mask_id.get(name) for name in ("mask0", "mask1")]
        if not all(isinstance(marker, str) and marker for marker in markers):
            raise UserError(
                "--loss_mask se needs two marker texts",
                found=f"--mask_id {config.mask_id}",
                expected='{"mask0": "text before", "mask1": "text behind"}',
            )
        return BetweenMarkers(config.tokenizer, config.mask_id["mask0"], config.mask_id["mask1"])
    return EveryToken()


@lru_cache(maxsize=2)
def shared_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name; its tables are read once in a process."""
    return load_tokenizer(name)
