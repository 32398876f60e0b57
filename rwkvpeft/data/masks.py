"""Which tokens of a document are trained, found in its bytes.

Weights belong to tokens as targets: 1 where the model is to learn to produce the token. A token is trained if all of
its bytes are; one that shares a byte with a prompt or a marker is not. Token 0 ends a document and is trained exactly
when what it ends is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from rwkvpeft.data.template import answer_spans, think_spans
from rwkvpeft.data.tokenizer import END_OF_DOCUMENT, Tokenizer
from rwkvpeft.errors import UserError

Tokens = NDArray[np.integer]
Weights = NDArray[np.float32]
Spans = list[tuple[int, int]]

# tokens behind a cut that a mask looks at, so that a header or a marker on the cut is seen; a token has at least a byte
QA_LOOKAHEAD = 64


def qa_weights(tokens: Tokens, tokenizer: Tokenizer, last_only: bool = False) -> Weights:
    """Weights of the assistant's turns of one document, or of the last one, in the chat or the instruction layout.

    A turn is trained from the colon of ``Assistant:`` (or ``Response:``) up to and with the blank line before the
    next turn, or up to and with the final token 0. A document that ends in ``Assistant:`` has no answer to train.

    Args:
        tokens: (T,) one document. Where token 0 stands inside, each part is a document of its own.
        tokenizer: the one that made the tokens.
    Returns: (T,) fp32, 0 or 1.
    """
    unit = _unit(tokenizer)
    first = -1 if last_only else 0
    return _weights(tokens, tokenizer, lambda body: _scaled(answer_spans(_narrow(body, unit))[first:], unit))


def outside_think(tokens: Tokens, tokenizer: Tokenizer) -> Weights:
    """0 for what is thought in one document, 1 for the rest: what ``--mask_think`` multiplies weights by.

    Thoughts stand between ``<think>`` and ``</think>``; the tags are none. In a conversation an assistant has them, and
    where it does not close them they go on to the end of its turn; in another text to the end of that. Arguments and
    result are those of ``qa_weights``.
    """
    unit = _unit(tokenizer)
    inside = _weights(tokens, tokenizer, lambda body: _scaled(_thoughts(_narrow(body, unit)), unit))
    return np.float32(1) - inside


def _thoughts(document: bytes) -> Spans:
    if b"<think>" not in document:
        return []
    spoken = answer_spans(document) or [(0, len(document))]
    return [(start + one, start + two) for start, end in spoken for one, two in think_spans(document[start:end])]


def se_weights(tokens: Tokens, tokenizer: Tokenizer, start: str, end: str) -> Weights:
    """Weights of what stands between two marker texts, every time they occur in one document.

    Neither marker is trained. Where the second one does not follow, the trained part goes up to and with the final
    token 0. Arguments and result are those of ``qa_weights``.

    Raises: UserError if a marker is empty.
    """
    if not start or not end:
        raise UserError("--mask_id has an empty marker", found=[start, end], expected="two texts that are not empty")
    opening, closing = tokenizer.to_bytes(start), tokenizer.to_bytes(end)
    unit = _unit(tokenizer)
    return _weights(tokens, tokenizer, lambda body: list(_between(body, opening, closing, unit)))


def _weights(tokens: Tokens, tokenizer: Tokenizer, find_spans: Callable[[bytes], Spans]) -> Weights:
    weights = np.zeros(len(tokens), dtype=np.float32)
    if not len(tokens):
        return weights
    _require_known(tokens, tokenizer)
    # all documents are spelled at once: numpy costs more by the call than by the token
    text = tokenizer.spell(tokens)
    lengths = tokenizer.byte_lengths[tokens]
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    spans: Spans = []
    for begin, end in _documents(tokens, tokenizer):
        has_end = tokens[end - 1] == END_OF_DOCUMENT
        body = slice(int(starts[begin]), int(starts[end - 1] if has_end else ends[end - 1]))
        found = [(body.start + one, body.start + two) for one, two in find_spans(text[body]) if one < two]
        spans += found
        weights[end - 1] = bool(has_end and found and found[-1][1] == body.stop)
    if spans:
        span_starts, span_ends = np.array(spans).T
        # tokens from the first that starts in the span up to the last that ends in it
        firsts, stops = np.searchsorted(starts, span_starts), np.searchsorted(ends, span_ends, side="right")
        for first, stop in zip(firsts.tolist(), stops.tolist(), strict=True):
            weights[first:stop] = 1
    return weights


def _require_known(tokens: Tokens, tokenizer: Tokenizer) -> None:
    if int(tokens.max()) >= tokenizer.vocab_size:
        raise UserError(
            "the data were not made with this --tokenizer",
            found=f"token id {int(tokens.max())}",
            expected=f"ids below {tokenizer.vocab_size}, which {tokenizer.name} has",
        )


def _documents(tokens: Tokens, tokenizer: Tokenizer) -> Iterator[tuple[int, int]]:
    """Where documents begin and end, their final token 0 included."""
    # in two-byte encodings half of the bytes are 0, so there a 0 inside tells nothing
    inner = [] if tokenizer.end_token is None else (np.flatnonzero(tokens == END_OF_DOCUMENT) + 1).tolist()
    begin = 0
    for end in [*inner, len(tokens)]:
        if end > begin:
            yield begin, end
        begin = end


def _unit(tokenizer: Tokenizer) -> int:
    """Bytes of one ASCII character in the tokenizer's encoding: 1, or 2 for UTF-16."""
    return len("A".encode(tokenizer.encoding))


def _narrow(text: bytes, unit: int) -> bytes:
    """UTF-16 as one byte a unit, ASCII kept and everything else made 255; other text as it is."""
    if unit == 1:
        return text
    units = np.frombuffer(text[: len(text) // 2 * 2], dtype="<u2")
    return np.where(units < 128, units, 255).astype(np.uint8).tobytes()


def _scaled(spans: Spans, unit: int) -> Spans:
    return [(start * unit, end * unit) for start, end in spans]


def _between(text: bytes, opening: bytes, closing: bytes, unit: int) -> Iterator[tuple[int, int]]:
    position = 0
    while (found := _find(text, opening, position, unit)) >= 0:
        start = found + len(opening)
        end = _find(text, closing, start, unit)
        if end < 0:
            yield start, len(text)
            return
        yield start, end
        position = end + len(closing)


def _find(text: bytes, wanted: bytes, position: int, unit: int) -> int:
    """Offset of ``wanted`` at or after ``position``, on a character's border; -1 if it is not there."""
    found = text.find(wanted, position)
    while found >= 0 and found % unit:
        found = text.find(wanted, found + 1)
    return found
