"""What every source of documents can do, over one long run of tokens and where each document lies in it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from rwkvpeft.data.file_array import FileArray
from rwkvpeft.data.voices import Spoken
from rwkvpeft.errors import ContractError, UserError

Tokens = npt.NDArray[np.integer[Any]]

_CHECKED_AT_ONCE = 1 << 24


class TokenSource:
    """Documents of tokens; each ends with token 0.

    Attributes:
        name: the file, for messages.
        stream: (n_tokens,) all tokens end to end, in a small integer type; or what reads them from a file.
        starts: (len,) int64, where in ``stream`` each document begins.
        sizes: (len,) int32, tokens of each document, the final 0 included.
        notes: what people should know about how it is read.
    """

    name: str
    notes: tuple[str, ...] = ()
    stream: Tokens | FileArray
    starts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def n_tokens(self) -> int:
        """All tokens, final zeros included."""
        return len(self.stream)

    def read(self, index: int, most: int = sys.maxsize) -> Tokens:
        """The first ``most`` tokens of document ``index``, its final 0 included; read-only.

        Raises: IndexError; FileChanged if its file is not what it was.
        """
        start = int(self.starts[index])
        return self.stream[start : start + min(int(self.sizes[index]), most)]

    def kin(self) -> npt.NDArray[np.int64] | None:
        """(len,) which documents belong on one side of a split: those with the same number; None for each alone."""
        return None

    def label(self, index: int) -> str:
        """What people find document ``index`` by."""
        return f"{self.name}, document {index}"

    def is_replaced(self) -> bool:
        """Whether other tokens have the file's name by now, which this source does not read."""
        return isinstance(self.stream, FileArray) and self.stream.is_replaced

    def spoken(self, index: int) -> Spoken | None:
        """Who says each token of document ``index``; None where nothing but its text tells. Raises: IndexError."""
        return None

    def tokens(self, start: int, length: int) -> Tokens:
        """``length`` tokens of the stream from ``start``, across documents; read-only.

        Raises: ContractError if the range leaves the stream, FileChanged as ``read``.
        """
        if start < 0 or length < 0 or start + length > self.n_tokens:
            raise ContractError(f"tokens {start} to {start + length} of a stream of {self.n_tokens}")
        return self.stream[start : start + length]

    def check(self, vocab_size: int) -> None:
        """Refuse token ids the model does not have. Reads all tokens, unless their type cannot hold such an id.

        Raises: UserError naming the first such id, its document and its position there, both counted from 0.
        """
        kind = np.iinfo(self.stream.dtype)
        if kind.min >= 0 and kind.max < vocab_size:
            return
        for start in range(0, self.n_tokens, _CHECKED_AT_ONCE):
            part = self.stream[start : start + _CHECKED_AT_ONCE]
            if int(part.max()) >= vocab_size or int(part.min()) < 0:
                wrong = (part >= vocab_size) | (part < 0)
                self._refuse(start + int(np.argmax(wrong)), vocab_size)

    def _refuse(self, place: int, vocab_size: int) -> None:
        begins_before = np.flatnonzero(self.starts <= place)
        document = int(begins_before[np.argmax(self.starts[begins_before])])
        raise UserError(
            f"{self.name} holds a token id the model does not have: document {document}, position "
            f"{place - int(self.starts[document])}, counted from 0",
            found=int(self.stream[place : place + 1][0]),
            expected=f"0 to {vocab_size - 1}",
            fix="prepare the data with the model's tokenizer (--tokenizer)",
        )
