"""Records that are easily got wrong, with the exact text, tokens and mask that come out of them."""

from __future__ import annotations

import itertools
import json
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data import tokenizer as tokenizers
from rwkvpeft.data.conversation import document_text, segments, tokenise
from rwkvpeft.data.records import JsonlSource
from rwkvpeft.data.rules import mask_rule
from rwkvpeft.data.voices import Spoken, VoiceTable

TOKENIZERS = ["world", "bytes"]
load_tokenizer = lru_cache(tokenizers.load_tokenizer)


def messages(*turns, **more):
    return {"messages": [turn if isinstance(turn, dict) else dict(zip(("role", "content"), turn, strict=True))
                         for turn in turns], **more}


CALL = {"id": "1", "type": "function", "function": {"name": "time", "arguments": '{"zone": "UTC+1"}'}}
CLOCK = {
    "type": "function",
    "function": {
        "name": "time",
        "description": "Tell the time",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]},
    },
}

# name: the record, and the document with what --loss_mask qa trains between ⟦ and ⟧; ⏹ is the token that ends it
TABLE = {
    "a plain exchange": (
        messages(("user", "Hi"), ("assistant", "Hello")),
        "User: Hi\n\nAssistant:⟦ Hello⏹⟧",
    ),
    "outer spaces are no words": (
        messages(("user", "  Hi \n"), ("assistant", "\n Hello  there ")),
        "User: Hi\n\nAssistant:⟦ Hello  there⏹⟧",
    ),
    "empty turns": (
        messages(("user", ""), ("assistant", ""), ("user", " \n"), ("assistant", "ok")),
        "User:\n\nAssistant:⟦\n\n⟧User:\n\nAssistant:⟦ ok⏹⟧",
    ),
    "code with blank lines": (
        messages(("user", "Code?"), ("assistant", "```python\na = 1\n\n\n    b = 2\n```\n\nDone.")),
        "User: Code?\n\nAssistant:⟦ ```python\na = 1\n    b = 2\n```\nDone.⏹⟧",
    ),
    "a line of spaces is no blank line": (
        messages(("user", "a\n \nb"), ("assistant", "c")),
        "User: a\n \nb\n\nAssistant:⟦ c⏹⟧",
    ),
    "headers inside turns": (
        messages(("user", "Say:\n\nAssistant: yes\n\nUser: no"), ("assistant", "User: x\n\nUser: y\n\nSystem: z")),
        "User: Say:\nAssistant: yes\nUser: no\n\nAssistant:⟦ User: x\nUser: y\nSystem: z⏹⟧",
    ),
    "windows line ends": (
        messages(("user", "a\r\n\r\nb"), ("assistant", "c\r\nd\r\r\ne")),
        "User: a\nb\n\nAssistant:⟦ c\nd\ne⏹⟧",
    ),
    "emoji and wide characters": (
        messages(("user", "👩‍👩‍👧 ✓"), ("assistant", "你好 🎉\u2028é")),
        "User: 👩‍👩‍👧 ✓\n\nAssistant:⟦ 你好 🎉\u2028é⏹⟧",
    ),
    "a system turn in the middle": (
        messages(("system", "Short."), ("user", "a"), ("assistant", "b"), ("system", "Long."), ("assistant", "c")),
        "System: Short.\n\nUser: a\n\nAssistant:⟦ b\n\n⟧System: Long.\n\nAssistant:⟦ c⏹⟧",
    ),
    "a last turn of the user": (
        messages(("user", "a"), ("assistant", "b"), ("user", "c")),
        "User: a\n\nAssistant:⟦ b\n\n⟧User: c⏹",
    ),
    "two turns of one role": (
        messages(("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d")),
        "User: a\n\nUser: b\n\nAssistant:⟦ c\n\n⟧Assistant:⟦ d⏹⟧",
    ),
    "a think block": (
        messages(("user", "1+1"), ("assistant", "<think>\nEasy.\n\nTwo.\n</think>\n\n2")),
        "User: 1+1\n\nAssistant:⟦ <think>\nEasy.\nTwo.\n</think>\n2⏹⟧",
    ),
    "the fake thought": (
        messages(("user", "1+1"), ("assistant", "<think>\n\n</think>\n\n2")),
        "User: 1+1\n\nAssistant:⟦ <think>\n</think>\n2⏹⟧",
    ),
    "thoughts in a field of their own": (
        messages(("user", "1+1"), {"role": "assistant", "reasoning_content": " Easy.\n", "content": "2"}),
        "User: 1+1\n\nAssistant:⟦ <think>\nEasy.\n</think>\n2⏹⟧",
    ),
    "lists of parts": (
        messages(
            ("user", [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]),
            ("assistant", [{"type": "text", "text": "c"}]),
        ),
        "User: a b\n\nAssistant:⟦ c⏹⟧",
    ),
    "weights and switches": (
        messages(
            ("user", "a"),
            {"role": "assistant", "content": "b", "train": False},
            ("user", "c"),
            {"role": "assistant", "content": "d", "weight": 0.5},
        ),
        "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:⟦ d⏹⟧",
    ),
    "calls of tools": (
        messages(
            ("user", "Time?"),
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "name": "time", "tool_call_id": "1", "content": '{"time": "12:00"}'},
            ("assistant", "Noon."),
            tools=[CLOCK],
        ),
        'System: Tools:\n[\n{"name":"time","description":"Tell the time","arguments":{"zone":{"type":"string"}}}\n]\n'
        "Return only a JSON function call.\n\nUser: Time?\n\n"
        'Assistant:⟦ ```json\n{"name":"time","arguments":{"zone":"UTC+1"}}\n```\n\n⟧'
        'User: Function output:\n{"time": "12:00"}\n\nAssistant:⟦ Noon.⏹⟧',
    ),
    "two calls behind words, with a system turn": (
        messages(
            ("system", "Be kind."),
            ("user", "Time?"),
            {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]},
            tools=[CLOCK],
        ),
        "System: Be kind.\nTools:\n"
        '[\n{"name":"time","description":"Tell the time","arguments":{"zone":{"type":"string"}}}\n]\n'
        "Return only a JSON function call.\n\nUser: Time?\n\n"
        'Assistant:⟦ I look.\n```json\n[\n{"name":"time","arguments":{"zone":"UTC+1"}},\n'
        '{"name":"time","arguments":{"zone":"UTC+1"}}\n]\n```⏹⟧',
    ),
    "ShareGPT with a call": (
        {
            "system": "S",
            "conversations": [
                {"from": "human", "value": "Time?"},
                {"from": "function_call", "value": '{"name": "time", "arguments": {}}'},
                {"from": "observation", "value": "12:00"},
                {"from": "gpt", "value": "Noon."},
            ],
        },
        "System: S\n\nUser: Time?\n\n"
        'Assistant:⟦ ```json\n{"name":"time","arguments":{}}\n```\n\n⟧User: Function output:\n12:00\n\n'
        "Assistant:⟦ Noon.⏹⟧",
    ),
    "Alpaca": (
        {"instruction": "Add.\n\nNow.", "input": "1 2", "output": "3\n\nUser: 4"},
        "Instruction: Add.\nNow.\n\nInput: 1 2\n\nResponse:⟦ 3\nUser: 4⏹⟧",
    ),
    "a prompt and its completion": (
        {"prompt": "Capital?", "completion": " Rome"},
        "User: Capital?\n\nAssistant:⟦ Rome⏹⟧",
    ),
    "lists of prompt and completion": (
        {
            "prompt": messages(("user", "a"), ("assistant", "b"), ("user", "c"))["messages"],
            "completion": messages(("assistant", "d"))["messages"],
        },
        "User: a\n\nAssistant: b\n\nUser: c\n\nAssistant:⟦ d⏹⟧",
    ),
    "text is taken as it is": (
        {"text": " x\n\n\nAssistant: a \n\nUser: b\r\n"},
        " x\n\n\nAssistant:⟦ a \n\n⟧User: b\r\n⏹",
    ),
    "text without turns": ({"text": "Once\n\nmore"}, "Once\n\nmore⏹"),
}


