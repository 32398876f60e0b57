"""Samples as a run will see them, with the trained tokens marked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from rwkvpeft.data.row import Row, apart
from rwkvpeft.data.rows import RowDataset
from rwkvpeft.data.tokenizer import END_OF_DOCUMENT, Tokenizer, load_tokenizer

_BRACKETS = ("⟦", "⟧")
_GREEN = ("\x1b[32m", "\x1b[0m")
_END_MARK = "<end>"


def preview(dataset: RowDataset, n: int, tokenizer: Tokenizer | None = None, color: bool = False) -> str:
    """The first ``n`` samples of a run, then the totals of the data.

    Trained tokens stand in green if ``color``, otherwise between ⟦ and ⟧; ``<end>`` is token 0. Of a row, the document
    is shown and not the padding behind it; each document of a packed row begins a line.

    Args:
        n: samples to show; at most one pass is shown.
        tokenizer: the one that made the tokens; None takes the one the data were opened with.
    """
    tokenizer = tokenizer or load_tokenizer(dataset.tokenizer)
    marks = _GREEN if color else _BRACKETS
    samples = [
        _sample(dataset, position, tokenizer, marks) for position in range(min(n, len(dataset)))
    ]
    return "\n\n".join([*samples, dataset.report().render()])


def _sample(dataset: RowDataset, position: int, tokenizer: Tokenizer, marks: tuple[str, str]) -> str:
    drawn = dataset.draw(position)
    row = drawn.row
    trained = int((row.weights > 0).sum())
    heading = f"--- sample {position}: {drawn.name}, {drawn.length} tokens, {trained} trained"
    if drawn.is_cut:
        heading += ", its end is cut off"
    documents = [row] if row.lengths is None else list(apart(row))
    # a packed document has one token more than inputs: its last one is a label alone
    lengths = [drawn.length] if row.lengths is None else [length + 1 for length in row.lengths]
    texts = [
        "".join(_pieces(document, length, tokenizer, marks))
        for document, length in zip(documents, lengths, strict=True)
    ]
    return "\n".join([f"{heading} ---", *texts])


def _pieces(row: Row, length: int, tokenizer: Tokenizer, marks: tuple[str, str]) -> Iterator[str]:
    """The first ``length`` tokens as text, cut where training begins and ends."""
    tokens = [int(row.input_ids[0]), *row.labels.tolist()][:length]
    # the first token of a row is never a target
    is_trained = [False, *(row.weights > 0).tolist()]
    for trained, group in itertools.groupby(zip(tokens, is_trained, strict=False), key=lambda pair: pair[1]):
        text = _text([token for token, _ in group], tokenizer)
        yield f"{marks[0]}{text}{marks[1]}" if trained else text


def _text(tokens: list[int], tokenizer: Tokenizer) -> str:
    if tokenizer.end_token is None:
        return tokenizer.decode(tokens)
    return _END_MARK.join(tokenizer.decode(document) for document in _split(tokens))


def _split(tokens: list[int]) -> list[list[int]]:
    """The runs of tokens between zeros."""
    runs: list[list[int]] = [[]]
    for token in tokens:
        if token == END_OF_DOCUMENT:
            runs.append([])
        else:
            runs[-1].append(token)
    return runs
