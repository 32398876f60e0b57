"""Files of questions."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpeft.data import questions
from rwkvpeft.data.questions import read_questions
from rwkvpeft.errors import UserError

DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who\n\nbarks?"},
    {"role": "assistant", "content": "A dog."},
    {"role": "user", "content": "And who mews?"},
]
DIALOGUE_TEXT = "System: Be brief.\n\nUser: Who\nbarks?\n\nAssistant: A dog.\n\nUser: And who mews?\n\nAssistant:"


def written(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("record", "text", "layout"),
    [
        ({"prompt": "a?", "chosen": "b", "rejected": "c"}, "User: a?\n\nAssistant:", "chat"),
        ({"prompt": "a?", "system": "s"}, "System: s\n\nUser: a?\n\nAssistant:", "chat"),
        ({"question": "a?", "answer": "7"}, "User: a?\n\nAssistant:", "chat"),
        ({"query": "a?"}, "User: a?\n\nAssistant:", "chat"),
        ({"prompt": DIALOGUE}, DIALOGUE_TEXT, "chat"),
        ({"messages": [*DIALOGUE, {"role": "assistant", "content": "A cat."}]}, DIALOGUE_TEXT, "chat"),
        ({"conversations": [{"from": "human", "value": "a?"}]}, "User: a?\n\nAssistant:", "chat"),
        ({"instruction": "Add", "input": "1 1", "output": "2"}, "Instruction: Add\n\nInput: 1 1\n\nResponse:",
         "instruction"),
        ({"text": "Once upon"}, "Once upon", "text"),
        ({"text": "User: a\n\nAssistant:"}, "User: a\n\nAssistant:", "chat"),
        ({"prompt": None, "text": "Once"}, "Once", "text"),
    ],
)
def test_a_record_is_asked_up_to_where_its_answer_begins(tmp_path, record, text, layout):
    question = next(read_questions(written(tmp_path / "q.jsonl", record)))
    assert (question.text, question.layout, question.record) == (text, layout, (1, record))


def test_rows_of_a_table_are_asked(tmp_path):
    (tmp_path / "q.csv").write_text('prompt,chosen\n"a, ""b""?",x\n"c\nd",y\n', encoding="utf-8-sig")
    first, second = read_questions(tmp_path / "q.csv")
    assert (first.text, first.record.value["chosen"]) == ('User: a, "b"?\n\nAssistant:', "x")
    assert (second.text, second.record.line) == ("User: c\nd\n\nAssistant:", 4)


def test_lines_of_any_other_file_are_questions(tmp_path):
    (tmp_path / "q.txt").write_bytes("What?\r\n\n  Why\u2028so? \n".encode())
    questions = list(read_questions(tmp_path / "q.txt"))
    assert [question.record for question in questions] == [(1, {"prompt": "What?"}), (3, {"prompt": "Why\u2028so?"})]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"id": 3}, "no prompt"),
        ({"prompt": ""}, "empty"),
        ({"prompt": 3}, "must be text"),
        ({"prompt": "User: a\n\nAssistant:"}, "by itself"),
        ({"prompt": []}, "not empty"),
        ({"messages": [{"role": "assistant", "content": "s"}]}, "assistant's"),
        ({"messages": [{"role": "king", "content": "s"}]}, "king"),
        ({"text": ""}, "empty"),
    ],
)
def test_a_record_that_is_no_question_is_named(tmp_path, record, words):
    path = written(tmp_path / "q.jsonl", {"prompt": "a"}, record)
    with pytest.raises(UserError, match=words) as error:
        list(read_questions(path))
    assert error.value.what.startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("q.txt", b"", "no line"),
        ("q.txt", b" \n\n", "no line"),
        ("q.txt", b"\xff\xfe", "UTF-8"),
        ("q.ndjson", b'a\n{"prompt": 1}', "q.ndjson:2: this looks like JSON"),
        ("q.jsonl", b"{", "q.jsonl:1"),
        ("q.csv", b"prompt\n", "no row"),
    ],
)
def test_a_file_without_questions_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        list(read_questions(tmp_path / name))


def test_a_line_too_long_to_be_held_is_refused_and_not_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "LARGEST_LINE_BYTES", 8)
    (tmp_path / "q.txt").write_text("short\n123456789\n")
    with pytest.raises(UserError, match=r"q\.txt:2: a line of 8 characters or more"):
        list(read_questions(tmp_path / "q.txt"))


@settings(deadline=None)
@given(value=st.recursive(st.none() | st.text(max_size=5) | st.integers(),
                          lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                              st.sampled_from(["role", "content", "from", "value", "x"]), inner, max_size=3)),
       name=st.sampled_from(["prompt", "messages", "conversations", "instruction", "text", "tools"]))
def test_any_record_is_a_question_or_refused_by_name(tmp_path_factory, value, name):
    path = written(tmp_path_factory.getbasetemp() / "any.jsonl", {name: value})
    found = ""
    try:
        assert next(read_questions(path)).text
    except UserError as error:
        found = error.what
    assert not found or found.startswith(f"{path}:1: ")