def tokens_and_weights(record, name, folder=None, **config):
    """What a run sees of a record, through the whole path from a file."""
    (folder / "data.jsonl").write_text(json.dumps(record))
    source = JsonlSource(folder / "data.jsonl", load_tokenizer(name))
    settings = DataConfig(tokenizer=name, **config)
    return source.read(0).tolist(), mask_rule(settings).weights(source, 0, int(source.sizes[0]))


def marked(tokens, weights, tokenizer):
    shown = []
    for trained, group in itertools.groupby(zip(tokens, weights, strict=True), key=lambda pair: pair[1] > 0):
        ids = [token for token, _ in group]
        text = b"".join(tokenizer.token_bytes(token) or "⏹".encode() for token in ids).decode()
        shown.append(f"⟦{text}⟧" if trained else text)
    return "".join(shown)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("case", TABLE)
def test_a_tricky_record_has_exactly_this_text_and_mask(case, name, tmp_path):
    record, expected = TABLE[case]
    tokenizer = load_tokenizer(name)
    tokens, weights = tokens_and_weights(record, name, tmp_path, loss_mask="qa")
    assert marked(tokens, weights, tokenizer) == expected
    text = expected.translate(str.maketrans("", "", "⟦⟧⏹"))
    assert document_text(record) == text
    assert tokens == [*tokenizer.encode(text), 0]


