"""Who says each token of a document: what ``--loss_mask`` and ``--mask_think`` choose by.

A document has few kinds of voices, so a token holds an index of one byte into a table of them, and the settings of a
run turn the table, not the tokens, into weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rwkvpeft.errors import UserError

_MOST_VOICES = 256


class Voice(NamedTuple):
    """What is known of a piece of text.

    Attributes:
        weight: of its tokens under ``--loss_mask qa``; 0 for what no assistant says.
        is_answer: an assistant says it, though it may weigh nothing.
        is_last: it belongs to the last assistant's turn of its document.
        is_think: it stands between ``<think>`` and ``</think>``.
    """

    weight: float = 0.0
    is_answer: bool = False
    is_last: bool = False
    is_think: bool = False


PROMPT = Voice()


class Spoken(NamedTuple):
    """The voices of a document's tokens: ``codes`` (T,) uint8, indices into ``voices``."""

    codes: npt.NDArray[np.uint8]
    voices: Sequence[Voice]

    def answers(self, last_only: bool = False) -> npt.NDArray[np.float32]:
        """(T,) fp32, the weights of all assistants' turns, or of the last one."""
        table = [voice.weight if voice.is_last or not last_only else 0.0 for voice in self.voices]
        return np.array(table, dtype=np.float32)[self.codes]

    def outside_think(self) -> npt.NDArray[np.float32]:
        """(T,) fp32, 0 for what is thought and 1 for the rest."""
        return np.array([not voice.is_think for voice in self.voices], dtype=np.float32)[self.codes]


class VoiceTable:
    """Gives every voice its number, in the order in which they come up."""

    def __init__(self) -> None:
        self._codes: dict[Voice, int] = {PROMPT: 0}

    @property
    def voices(self) -> tuple[Voice, ...]:
        """All voices so far, by number."""
        return tuple(self._codes)

    def code(self, voice: Voice) -> int:
        """The number of a voice. Raises: UserError if there are more than a byte can tell apart."""
        code = self._codes.get(voice)
        if code is not None:
            return code
        code = len(self._codes)
        if code == _MOST_VOICES:
            raise UserError(
                'too many different "weight" values in one data set',
                found=f"{voice.weight:g} and {_MOST_VOICES} voices before it",
                fix="round the weights, for instance to one decimal",
            )
        self._codes[voice] = code
        return code

    def translation(self, voices: Iterable[Voice]) -> npt.NDArray[np.uint8]:
        """For each number in another table, the number here. Raises: UserError as ``code`` does."""
        return np.array([self.code(voice) for voice in voices], dtype=np.uint8)
