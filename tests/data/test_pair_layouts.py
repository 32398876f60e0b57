"""Every layout of preferred answers, and what is said of records that are none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpeft.data.layouts import RecordError
from rwkvpeft.data.pair_layouts import read_pair
from rwkvpeft.data.prompt_source import read_prompt
from rwkvpeft.data.template import render

USER = {"role": "user", "content": "2+2?"}
FOUR, FIVE = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}


def written(record, unpaired=False):
    """The prompt's text, and what each answer adds to it, as it is tokenised."""
    pair = read_pair(record, unpaired=unpaired)
    prompt = "".join(piece.text for piece in render(pair.prompt))
    texts = ["".join(piece.text for piece in render([*pair.prompt, *turns])) for turns in pair.answers if turns]
    assert all(text.startswith(prompt) for text in texts)
    return prompt, *(text.removeprefix(prompt) for text in texts)


def scored(record):
    """What of each answer's document is scored."""
    pair = read_pair(record, unpaired=True)
    return [
        "".join(piece.text for piece in render([*pair.prompt, *turns]) if piece.trained)
        for turns in pair.answers if turns
    ]


PLAIN = ("User: 2+2?", "\n\nAssistant: 4", "\n\nAssistant: 5")


@pytest.mark.parametrize("record", [
    {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    {"prompt": "2+2?", "chosen": "4", "reject": "5"},
    {"question": "2+2?", "chosen": "4", "rejected": "5"},
    {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]},
    {"prompt": [USER], "chosen": "4", "rejected": "5"},
    {"prompt": "2+2?", "chosen": [FOUR], "rejected": [FIVE]},
    {"chosen": [USER, FOUR], "rejected": [USER, FIVE]},
    {"prompt": "2+2?", "messages": [USER, FOUR], "chosen": [USER, FOUR], "rejected": [USER, FIVE]},
    {"prompt": [USER], "chosen": [USER, FOUR], "rejected": [USER, FIVE]},
    {"conversations": [{"from": "human", "value": "2+2?"}],
     "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}},
    {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
    {"prompt": "2+2?", "system": None, "chosen": "4", "rejected": "5", "score": 3},
], ids=["text", "reject", "question", "messages", "answers as text", "answers as messages", "implicit prompt",
        "ultrafeedback", "prompt repeated", "sharegpt", "hh-rlhf", "null"])
def test_a_layout_gives_prompt_and_answers(record):
    assert written(record) == PLAIN


def test_an_instruction_is_answered_by_a_response():
    record = {"instruction": "Add.", "input": "2+2", "chosen": "4", "rejected": "5"}
    assert written(record) == ("Instruction: Add.\n\nInput: 2+2", "\n\nResponse: 4", "\n\nResponse: 5")


def test_a_system_text_and_functions_stand_in_front():
    record = {"prompt": "2+2?", "chosen": "4", "rejected": "5", "system": "Be short.", "tools": [{"name": "add"}]}
    assert written(record)[0].startswith('System: Be short.\nTools:\n[\n{"name":"add"}\n]')


def test_a_transcript_is_looked_for_only_where_there_is_no_prompt():
    record = {"prompt": "Write a play.", "chosen": "User: hi\n\nAssistant: ho", "rejected": "No."}
    assert written(record)[1] == "\n\nAssistant: User: hi\nAssistant: ho"


def test_earlier_answers_are_not_scored_and_all_later_ones_are():
    asked = [USER, FOUR, {"role": "user", "content": "sure?"}]
    tool = {"role": "tool", "content": "4"}
    record = {"prompt": asked, "chosen": [{"role": "assistant", "content": "add()"}, tool, FOUR], "rejected": [FIVE]}
    assert scored(record) == [" add()\n\n 4", " 5"]


def test_the_turns_that_conversations_begin_with_are_the_prompt():
    more = {"role": "user", "content": "sure?"}
    record = {"chosen": [USER, FOUR, more, FOUR], "rejected": [USER, FOUR, more, FIVE]}
    assert scored(record) == [" 4", " 5"]


def test_of_two_conversations_that_are_alike_the_last_turn_is_the_answer():
    assert scored({"chosen": [USER, FOUR], "rejected": [USER, FOUR]}) == [" 4", " 4"]


@pytest.mark.parametrize("record", [
    {"prompt": "2+2?", "completion": "4", "label": True},
    {"prompt": "2+2?", "completion": "4", "label": "True"},
    {"prompt": [USER], "completion": [FOUR], "label": 1},
    {"messages": [USER, FOUR], "label": True},
    {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "kto_tag": True},
], ids=["text", "csv", "messages", "conversation", "sharegpt"])
def test_one_answer_with_a_label_is_chosen_or_rejected(record):
    assert written(record, unpaired=True) == PLAIN[:2]
    label = "label" if "label" in record else "kto_tag"
    pair = read_pair({**record, label: False}, unpaired=True)
    assert pair.chosen is None
    assert pair.rejected is not None


def refused(record, unpaired=False):
    with pytest.raises(RecordError) as error:
        read_pair(record, unpaired=unpaired)
    return str(error.value)


@pytest.mark.parametrize(("record", "lacking"), [
    ({"prompt": "a", "chosen": "b"}, '{"prompt": ..., "chosen": ..., "rejected": ...} lacks "rejected"'),
    ({"question": "a", "reject": "b"}, '{"question": ..., "chosen": ..., "rejected": ...} lacks "chosen"'),
    ({"chosen": "a", "rejected": "b"}, 'lacks "prompt"'),
    ({"prompt": "a", "chosen": None, "rejected": "b"}, 'lacks "chosen"'),
    ({}, "found no field"),
])
def test_what_is_missing_is_named_by_the_nearest_layout(record, lacking):
    assert lacking in refused(record)


def test_a_single_answer_without_its_label_is_told_of_it_where_labels_are_read():
    record = {"prompt": "a", "completion": "b"}
    assert 'lacks "label"' in refused(record, unpaired=True)
    assert '"label"' not in refused(record)


@pytest.mark.parametrize(("record", "why"), [
    ({"prompt": "a", "chosen": " ", "rejected": "b"}, 'field "chosen" is an empty answer'),
    ({"prompt": "a", "chosen": "b", "reject": []}, 'field "reject" must be a list of turns that is not empty'),
    ({"prompt": "User: a\n\nAssistant:", "chosen": "b", "rejected": "c"}, 'ends in "Assistant:"'),
    ({"prompt": "a", "chosen": 3, "rejected": "c"}, 'field "chosen" must be text; found a number'),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "reject": "d"}, "are one field"),
    ({"prompt": "a", "question": "a", "chosen": "b", "rejected": "c"}, 'two layouts, "prompt" and "question"'),
    ({"prompt": [USER, FOUR], "chosen": "b", "rejected": "c"}, "ends in an assistant's turn"),
    ({"prompt": "a", "chosen": [FOUR, USER], "rejected": "c"}, '"chosen" must end in an assistant\'s turn'),
    ({"prompt": "a", "chosen": [USER, FOUR], "rejected": "c"}, "must both be answers, or both be whole conversations"),
    ({"prompt": [{"role": "user", "content": "other"}], "chosen": [USER, FOUR], "rejected": [USER, FIVE]},
     'and not with the turns of "prompt"'),
])
def test_a_record_that_cannot_be_used_is_refused_with_the_reason(record, why):
    assert why in refused(record)


