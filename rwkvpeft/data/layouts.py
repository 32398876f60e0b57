"""The layouts of records that hold turns: OpenAI's messages, ShareGPT's conversations, Alpaca, and pairs of fields.

Values that are null are as good as absent: tables fill in null for what a row does not have.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rwkvpeft.data import template
from rwkvpeft.data.template import Turn

LAYOUTS = (
    '{"text": "..."}',
    '{"messages": [{"role": "user|assistant|system|tool", "content": "..."}]}',
    '{"conversations": [{"from": "human|gpt|system|function_call|observation", "value": "..."}]}',
    '{"instruction": "...", "input": "...", "output": "..."}',
    '{"prompt": "...", "completion": "..."}',
)

_TOOL, _CALL = "tool", "call"
ROLES: dict[str, str] = {
    "system": template.SYSTEM,
    "developer": template.SYSTEM,
    "user": template.USER,
    "human": template.USER,
    "assistant": template.ASSISTANT,
    "gpt": template.ASSISTANT,
    "model": template.ASSISTANT,
    "bot": template.ASSISTANT,
    "tool": _TOOL,
    "function": _TOOL,
    "observation": _TOOL,
    "function_call": _CALL,
    "tool_call": _CALL,
}

PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("input", "output"),
)
_LISTS = ("messages", "conversations")
_SYSTEM_FIELDS = ("system", "system_prompt")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_SWITCHES = ("train", "training", "loss")
_LARGEST_WEIGHT = 1_000_000
_TEXT_PARTS = ("text", "input_text", "output_text")


class RecordError(ValueError):
    """A record that is not a document; the message is one line, without the file and the line number."""


def read_turns(record: Mapping[str, Any], text_key: str = "text") -> list[Turn]:
    """The turns of a record that has no field ``text_key``. Raises: RecordError."""
    found = _layouts_of(record)
    if len(found) > 1:
        shown = " and ".join("/".join(f'"{name}"' for name in fields) for fields in found)
        raise RecordError(f"the fields of two layouts, {shown}: which is the document? Leave one out")
    if not found:
        known = LAYOUTS if text_key == "text" else (LAYOUTS[0].replace("text", text_key, 1), *LAYOUTS[1:])
        names = ", ".join(f'"{name}"' for name in record) or "no field"
        if {"chosen", "rejected"} <= set(record) or {"chosen", "reject"} <= set(record):
            raise RecordError(f"a pair of answers and no document; found {names}; --objective dpo, or another one for "
                              "preferences, learns from pairs")
        raise RecordError(f"no document in this record; found {names}; expected one of {', '.join(known)}")
    fields = found[0]
    if len(fields) == 1:
        turns = chat_turns(record[fields[0]], fields[0])
    elif fields[0] == "instruction":
        turns = _instruction(record, fields[1])
    else:
        turns = _pair(record, *fields)
    return prefaced(record, turns)


def prefaced(record: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    """Turns with the record's system text and functions in front. Raises: RecordError."""
    if record.get("history"):
        raise RecordError('field "history" is not read; write the earlier turns as "messages"')
    return _with_tools(record, _with_system(record, turns))


def as_text(value: object, name: str) -> str:
    """A value that is text. Raises: RecordError naming it as ``name`` if it is anything else."""
    if not isinstance(value, str):
        raise RecordError(f"{name} must be text; found {_kind(value)}")
    return value


