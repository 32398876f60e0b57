"""Prompts for rewards: what the model reads, what is kept of their records, and where they are drawn."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkvpeft.config.groups import DataConfig, ScheduleConfig
from rwkvpeft.data.datamodule import TrainingData
from rwkvpeft.data.layouts import RecordError
from rwkvpeft.data.loader import BatchPlan, TrainLoader, evaluation_batches
from rwkvpeft.data.preview import preview
from rwkvpeft.data.prompt_rows import open_prompts, open_prompts_split, record_of
from rwkvpeft.data.prompt_source import Asked, read_prompt
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.errors import ContractError, UserError

USER, FOUR = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
PLAIN = "User: 2+2?\n\nAssistant:"


@pytest.mark.parametrize(("record", "expected"), [
    ({"prompt": "2+2?", "solution": "4"}, Asked(PLAIN)),
    ({"prompt": [USER]}, Asked(PLAIN)),
    ({"question": "2+2?", "answer": "4"}, Asked(PLAIN)),
    ({"problem": "2+2?", "solution": "4"}, Asked(PLAIN)),
    ({"prompt": "2+2?", "question": "other", "text": "other"}, Asked(PLAIN)),
    ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, Asked(PLAIN)),
    ({"messages": [USER]}, Asked(PLAIN)),
    ({"messages": [USER, FOUR]}, Asked(PLAIN, "4")),
    ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}, Asked(PLAIN, "4")),
    ({"messages": [USER, FOUR, USER, FOUR]}, Asked("User: 2+2?\n\nAssistant: 4\n\n" + PLAIN, "4")),
    ({"prompt": "2+2?", "system": "Add."}, Asked("System: Add.\n\n" + PLAIN)),
    ({"instruction": "Add.", "input": "2+2", "output": "4"}, Asked("Instruction: Add.\n\nInput: 2+2\n\nResponse:")),
    ({"text": "2+2="}, Asked("2+2=")),
    ({"prompt": "2+2=", "raw": True}, Asked("2+2=")),
])
def test_a_record_is_asked_up_to_where_the_answer_begins(record, expected):
    assert read_prompt(record) == expected


@pytest.mark.parametrize(("record", "why"), [
    ({"answer": "4"}, 'no prompt in this record; found "answer"'),
    ({"prompt": " "}, 'field "prompt" is an empty prompt'),
    ({"text": ""}, 'field "text" is an empty prompt'),
    ({"prompt": "2+2?\n\nAssistant:"}, 'ends in "Assistant:"'),
    ({"messages": [FOUR]}, "asks nothing"),
    ({"prompt": [USER, FOUR]}, "ends in an assistant's turn"),
    ({"prompt": 3}, "must be text; found a number"),
])
def test_a_record_without_a_prompt_is_refused(record, why):
    with pytest.raises(RecordError, match=why.replace("(", r"\(").replace("+", r"\+").replace("?", r"\?")):
        read_prompt(record)


RECORDS = [{"prompt": "a" * n, "answer": n} for n in range(1, 12)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def opened(file, ctx_len=100, first_number=0, **change):
    config = DataConfig(data_file=str(file), tokenizer="bytes", **change)
    return open_prompts(config, ctx_len=ctx_len, vocab_size=256, seed=3, first_number=first_number)


def texts(batch):
    tokens, ends = batch.input_ids[0].tolist(), batch.prompts.offsets
    return [bytes(tokens[start:end]).decode() for start, end in itertools.pairwise(ends)]


def drawn(dataset, begin=0, end=6, **workers):
    batches = TrainLoader(dataset, BatchPlan(micro_bsz=2, epoch_steps=6, accumulate=2), begin, end, **workers)
    return [(texts(batch), batch.documents.tolist(), batch.places.tolist(), batch.step_weight.item())
            for batch in batches]


def test_a_batch_is_its_prompts_and_where_they_come_from(file):
    dataset = opened(file)
    batch = next(iter(TrainLoader(dataset, BatchPlan(micro_bsz=3, epoch_steps=1), 0, 1)))
    assert texts(batch) == [dataset.record(number)["prompt_text"] for number in batch.documents.tolist()]
    assert batch.places.tolist() == [0, 1, 2]
    assert batch.step_weight == 3


def test_a_step_weighs_the_prompts_of_all_its_batches(file):
    assert [weight for *_, weight in drawn(opened(file))] == [4] * 6


def test_a_prompt_has_the_tokens_it_has_in_instruction_tuning(file):
    tokenizer = load_tokenizer("world")
    config = DataConfig(data_file=str(file))
    dataset = open_prompts(config, ctx_len=100, vocab_size=65536, seed=0)
    row = dataset.row(0)
    whole = tokenizer.encode(dataset.record(0)["prompt_text"] + " words")
    assert row.input_ids.tolist() == whole[: len(row.input_ids)]


def test_the_place_is_that_in_the_run_whatever_pass_it_is(file):
    dataset = opened(file)
    places = [int(dataset.sample(position).beside["place"][0]) for position in (0, 11, 30)]
    assert places == [0, 11, 30]


def test_records_keep_all_their_fields(file):
    assert opened(file).record(2) == {"prompt": "aaa", "answer": 3, "prompt_text": "User: aaa\n\nAssistant:"}


def test_a_conversation_gives_its_last_answer_as_a_field(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"messages": [USER, FOUR]}))
    assert opened(path).record(0)["answer"] == "4"


def test_workers_give_the_same_batches(file):
    assert drawn(opened(file), num_workers=2) == drawn(opened(file))


def test_a_run_goes_on_from_any_batch(file):
    assert drawn(opened(file), begin=3) == drawn(opened(file))[3:]


def test_prompts_that_are_too_long_are_left_out_and_counted(file):
    dataset = opened(file, ctx_len=len("User: aaaa\n\nAssistant:"))
    assert len(dataset) == 4
    assert dataset.longest_row == 22
    assert "7 prompts longer than --ctx_len 22 left out" in dataset.report().render()


def test_data_of_prompts_that_are_all_too_long_are_refused(file):
    with pytest.raises(UserError, match="every prompt of .* is longer than --ctx_len"):
        opened(file, ctx_len=5)


def test_a_bad_record_is_refused_with_its_line(file):
    file.write_text(file.read_text() + '{"answer": 3}\n')
    with pytest.raises(UserError, match=r"prompts.jsonl:12: no prompt in this record"):
        opened(file)


def test_both_sides_of_a_split_know_all_records(file):
    config = DataConfig(data_file=str(file), tokenizer="bytes")
    trained, held_out = open_prompts_split(config, 3, ctx_len=100, vocab_size=256, seed=0)
    numbers = [[int(side.row(index).beside["document"][0]) for index in range(len(side))]
               for side in (trained, held_out)]
    assert sorted(numbers[0] + numbers[1]) == list(range(11))
    batch = next(iter(evaluation_batches(held_out, 3)))
    assert texts(batch) == [trained.record(number)["prompt_text"] for number in batch.documents.tolist()]


def test_records_of_several_data_sets_are_told_apart_by_their_numbers(file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "x"}\n')
    mixed = opened(f"{file},{other}")
    held_out = opened(other, first_number=mixed.numbers.stop)
    assert [record_of([mixed, held_out], number)["prompt_text"] for number in (0, 11, 12)] == [
        "User: a\n\nAssistant:", "x", "x"]
    assert next(iter(evaluation_batches(held_out, 1))).documents.tolist() == [12]
    with pytest.raises(ContractError):
        record_of([mixed, held_out], 13)


def test_prompts_of_several_files_are_drawn_at_the_places_of_the_run(file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "x"}\n')
    rows = [opened(f"{file},{other}").sample(position) for position in range(6)]
    assert [int(row.beside["place"][0]) for row in rows] == list(range(6))
    assert [int(row.beside["document"][0]) for row in rows].count(11) == 3


def test_a_preview_shows_the_prompt(file):
    shown = preview(opened(file, data_shuffle=0), 1)
    assert f"sample 0: {file}:1, 19 tokens, 0 trained ---\nUser: a\n\nAssistant:\n\n" in shown
    assert "data: 11 prompts" in shown


# the same rows for several optimizer steps


plans = st.builds(
    BatchPlan, micro_bsz=st.integers(1, 3), epoch_steps=st.integers(1, 20), accumulate=st.integers(1, 4),
    world_size=st.integers(1, 2), repeats=st.integers(1, 4),
)


def steps(plan, epochs):
    """For each optimizer step of each mini-epoch the positions of its batches."""
    batches = range(epochs * plan.epoch_steps)
    return [
        [[list(plan.positions(batch)) for batch in range(group.start, group.stop)]
         for group in plan.groups(epoch * plan.epoch_steps, (epoch + 1) * plan.epoch_steps)]
        for epoch in range(len(batches) // plan.epoch_steps)
    ]


@given(plans)
def test_steps_that_repeat_draw_what_the_first_of_them_drew(plan):
    for epoch in steps(plan, 3):
        for number, step in enumerate(epoch):
            first = epoch[number - number % plan.repeats]
            # the last step of a mini-epoch may have fewer batches
            assert step == first[: len(step)]


@given(plans)
def test_no_position_is_left_out_and_none_is_drawn_in_two_groups(plan):
    ranks = [plan] if plan.world_size == 1 else [plan, BatchPlan(**{**vars(plan), "rank": 1})]
    found = [
        position for rank in ranks for epoch in steps(rank, 3) for step in epoch[:: plan.repeats]
        for batch in step for position in batch
    ]
    assert sorted(found) == list(range(len(found)))


@given(plans, st.integers(0, 3))
def test_a_later_run_goes_on_behind_the_mini_epochs_before_it(plan, epochs):
    later = BatchPlan(**{**vars(plan), "first_batch": epochs * plan.epoch_steps})
    for batch in range(2 * plan.epoch_steps):
        assert later.positions(batch) == plan.positions(epochs * plan.epoch_steps + batch)


@pytest.mark.parametrize(("repeats", "accumulate", "expected"), [(1, 2, 6), (2, 1, 12), (3, 4, 24)])
def test_a_pass_takes_as_many_steps_more_as_they_repeat(file, repeats, accumulate, expected):
    schedule = ScheduleConfig(micro_bsz=2, epoch_steps=0, accumulate_grad_batches=accumulate)
    data = TrainingData(opened(file), schedule=schedule, data=DataConfig(), seed=0, repeats=repeats)
    assert data.epoch_steps == expected
    places = {int(place) for batch in data.train_dataloader() for place in batch.places}
    assert places >= set(range(11))
    assert np.max(list(places)) < 11 + 2 * accumulate