def test_single_answers_are_for_kto_alone():
    record = {"prompt": "a", "completion": "b", "label": True}
    assert "only --objective kto reads" in refused(record)
    assert read_pair(record, unpaired=True).rejected is None


def test_a_label_is_true_or_false():
    assert "must be true or false; found 3" in refused({"prompt": "a", "completion": "b", "label": 3}, unpaired=True)


fields = st.sampled_from([
    "prompt", "question", "query", "problem", "instruction", "input", "messages", "conversations", "chosen", "rejected",
    "reject", "label", "kto_tag", "completion", "response", "answer", "system", "tools", "text", "raw", "history",
])
messages = st.fixed_dictionaries({}, optional={
    "role": st.sampled_from(["user", "assistant", "system", "tool", "nobody"]), "from": st.just("human"),
    "content": st.text(max_size=5) | st.none(), "value": st.just("a"), "weight": st.floats() | st.booleans(),
    "tool_calls": st.lists(st.text(max_size=3), max_size=2),
})
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | messages
    | st.sampled_from(["User: a\n\nAssistant: b", "\n\nHuman: a", "a"]) | st.lists(messages, max_size=3),
    lambda inner: st.lists(inner, max_size=2), max_leaves=4,
)


@settings(deadline=None)
@given(st.dictionaries(fields, values, max_size=5), st.booleans())
def test_any_record_is_read_or_refused_in_one_line(record, unpaired):
    refusals = []
    for read in (lambda: read_pair(record, unpaired=unpaired), lambda: read_prompt(record)):
        try:
            read()
        except RecordError as reason:
            refusals.append(str(reason))
    assert not any("\n" in refusal for refusal in refusals)


@settings(deadline=None)
@given(st.dictionaries(fields, st.sampled_from(["a", "b", [USER], [FOUR], [USER, FOUR], [USER, FIVE], True, FOUR])))
def test_a_pair_that_is_read_can_be_written_and_has_something_to_score(record):
    try:
        pair = read_pair(record, unpaired=True)
    except RecordError:
        return
    there = [turns for turns in pair.answers if turns is not None]
    assert there
    for turns in there:
        assert any(piece.trained for piece in render([*pair.prompt, *turns]))
    assert not any(turn.weight for turn in pair.prompt)
