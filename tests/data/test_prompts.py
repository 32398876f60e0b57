"""Prompts from a file and from held-out rows."""

from __future__ import annotations

import json

import pytest

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.dataset import open_dataset
from rwkvpeft.data.prompts import Prompt, held_out_prompts, read_prompts
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.errors import UserError

CHAT = {
    "messages": [
        {"role": "user", "content": "Who barks?"},
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": "And who\n\nmews?"},
        {"role": "assistant", "content": "A cat."},
    ]
}


def file_of(tmp_path, *records):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ("What is red?", Prompt("User: What is red?\n\nAssistant:", "What is red?")),
        ({"prompt": "What is red?"}, Prompt("User: What is red?\n\nAssistant:", "What is red?")),
        ({"text": "Once upon a"}, Prompt("Once upon a", "Once upon a")),
        (
            CHAT,
            Prompt(
                "User: Who barks?\n\nAssistant: A dog.\n\nUser: And who\nmews?\n\nAssistant:",
                "And who\nmews?",
                "A cat.",
            ),
        ),
        (
            {"messages": CHAT["messages"][:1]},
            Prompt("User: Who barks?\n\nAssistant:", "Who barks?"),
        ),
        (
            {"instruction": "Add", "input": "1 1", "output": "2"},
            Prompt("Instruction: Add\n\nInput: 1 1\n\nResponse:", "1 1", "2"),
        ),
    ],
)
def test_a_line_is_asked_up_to_where_the_answer_begins(tmp_path, record, prompt):
    assert read_prompts(file_of(tmp_path, record)) == [prompt]


@pytest.mark.parametrize("record", [7, [], "", {"question": "?"}, {"prompt": 3}])
def test_a_line_that_is_no_prompt_is_named(tmp_path, record):
    with pytest.raises(UserError, match=r"prompts.jsonl:2: this is no prompt"):
        read_prompts(file_of(tmp_path, "fine", record))


def test_a_file_without_prompts_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts(file_of(tmp_path))


@pytest.mark.parametrize("dataload", ["pad", "only", "pack"])
def test_the_first_held_out_conversations_are_asked_up_to_their_last_answer(tmp_path, dataload):
    plain = {"text": "No turns in here."}
    texts = [{"text": f"User: Number {number}?\n\nAssistant: It is {number}."} for number in range(5)]
    path = file_of(tmp_path, plain, *texts)
    data = DataConfig(data_file=str(path), data_type="jsonl", tokenizer="bytes", dataload=dataload)
    rows = open_dataset(data, ctx_len=60, vocab_size=256, seed=0)
    found = held_out_prompts(rows, load_tokenizer("bytes"), 3)
    assert sorted(prompt.question for prompt in found) == ["Number 0?", "Number 1?", "Number 2?"]
    assert found[0].text.endswith("\n\nAssistant:")
    assert found[0].expected.startswith("It is ")


def test_an_answer_that_is_cut_at_the_end_of_the_row_is_marked(tmp_path):
    path = file_of(tmp_path, {"text": "User: Why?\n\nAssistant: For many long reasons."})
    data = DataConfig(data_file=str(path), data_type="jsonl", tokenizer="bytes")
    rows = open_dataset(data, ctx_len=30, vocab_size=256, seed=0)
    assert held_out_prompts(rows, load_tokenizer("bytes"), 1)[0].expected == "For many ..."


def test_only_ends_of_lines_end_a_prompt(tmp_path):
    path = tmp_path / "prompts.jsonl"
    # of these characters a text is cut into lines, a file is not
    path.write_bytes("\ufeff\"one\u2028two\"\r\n\"three\u0085four\"".encode())
    assert [prompt.question for prompt in read_prompts(path)] == ["one\u2028two", "three\u0085four"]
