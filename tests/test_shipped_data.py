"""The help-desk conversations and the base model that the scripts use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

DATA = Path(__file__).resolve().parents[1] / "scripts" / "data"
FILES = ("library.jsonl", "library_heldout.jsonl")


def conversations(name: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def questions(name: str) -> list[str]:
    return [turn["content"] for turns in conversations(name) for turn in turns if turn["role"] == "user"]


@pytest.mark.parametrize("name", FILES)
def test_every_conversation_alternates_between_user_and_assistant_and_ends_with_an_answer(name: str) -> None:
    for turns in conversations(name):
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert all(turn["content"].strip() == turn["content"] != "" for turn in turns)


@pytest.mark.parametrize("name", FILES)
def test_the_text_is_ascii_without_line_breaks(name: str) -> None:
    for turns in conversations(name):
        for turn in turns:
            assert turn["content"].isascii()
            assert turn["content"].isprintable()


def test_there_are_enough_conversations() -> None:
    training = conversations("library.jsonl")
    assert len(training) >= 240
    assert sum(len(turns) > 2 for turns in training) >= 10
    assert len(conversations("library_heldout.jsonl")) == 40


def test_no_question_of_the_training_file_is_asked_twice_or_held_out() -> None:
    single = [turns[0]["content"] for turns in conversations("library.jsonl") if len(turns) == 2]
    assert len(set(single)) == len(single)
    assert not set(questions("library.jsonl")) & set(questions("library_heldout.jsonl"))


def test_every_held_out_answer_is_taught_by_at_least_three_other_questions() -> None:
    taught = [turns[1]["content"] for turns in conversations("library.jsonl") if len(turns) == 2]
    for _, answer in conversations("library_heldout.jsonl"):
        assert taught.count(answer["content"]) >= 3


def test_the_base_model_is_small_and_holds_bf16_tensors_alone() -> None:
    path = DATA / "base-v7-bytes.pth"
    assert path.stat().st_size <= 3_000_000
    tensors = torch.load(path, weights_only=True)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert tensors["emb.weight"].shape[0] == 256
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
