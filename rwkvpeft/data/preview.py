"""Samples as a run will see them, with the trained tokens marked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from rwkvpeft.data.pair_batches import PairCollator
from rwkvpeft.data.prompt_rows import PromptCollator
from rwkvpeft.data.row import Row, apart
from rwkvpeft.data.rows import RowDataset, Sample
from rwkvpeft.data.tokenizer import END_OF_DOCUMENT, Tokenizer, load_tokenizer

_BRACKETS = ("⟦", "⟧")
_GREEN = ("\x1b[32m", "\x1b[0m")
_END_MARK = "<end>"
_NAMES = ("chosen", "rejected", "mismatched")


def preview(dataset: RowDataset, n: int, tokenizer: Tokenizer | None = None, color: bool = False) -> str:
    """The first ``n`` samples of a run, then the totals of the data.

    Trained tokens stand in green if ``color``, otherwise between ⟦ and ⟧; ``<end>`` is token 0. Of a row, the document
    is shown and not the padding behind it; each document of a packed row begins a line. Of preferences, the prompt is
    shown once and then what comes behind it in each answer.

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
    return "\n".join([f"{heading} ---", *_texts(dataset, drawn, tokenizer, marks)])


def _texts(dataset: RowDataset, drawn: Sample, tokenizer: Tokenizer, marks: tuple[str, str]) -> list[str]:
    row = drawn.row
    if row.lengths is None:
        return ["".join(_pieces(row, drawn.length, tokenizer, marks))]
    if isinstance(dataset.collator, PairCollator):
        return _answers(list(apart(row)), tokenizer, marks)
    if isinstance(dataset.collator, PromptCollator):
        return [_text(row.input_ids.tolist(), tokenizer)]
    # a packed document has one token more than inputs: its last one is a label alone
    return ["".join(_pieces(part, len(part.input_ids) + 1, tokenizer, marks)) for part in apart(row)]


def _answers(parts: list[Row], tokenizer: Tokenizer, marks: tuple[str, str]) -> list[str]:
    """The prompt, and behind it each answer; the token that each begins with is the prompt's last."""
    shared, *answers = parts
    there = next(answer for answer in answers if len(answer.input_ids))
    asked = [*shared.input_ids.tolist(), *there.input_ids[:1].tolist()] if len(shared.input_ids) else []
    texts = [f"prompt: {_text(asked, tokenizer)}"]
    for name, answer in zip(_NAMES, answers, strict=False):
        if len(answer.input_ids):
            shown = "".join(_pieces(answer, len(answer.input_ids) + 1, tokenizer, marks, skipped=int(bool(asked))))
            texts.append(f"{name}:{shown}" if asked else f"{name}: {shown}")
    return texts


def _pieces(
    row: Row, length: int, tokenizer: Tokenizer, marks: tuple[str, str], skipped: int = 0
) -> Iterator[str]:
    """The first ``length`` tokens but for those ``skipped`` as text, cut where training begins and ends."""
    tokens = [int(row.input_ids[0]), *row.labels.tolist()][skipped:length]
    # the first token of a row is never a target
    is_trained = [False, *(row.weights > 0).tolist()][skipped:]
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
