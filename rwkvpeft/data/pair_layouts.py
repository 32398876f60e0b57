"""The layouts of records in which one answer is preferred to another, or an answer is said to be good or bad.

Prompts and answers become turns, which ``template.render`` writes as it writes every other conversation. Values that
are null are as good as absent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from rwkvpeft.data import template
from rwkvpeft.data.layouts import (
    RecordError,
    as_text,
    chat_turns,
    instruction_turns,
    prefaced,
    question_turn,
    read_turns,
)
from rwkvpeft.data.template import Turn, clean_turn

CHOSEN = "chosen"
REJECTED = ("rejected", "reject")
_LABELS = ("label", "kto_tag")
_LISTS = ("conversations", "messages")
_QUESTIONS = ("prompt", "question", "query", *_LISTS)
_ANSWERS = (template.ASSISTANT, template.RESPONSE)

PAIR_LAYOUTS = (
    ("prompt", "chosen", "rejected"),
    ("question", "chosen", "rejected"),
    ("instruction", "chosen", "rejected"),
    ("conversations", "chosen", "rejected"),
    ("chosen", "rejected"),
)
"""Fields of what is read, the last with the prompt in either answer; beside them those of ``layouts`` with a label."""

_SPEAKERS = {"Human": template.USER, "User": template.USER, "Assistant": template.ASSISTANT, "System": template.SYSTEM}
_SPEAKER = re.compile(r"(?:\A|\n\n)({}):".format("|".join(_SPEAKERS)))
_TRUTHS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}


class Pair(NamedTuple):
    """A prompt's turns, none of which is trained, and those of the answers to it; None for one that is not there."""

    prompt: list[Turn]
    chosen: list[Turn] | None
    rejected: list[Turn] | None

    @property
    def answers(self) -> tuple[list[Turn] | None, list[Turn] | None]:
        """Chosen and rejected."""
        return self.chosen, self.rejected


def read_pair(record: Mapping[str, Any], *, unpaired: bool) -> Pair:
    """The prompt and the answers of a record.

    Args:
        unpaired: whether one answer with a label is read too, as kto does.
    Raises: RecordError for a record of no known layout, an empty answer, or a prompt that ends in ``Assistant:``.
    """
    record = {name: value for name, value in record.items() if value is not None}
    rejected = [name for name in REJECTED if name in record]
    if len(rejected) > 1:
        raise RecordError('"rejected" and "reject" are one field: leave one out')
    if CHOSEN in record and rejected:
        return _paired(record, rejected[0])
    label = next((name for name in _LABELS if name in record), None)
    if label is None or CHOSEN in record or rejected:
        raise _unknown(record, unpaired=unpaired)
    if not unpaired:
        raise RecordError(f'one answer and its "{label}", which only --objective kto reads')
    return _labelled(record, label)


def _paired(record: Mapping[str, Any], rejected: str) -> Pair:
    is_asked = any(name in record for name in (*_QUESTIONS, "instruction"))
    answers = {name: _turns(record[name], name, may_be_whole=not is_asked) for name in (CHOSEN, rejected)}
    if not is_asked and not any(map(_is_whole, answers.values())):
        raise _unknown(record, unpaired=False)
    if any(map(_is_whole, answers.values())):
        pair = _whole(record, answers[CHOSEN], answers[rejected], rejected)
    else:
        asked, header = _asked(record)
        pair = Pair(asked, *([turn._replace(header=header) if turn.header in _ANSWERS else turn for turn in turns]
                             for turns in answers.values()))
    for name, turns in zip(answers, pair.answers, strict=True):
        _check_answer(turns or [], f'field "{name}"')
    return pair._replace(prompt=prefaced(record, pair.prompt))


def _asked(record: Mapping[str, Any]) -> tuple[list[Turn], str]:
    """A prompt, and the header of answers to it."""
    found = [name for name in (*_QUESTIONS, "instruction") if name in record]
    if len(found) > 1:
        shown = " and ".join(f'"{name}"' for name in found)
        raise RecordError(f"the fields of two layouts, {shown}: which is the prompt? Leave one out")
    name = found[0]
    if name == "instruction":
        return instruction_turns(record), template.RESPONSE
    return prompt_turns(record[name], name), template.ASSISTANT


def prompt_turns(value: object, name: str) -> list[Turn]:
    """A prompt given as text or as messages that an answer can follow. Raises: RecordError."""
    if not isinstance(value, (list, tuple)):
        return [question_turn(value, name)]
    turns = [turn._replace(weight=0.0) for turn in chat_turns(value, name)]
    if turns[-1].header == template.ASSISTANT:
        raise RecordError(f'field "{name}" ends in an assistant\'s turn, which an answer cannot follow')
    return turns


