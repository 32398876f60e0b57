"""``--loss_mask``: the rule that gives every token of a document its weight as a target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.jsonl import RecordSource
from rwkvpeft.data.masks import QA_LOOKAHEAD, Tokens, Weights, qa_weights, se_weights
from rwkvpeft.data.source import TokenSource
from rwkvpeft.data.tokenizer import END_OF_DOCUMENT, load_tokenizer
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
        return [int(self.weights(source, index, length)[1:].sum()) for index, length in enumerate(lengths)]


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

    def weights(self, source: TokenSource, document: int, length: int) -> Weights:
        """1 where the text tells to train."""
        return self.find(source.read(document)[: length + self.lookahead])[:length]

    def count(self, source: TokenSource, lengths: Sequence[int]) -> list[int]:
        """Counts of many documents at once, which takes a fraction of the time of one by one."""
        if load_tokenizer(self.tokenizer).encoding != "utf-8":
            return super().count(source, lengths)
        counts: list[int] = []
        for begin in range(0, len(lengths), _COUNTED_AT_ONCE):
            counts += self._count_some(source, begin, lengths[begin : begin + _COUNTED_AT_ONCE])
        return counts

    def _count_some(self, source: TokenSource, begin: int, lengths: Sequence[int]) -> list[int]:
        end = np.array([END_OF_DOCUMENT])
        pieces: list[Tokens] = []
        for document, length in enumerate(lengths, start=begin):
            # an end is added behind each, for a document that is cut has none; a second one changes nothing
            pieces += [source.read(document)[: length + self.lookahead], end]
        before = np.concatenate([[0], np.cumsum(self.find(np.concatenate(pieces)), dtype=np.int64)])
        starts = np.cumsum([0, *(len(piece) for piece in pieces)])[:-1:2]
        stops = starts + np.asarray(lengths)
        return (before[stops] - before[np.minimum(starts + 1, stops)]).tolist()


class AnswersOnly(TextRule):
    """``qa``: what an assistant says, known from the roles of a record or else found in the text."""

    lookahead = QA_LOOKAHEAD

    def __init__(self, tokenizer: str) -> None:
        self.tokenizer = tokenizer

    def find(self, tokens: Tokens) -> Weights:
        """1 for answers, the separators behind them and the end of a document that they end."""
        return qa_weights(tokens, load_tokenizer(self.tokenizer))

    def weights(self, source: TokenSource, document: int, length: int) -> Weights:
        """As ``find``, from the roles where they are known."""
        if isinstance(source, RecordSource):
            return source.trained(document)[:length].astype(np.float32)
        return super().weights(source, document, length)

    def count(self, source: TokenSource, lengths: Sequence[int]) -> list[int]:
        """As ``weights``, document by document where the roles are known."""
        if isinstance(source, RecordSource):
            return MaskRule.count(self, source, lengths)
        return super().count(source, lengths)


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
