"""Texts that end an answer, seen while its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rwkvpeft.data.tokenizer import IncrementalDecoder, Tokenizer
from rwkvpeft.generation.generate import StopGate


class StopTexts:
    """Ends an answer where one of some texts is complete, and says what of the answer stands before it.

    An object is the ``stop`` of ``batched.decode``: called, it gives what watches one answer.

    Args:
        texts: none at all end nothing; empty ones are passed over.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._texts = texts

    def __call__(self, number: int = 0) -> Callable[[int], bool]:
        """What is told each token of one answer, whichever, and says whether a stop text is complete."""
        decoder = IncrementalDecoder(self._tokenizer)
        gate = StopGate(self._texts)

        def ends(token: int) -> bool:
            gate.push(decoder.push(token))
            return gate.stopped

        return ends

    def text(self, tokens: Iterable[int]) -> str:
        """What is shown of an answer: the text up to the first stop text. Token ids that spell nothing are none."""
        gate = StopGate(self._texts)
        return gate.push(self._tokenizer.decode(tokens)) + gate.finish()