def _turns(value: object, name: str, *, may_be_whole: bool) -> list[Turn]:
    """An answer, or a whole conversation, which as a text is only looked for where nothing else is the prompt."""
    if isinstance(value, Mapping):
        return chat_turns([value], name)
    if isinstance(value, (list, tuple)):
        return chat_turns(value, name)
    text = as_text(value, f'field "{name}"')
    return (may_be_whole and _transcript(text)) or [Turn(template.ASSISTANT, text, 1.0)]


def _transcript(text: str) -> list[Turn]:
    """The turns of a text such as hh-rlhf's, which begins with a user's turn; none if it is another text."""
    found = list(_SPEAKER.finditer(text))
    if not found or found[0].start() or _SPEAKERS[found[0][1]] == template.ASSISTANT:
        return []
    ends = [match.start() for match in found[1:]] + [len(text)]
    turns = [Turn(_SPEAKERS[match[1]], text[match.end() : end]) for match, end in zip(found, ends, strict=True)]
    return [turn._replace(weight=float(turn.header == template.ASSISTANT)) for turn in turns]


def _is_whole(turns: Sequence[Turn]) -> bool:
    """Whether turns are more than an answer."""
    return turns[0].header != template.ASSISTANT


def _whole(record: Mapping[str, Any], chosen: list[Turn], rejected: list[Turn], name: str) -> Pair:
    """Two conversations, the prompt of which is what they begin with."""
    if not (_is_whole(chosen) and _is_whole(rejected)):
        raise RecordError(f'"{CHOSEN}" and "{name}" must both be answers, or both be whole conversations')
    both = zip(chosen, rejected, strict=False)
    common = len(list(takewhile(lambda turns: _same(*turns), both)))
    # of two that are alike, the last turn is the answer
    common = min(common, len(chosen) - 1, len(rejected) - 1)
    prompt = [turn._replace(weight=0.0) for turn in chosen[:common]]
    given = record.get("prompt")
    if isinstance(given, (list, tuple)):
        asked = prompt_turns(given, "prompt")
        if len(asked) > common or not all(map(_same, asked, prompt)):
            raise RecordError(f'"{CHOSEN}" and "{name}" begin with a user\'s turn, and not with the turns of "prompt"')
    return Pair(prompt, chosen[common:], rejected[common:])


def _same(one: Turn, other: Turn) -> bool:
    return (one.header, clean_turn(one.text)) == (other.header, clean_turn(other.text))


def _check_answer(turns: Sequence[Turn], place: str) -> None:
    if not turns or turns[-1].header not in _ANSWERS:
        raise RecordError(f'{place} must end in an assistant\'s turn')
    if not any(turn.header in _ANSWERS and clean_turn(turn.text) for turn in turns):
        raise RecordError(f"{place} is an empty answer")


def _labelled(record: Mapping[str, Any], label: str) -> Pair:
    """One answer, which is good or bad: what a record says last."""
    value = record[label]
    truth = _TRUTHS.get(value.strip().lower() if isinstance(value, str) else value) if _is_plain(value) else None
    if truth is None:
        raise RecordError(f'field "{label}" must be true or false; found {value!r:.80}')
    turns = read_turns({name: part for name, part in record.items() if name not in _LABELS})
    asked = len(turns)
    while asked and turns[asked - 1].header in _ANSWERS:
        asked -= 1
    answer = turns[asked:]
    _check_answer(answer, "the conversation")
    prompt = [turn._replace(weight=0.0) for turn in turns[:asked]]
    return Pair(prompt, answer, None) if truth else Pair(prompt, None, answer)


def _is_plain(value: object) -> bool:
    return isinstance(value, (str, bool, int))


def _unknown(record: Mapping[str, Any], *, unpaired: bool) -> RecordError:
    """No layout: the nearest one, and what it lacks."""
    names = {"rejected" if name in REJECTED else name for name in record}
    # beside "chosen" and "rejected" a prompt is likelier forgotten than left out on purpose
    nearest = max(PAIR_LAYOUTS[:-1], key=lambda fields: len(names & set(fields)))
    lacking = " and ".join(f'"{name}"' for name in nearest if name not in names)
    found = ", ".join(f'"{name}"' for name in record) or "no field"
    shown = "{" + ", ".join(f'"{name}": ...' for name in nearest) + "}"
    single = '; a single answer lacks "label", true or false' if unpaired and not {CHOSEN, "rejected"} & names else ""
    return RecordError(f"no pair of answers in this record; found {found}; {shown} lacks {lacking}{single}")
