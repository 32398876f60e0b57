"""``--loss_mask``: the rule that gives every token of a document its weight as a target."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.masks import QA_LOOKAHEAD, Tokens, Weights, outside_think, qa_weights, se_weights
from rwkvpeft.data.source import TokenSource
from rwkvpeft.data.tokenizer import END_OF_DOCUMENT, load_tokenizer
from rwkvpeft.data.voices import Spoken
from rwkvpeft.errors import UserError

_COUNTED_AT_ONCE = 256


class MaskRule(ABC):
    """Weights of a document's tokens. Cheap to pickle: a tokenizer is known by name and loaded where it is used."""

    trains_everything = False

    @abstractmethod
    def weights(self, source: TokenSource, document: int, length: int) -> Weights:
        """(length,) fp32, weights of the first ``length`` tokens of a document that has at least as many."""

    def count(self, source: TokenSource, lengths: Sequence[int]) -> list[int]:
        """For the first ``len(lengths)`` documents, the trained ones of the first tokens behind the very first."""
        return [
            int(np.count_nonzero(self.weights(source, index, length)[1:])) for index, length in enumerate(lengths)
        ]


class EveryToken(MaskRule):
    """``none`` and ``pad``: whatever is not padding."""

    trains_everything = True

    def weights(self, source: TokenSource, document: int, length: int) -> Weights:
        """Ones."""
        return np.ones(length, dtype=np.float32)


class TextRule(MaskRule):
    """A rule that reads the text of a document, a little beyond the cut."""

    tokenizer: str
    lookahead: int

    @abstractmethod
    def find(self, tokens: Tokens) -> Weights:
        """(T,) weights of one document or, in UTF-8, of several that each end in 0."""

    def known(self, spoken: Spoken) -> Weights | None:
        """(T,) weights of a document whose voices are known; None for a rule that goes by the text all the same."""
        return None

    def weights(self, source: TokenSource, document: int, length: int) -> Weights:
        """What the voices of the document tell, otherwise its text."""
        known = self._known(source, document)
        return self.find(source.read(document, length + self.lookahead))[:length] if known is None else known[:length]

    def count(self, source: TokenSource, lengths: Sequence[int]) -> list[int]:
        """Counts of many documents at once, which takes a fraction of the time of one by one."""
        if load_tokenizer(self.tokenizer).end_token is None:
            return super().count(source, lengths)
        counts: list[int] = []
        for begin in range(0, len(lengths), _COUNTED_AT_ONCE):
            counts += self._count_some(source, begin, lengths[begin : begin + _COUNTED_AT_ONCE])
        return counts

    def _known(self, source: TokenSource, document: int) -> Weights | None:
        spoken = source.spoken(document)
        return None if spoken is None else self.known(spoken)

    def _count_some(self, source: TokenSource, begin: int, lengths: Sequence[int]) -> list[int]:
        counts, end = np.zeros(len(lengths), dtype=np.int64), np.array([END_OF_DOCUMENT])
        unknown: list[int] = []
        pieces: list[Tokens] = []
        for number, length in enumerate(lengths):
            known = self._known(source, begin + number)
            if known is not None:
                counts[number] = np.count_nonzero(known[1:length])
                continue
            unknown.append(number)
            # an end is added behind each, for a document that is cut has none; a second one changes nothing
            pieces += [source.read(begin + number, length + self.lookahead), end]
        if unknown:
            before = np.concatenate([[0], np.cumsum(self.find(np.concatenate(pieces)) != 0)])
            starts = np.cumsum([0, *(len(piece) for piece in pieces)])[:-1:2]
            stops = starts + np.asarray(lengths)[unknown]
            counts[unknown] = before[stops] - before[np.minimum(starts + 1, stops)]
        return counts.tolist()


class AnswersOnly(TextRule):
    """``qa`` and ``last``: what an assistant says, known from the roles of a record or else found in the text."""

    def __init__(self, tokenizer: str, last_only: bool = False) -> None:
        self.tokenizer = tokenizer
        self.last_only = last_only
        # which answer is the last is known at the end of a document
        self.lookahead = sys.maxsize // 2 if last_only else QA_LOOKAHEAD

    def find(self, tokens: Tokens) -> Weights:
        """1 for answers, the separators behind them and the end of a document that they end."""
        return qa_weights(tokens, load_tokenizer(self.tokenizer), self.last_only)

    def known(self, spoken: Spoken) -> Weights:
        """As ``find``, with the weights that a record gives its turns."""
        return spoken.answers(self.last_only)


class BetweenMarkers(TextRule):
    """``se``: what stands between two texts."""

    def __init__(self, tokenizer: str, start: str, end: str) -> None:
        self.tokenizer = tokenizer
        self.start = start
        self.end = end
        # a token has at least a byte, so a marker that begins before the cut ends within as many tokens
        self.lookahead = max(len(load_tokenizer(tokenizer).to_bytes(marker)) for marker in (start, end))

    def find(self, tokens: Tokens) -> Weights:
        """1 between the markers."""
        return se_weights(tokens, load_tokenizer(self.tokenizer), self.start, self.end)


class WithoutThoughts(TextRule):
    """``--mask_think``: another rule, and nothing of what stands between think tags."""

    def __init__(self, tokenizer: str, rule: TextRule | None) -> None:
        """Args: ``rule``: what is trained besides; None: everything."""
        self.tokenizer = tokenizer
        self.rule = rule
        self.lookahead = max(QA_LOOKAHEAD, rule.lookahead if rule else 0)

    def find(self, tokens: Tokens) -> Weights:
        """The other rule's weights outside of thoughts."""
        outside = outside_think(tokens, load_tokenizer(self.tokenizer))
        return self.rule.find(tokens) * outside if self.rule else outside

    def known(self, spoken: Spoken) -> Weights | None:
        """As ``find``; None if the other rule goes by the text."""
        if self.rule is None:
            return spoken.outside_think()
        weights = self.rule.known(spoken)
        return None if weights is None else weights * spoken.outside_think()


def mask_rule(config: DataConfig) -> MaskRule:
    """The rule of ``--loss_mask`` and ``--mask_think``. Raises: UserError for ``se`` without two marker texts."""
    rule = _text_rule(config)
    if config.mask_think:
        return WithoutThoughts(config.tokenizer, rule)
    return rule or EveryToken()


def _text_rule(config: DataConfig) -> TextRule | None:
    if config.loss_mask in ("qa", "last"):
        return AnswersOnly(config.tokenizer, last_only=config.loss_mask == "last")
    if config.loss_mask == "se":
        markers = [config.mask_id.get(name) for name in ("mask0", "mask1")]
        if not all(isinstance(marker, str) and marker for marker in markers):
            raise UserError(
                "--loss_mask se needs two marker texts",
                found=f"--mask_id {config.mask_id}",
                expected='{"mask0": "text before", "mask1": "text behind"}',
            )
        return BetweenMarkers(config.tokenizer, config.mask_id["mask0"], config.mask_id["mask1"])
    return None
