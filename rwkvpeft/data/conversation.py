"""Records become documents: text, and who says which part of it.

``segments`` is the one way from a record of any origin, a line of jsonl or a row of a table, to a document. The layouts
of records are those of ``layouts``, the text that is written is that of ``template``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rwkvpeft.data.layouts import RecordError, as_text, read_turns
from rwkvpeft.data.template import Segment, answer_spans, render, split_text
from rwkvpeft.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from rwkvpeft.data.voices import VoiceTable
from rwkvpeft.errors import UserError

__all__ = ["RecordError", "Segment", "answer_spans", "document_text", "require_end", "segments", "tokenise"]


def document_text(record: Mapping[str, Any], text_key: str = "text") -> str:
    """The whole document of a record, as it is tokenised. Raises RecordError as ``segments`` does."""
    if text_key in record:
        return as_text(record[text_key], f'field "{text_key}"')
    return "".join(segment.text for segment in segments(record, text_key))


def segments(record: Mapping[str, Any], text_key: str = "text") -> list[Segment]:
    """The document of a record, in pieces by who says them.

    Args:
        record: a mapping of names to values in one of ``layouts.LAYOUTS``; a value None is as good as none. Where it
            has the field ``text_key``, that text is the document as it is, and its turns are found in the text.
        text_key: the field that holds a whole document.
    Returns: pieces which, joined, are the document without the token that ends it. Each has the voice that says it;
        ``Segment.trained`` is what ``--loss_mask qa`` goes by.
    Raises:
        RecordError: no known layout or two of them, a missing or empty part, an unknown role, a value that is not
            text. Its message is one line, to be given the file and the line.
    """
    if text_key in record:
        return split_text(as_text(record[text_key], f'field "{text_key}"'))
    try:
        return render(read_turns(record, text_key))
    except RecursionError as reason:
        # to be written as JSON takes more of the stack than to be read
        raise RecordError("nested too deeply to be read") from reason


def require_end(tokenizer: Tokenizer) -> None:
    """Refuse a vocabulary of characters, in which nothing is left to end a document with. Raises: UserError."""
    # in utf-16le, where 0 is also half of a letter, the last 0 still tells the end
    if tokenizer.end_token is None and tokenizer.encoding == "utf-8":
        raise UserError(
            f"--tokenizer {tokenizer.name} has a token for each character and none for the end of a document",
            fix="--data_type utf-8 for one long text, or --tokenizer world",
        )


def tokenise(
    parts: list[Segment], tokenizer: Tokenizer, table: VoiceTable
) -> tuple[list[int], npt.NDArray[np.uint8]]:
    """A document's tokens, the final 0 included, and for each of them the number of its voice in ``table``.

    The joined text is tokenised as one, so that the tokens are those a model meets when it reads the text. A token
    that lies across a border belongs to the part it starts in; the final 0 belongs to the last part.
    Raises: UserError if the text cannot be encoded, or the voices are too many for the table.
    """
    tokens = tokenizer.encode("".join(part.text for part in parts))
    lengths = tokenizer.byte_lengths[np.array(tokens, dtype=np.int64)]
    starts = np.cumsum(lengths) - lengths
    part_ends = np.cumsum([len(tokenizer.to_bytes(part.text)) for part in parts])
    codes = np.array([table.code(part.voice) for part in parts], dtype=np.uint8)
    spoken = np.zeros(len(tokens) + 1, dtype=np.uint8)
    if parts:
        spoken[:-1] = codes[np.searchsorted(part_ends, starts, side="right")]
        spoken[-1] = codes[-1]
    tokens.append(END_OF_DOCUMENT)
    return tokens, spoken
