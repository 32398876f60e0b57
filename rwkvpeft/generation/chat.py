"""A dialogue in the layout of the RWKV World models; only the state is kept between turns."""

from __future__ import annotations

from collections.abc import Iterator

from rwkvpeft.data.template import SEPARATOR, chat_prompt
from rwkvpeft.generation.generate import TextGenerator
from rwkvpeft.generation.sampling import Sampler, SamplingConfig
from rwkvpeft.models.state import RecurrentState

STOP = (f"{SEPARATOR}User:", f"{SEPARATOR}System:")


class Chat:
    """One dialogue.

    Args:
        max_tokens: longest answer.
    """

    def __init__(self, generator: TextGenerator, sampling: SamplingConfig, *, max_tokens: int) -> None:
        self._generator = generator
        self._sampler = Sampler(sampling)
        self._max_tokens = max_tokens
        self._state: RecurrentState | None = None

    def reset(self) -> None:
        """Forget all turns."""
        self._state = None

    def answer(self, question: str) -> Iterator[str]:
        """Pieces of the answer. Closing the iterator early keeps what was said so far as the answer."""
        prompt = chat_prompt(question)
        pieces: list[str] = []
        # penalties count within one answer
        self._sampler.forget()
        try:
            stream = self._generator.stream(
                prompt, self._sampler, max_tokens=self._max_tokens, stop=STOP, state=self._state
            )
            for piece in stream:
                pieces.append(piece)
                yield piece
        finally:
            # the turn is read again as a whole: the tokens of an answer cut at a stop text may reach beyond it
            turn = prompt + "".join(pieces).rstrip() + SEPARATOR
            self._state = self._generator.read(self._generator.encode(turn), self._state)[1]