def _layouts_of(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The fields of every layout the record has."""
    # null is not looked at here, so that a layout with a null in it is named and not taken for none
    found: list[tuple[str, ...]] = [(name,) for name in _LISTS if name in record]
    if "instruction" in record:
        found += [("instruction", answer) for answer in ("output", "response") if answer in record]
    return found + [
        pair for pair in PAIRS if set(pair) <= set(record) and not ("instruction" in record and pair[0] == "input")
    ]


def _with_system(record: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    for name in _SYSTEM_FIELDS:
        value = record.get(name)
        if value is not None and as_text(value, f'field "{name}"').strip():
            return [Turn(template.SYSTEM, value), *turns]
    return turns


def _with_tools(record: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    """The functions of a record stand at the end of the first system turn, or in one of their own."""
    listed = _tools(record)
    if not listed:
        return turns
    if turns and turns[0].header == template.SYSTEM and turns[0].text.strip():
        return [Turn(template.SYSTEM, f"{turns[0].text}\n{listed}"), *turns[1:]]
    return [Turn(template.SYSTEM, listed), *turns]


def _tools(record: Mapping[str, Any]) -> str:
    for name in ("tools", "functions"):
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except ValueError:
                return template.tool_list(value)
        if value:
            listed = [value] if isinstance(value, Mapping) else value
            if not isinstance(listed, (list, tuple)):
                raise RecordError(f'field "{name}" must be a list of functions; found {_kind(value)}')
            return template.tool_list([_tool(tool, f'function {i} of "{name}"') for i, tool in enumerate(listed, 1)])
    return ""


def _tool(value: object, place: str) -> dict[str, Any]:
    """Name, description and arguments of a function, from OpenAI's form or from one that has them already."""
    inner = value.get("function", value) if isinstance(value, Mapping) else value
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise RecordError(f'{place} must be an object with a "name"; found {_kind(value)}')
    if inner.get("parameters") is None:
        return {name: part for name, part in inner.items() if part is not None}
    tool = {"name": inner["name"]}
    if inner.get("description") is not None:
        tool["description"] = inner["description"]
    parameters = inner["parameters"]
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    if not isinstance(properties, Mapping):
        return {**tool, "arguments": parameters}
    tool["arguments"] = properties
    required = parameters.get("required")
    # where every argument is needed nothing need be said
    if required is not None and set(required) != set(properties):
        tool["required"] = required
    return tool


def chat_turns(turns: object, field: str) -> list[Turn]:
    """The turns of a list of messages, either way of naming. Raises: RecordError naming ``field``."""
    if not isinstance(turns, (list, tuple)) or not turns:
        raise RecordError(f'field "{field}" must be a list of turns that is not empty; found {_kind(turns)}')
    return [_turn(turn, f'turn {number} of "{field}"', field) for number, turn in enumerate(turns, start=1)]


def _turn(value: object, place: str, field: str) -> Turn:
    turn, role_key, text_key = _fields(value, place, field)
    role = turn[role_key]
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise RecordError(f'{place} has the unknown "{role_key}" {role!r}; expected one of {", ".join(ROLES)}')
    kind, content, name = ROLES[role.lower()], turn.get(text_key), f'"{text_key}" of {place}'
    weight = _weight(turn, kind in (template.ASSISTANT, _CALL), place)
    if kind == _TOOL:
        return Turn(template.USER, template.function_output(_output(content, name).strip()))
    if kind == _CALL:
        return Turn(template.ASSISTANT, template.function_call([_call(content, name)]), weight)
    if kind == template.ASSISTANT:
        return Turn(kind, _answer(turn, content, name, place), weight)
    return Turn(kind, _content(content, name))


def _fields(turn: object, place: str, field: str) -> tuple[Mapping[str, Any], str, str]:
    """A turn, and the names of its role and its text. Either way of naming is met under either field."""
    usual = ("from", "value") if field == "conversations" else ("role", "content")
    if not isinstance(turn, Mapping):
        raise RecordError(f'{place} must have "{usual[0]}" and "{usual[1]}"; found {_kind(turn)}')
    ways = (usual, ("role", "content"), ("from", "value"))
    role_key, text_key = next((way for way in ways if way[0] in turn), usual)
    if role_key not in turn or (text_key not in turn and not _speaks(turn)):
        found = ", ".join(f'"{name}"' for name in turn) or "no field"
        raise RecordError(f'{place} must have "{role_key}" and "{text_key}"; found {found}')
    return turn, role_key, text_key


def _speaks(turn: Mapping[str, Any]) -> bool:
    """Whether an assistant's turn says something even without content."""
    return any(turn.get(name) for name in ("tool_calls", "function_call", *_REASONING))


def _answer(turn: Mapping[str, Any], content: object, name: str, place: str) -> str:
    """An assistant's thoughts, words and calls of functions, each on lines of its own."""
    text = "" if content is None and _speaks(turn) else _content(content, name)
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    if calls:
        if not isinstance(calls, (list, tuple)):
            raise RecordError(f'"tool_calls" of {place} must be a list; found {_kind(calls)}')
        block = template.function_call([_call(call, f'call {i} of {place}') for i, call in enumerate(calls, start=1)])
        text = f"{text.rstrip()}\n{block}" if text.strip() else block
    for key in _REASONING:
        thoughts = turn.get(key)
        if thoughts is not None and as_text(thoughts, f'"{key}" of {place}').strip():
            if template.THINK in text:
                raise RecordError(f'{place} has "{key}" and {template.THINK} in its text; leave one out')
            return template.with_thoughts(thoughts.strip(), text)
    return text


def _call(value: object, place: str) -> dict[str, Any]:
    """Name and arguments of a call, from OpenAI's form, from an object or from JSON in a text."""
    call = _from_json(value, place)
    call = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise RecordError(f'{place} must be an object with "name" and "arguments"; found {_kind(value)}')
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        arguments = _from_json(arguments, f'"arguments" of {place}') if arguments.strip() else {}
    return {"name": call["name"], "arguments": {} if arguments is None else arguments}


def _from_json(value: object, place: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        parsed: object = json.loads(value)
    except ValueError as reason:
        raise RecordError(f"{place} must be JSON: {reason}") from reason
    return parsed


def _content(value: object, name: str) -> str:
    """A turn's text, given as text or as a list of OpenAI's parts of type text, joined without anything between."""
    if not isinstance(value, (list, tuple)):
        return as_text(value, name)
    texts: list[str] = []
    for number, part in enumerate(value, start=1):
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            found = f"type {kind!r}" if isinstance(part, Mapping) else _kind(part)
            raise RecordError(
                f'{name} is a list, whose part {number} must be {{"type": "text", "text": "..."}}; found {found}'
            )
        texts.append(part["text"])
    return "".join(texts)


def _output(value: object, name: str) -> str:
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    return _content(value, name)


def _weight(turn: Mapping[str, Any], is_answer: bool, place: str) -> float:
    """What a turn's tokens weigh: "weight", and 0 where "train", "training" or "loss" is false."""
    given = turn.get("weight")
    weight = 1.0 if given is None else given
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= _LARGEST_WEIGHT:
        raise RecordError(f'"weight" of {place} must be a number from 0 to {_LARGEST_WEIGHT}; found {weight!r:.80}')
    switches = {key: turn[key] for key in _SWITCHES if turn.get(key) is not None}
    for key, switch in switches.items():
        if switch not in (0, 1):
            raise RecordError(f'"{key}" of {place} must be true or false; found {switch!r}')
    weight = float(weight) if all(switches.values()) else 0.0
    if is_answer:
        return weight
    if weight and (given is not None or switches):
        raise RecordError(f"{place} asks to be trained, and only an assistant's turns are")
    return 0.0


def _instruction(record: Mapping[str, Any], answer: str) -> list[Turn]:
    answered = as_text(record[answer], f'field "{answer}"')
    return [*instruction_turns(record), Turn(template.RESPONSE, answered, 1.0)]


def instruction_turns(record: Mapping[str, Any]) -> list[Turn]:
    """An instruction and what it is about, as ``{"instruction", "input"}`` gives them. Raises: RecordError."""
    turns = [Turn(template.INSTRUCTION, as_text(record["instruction"], 'field "instruction"'))]
    for name in ("input", "context"):
        given = record.get(name)
        if given is not None and as_text(given, f'field "{name}"').strip():
            turns.append(Turn(template.INPUT, given))
    return turns


def _pair(record: Mapping[str, Any], asked: str, answered: str) -> list[Turn]:
    """A user's turn and the answer. Where both are lists of messages, those of the first are not trained."""
    question, answer = record[asked], record[answered]
    if isinstance(question, (list, tuple)) and isinstance(answer, (list, tuple)):
        return [*(turn._replace(weight=0.0) for turn in chat_turns(question, asked)), *chat_turns(answer, answered)]
    return [
        question_turn(question, asked),
        Turn(template.ASSISTANT, as_text(answer, f'field "{answered}"'), 1.0),
    ]


def question_turn(value: object, field: str) -> Turn:
    """A user's turn that is a text of its own. Raises: RecordError naming ``field``."""
    text = as_text(value, f'field "{field}"')
    if text.rstrip().endswith(f"{template.ASSISTANT}:"):
        raise RecordError(
            f'field "{field}" ends in "{template.ASSISTANT}:", which is written by itself, as "{template.USER}:" is; '
            'give the question alone, or the whole document as "text"'
        )
    return Turn(template.USER, text)


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", dict: "an object"}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "a list" if value else "an empty list"
    return names.get(type(value), type(value).__name__)