def test_the_ids_of_the_world_tokenizer_are_these(tmp_path):
    record = messages(("user", "Hi"), ("assistant", "<think>\n</think>\n2"))
    tokens, weights = tokens_and_weights(record, "world", tmp_path, loss_mask="qa")
    pieces = ["User", ":", " Hi", "\n\n", "Ass", "istant", ":", " <", "think", ">", "\n", "</", "think", ">", "\n", "2"]
    assert [load_tokenizer("world").token_bytes(token).decode() for token in tokens[:-1]] == pieces
    assert tokens[3] == 261
    assert weights.tolist() == [0] * 7 + [1] * 10


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("case", "settings", "expected"),
    [
        ("a last turn of the user", {"loss_mask": "last"}, "User: a\n\nAssistant:⟦ b\n\n⟧User: c⏹"),
        (
            "a system turn in the middle",
            {"loss_mask": "last"},
            "System: Short.\n\nUser: a\n\nAssistant: b\n\nSystem: Long.\n\nAssistant:⟦ c⏹⟧",
        ),
        (
            "a think block",
            {"loss_mask": "qa", "mask_think": True},
            "User: 1+1\n\nAssistant:⟦ <think>⟧\nEasy.\nTwo.\n⟦</think>\n2⏹⟧",
        ),
        (
            "a think block",
            {"loss_mask": "none", "mask_think": True},
            "⟦User: 1+1\n\nAssistant: <think>⟧\nEasy.\nTwo.\n⟦</think>\n2⏹⟧",
        ),
        ("text without turns", {"loss_mask": "none"}, "⟦Once\n\nmore⏹⟧"),
    ],
)
def test_other_masks_choose_among_the_same_voices(case, settings, expected, name, tmp_path):
    tokens, weights = tokens_and_weights(TABLE[case][0], name, tmp_path, **settings)
    assert marked(tokens, weights, load_tokenizer(name)) == expected


def test_a_turns_weight_is_that_of_its_tokens(tmp_path):
    tokens, weights = tokens_and_weights(TABLE["weights and switches"][0], "bytes", tmp_path, loss_mask="qa")
    assert weights.tolist() == [0.0] * (len(tokens) - 3) + [0.5] * 3


def test_a_thought_without_an_end_goes_on_to_the_end_of_its_turn(tmp_path):
    record = messages(("assistant", "<think>a"), ("user", "b"), ("assistant", "c"))
    tokens, weights = tokens_and_weights(record, "bytes", tmp_path, loss_mask="qa", mask_think=True)
    expected = "Assistant:⟦ <think>⟧a⟦\n\n⟧User: b\n\nAssistant:⟦ c⏹⟧"
    assert marked(tokens, weights, load_tokenizer("bytes")) == expected


PIECES = st.sampled_from(
    ["<think>", "</think>", "\n\n", "\r\n", " ", "User:", "Assistant:", "\nSystem: ", "a", "é", "\U0001f600", "```"]
)
CONTENTS = st.lists(PIECES, max_size=6).map("".join)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": CONTENTS}
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=80, deadline=None)
@given(TURNS, st.sampled_from([*TOKENIZERS, "utf-16le"]))
@example([{"role": "user", "content": "Assistant: x"}, {"role": "assistant", "content": ""}], "world")
def test_no_byte_of_others_is_ever_trained_and_the_tokens_spell_the_document(turns, name):
    tokenizer, table = load_tokenizer(name), VoiceTable()
    parts = segments({"messages": turns})
    text = "".join(part.text for part in parts)
    tokens, codes = tokenise(parts, tokenizer, table)
    assert tokenizer.decode(tokens[:-1]) == text == document_text({"messages": turns})
    weights = Spoken(codes, table.voices).answers()
    allowed = np.repeat([part.trained for part in parts], [len(tokenizer.to_bytes(part.text)) for part in parts])
    ends = np.cumsum(tokenizer.byte_lengths[tokens[:-1]])
    for start, end, weight in zip([0, *ends[:-1]], ends, weights[:-1], strict=True):
        assert not weight or allowed[start:end].all()
    assert bool(weights[-1]) == parts[-1].trained


@settings(max_examples=80, deadline=None)
@given(TURNS)
def test_what_the_roles_tell_the_text_tells_too(turns):
    record = {"messages": turns}
    assert segments({"text": document_text(record)}) == segments(record)
