"""Which records are read, and what is said of those that are not."""

from __future__ import annotations

import pytest

from rwkvpeft.data.conversation import RecordError, document_text, segments


def chat(turn):
    return {"messages": [{"role": "user", "content": "q"}, turn]}


@pytest.mark.parametrize(
    ("asked", "answered"),
    [("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"),
     ("question", "response"), ("input", "output")],
)
def test_two_fields_are_a_question_and_its_answer(asked, answered):
    assert document_text({asked: "a", answered: "b", "id": 7}) == "User: a\n\nAssistant: b"


def test_the_answer_to_an_instruction_may_be_called_response_and_its_input_context():
    assert document_text({"instruction": "a", "context": "b", "response": "c"}) == (
        "Instruction: a\n\nInput: b\n\nResponse: c"
    )


def test_either_way_of_naming_turns_is_read_under_either_field():
    assert document_text({"conversations": [{"role": "user", "content": "a"}]}) == "User: a"
    assert document_text({"messages": [{"from": "human", "value": "a"}]}) == "User: a"


def test_null_is_as_good_as_absent():
    turn = {"role": "assistant", "content": "a", "tool_calls": None, "weight": None, "reasoning_content": None}
    assert document_text({**chat(turn), "tools": None, "system": None}) == "User: q\n\nAssistant: a"


def test_functions_given_as_text_are_taken_as_json_or_as_they_are():
    listed = {**chat({"role": "assistant", "content": "a"}), "tools": '[{"name": "f", "arguments": {}}]'}
    assert document_text(listed).startswith('System: Tools:\n[\n{"name":"f","arguments":{}}\n]\nReturn only')
    assert document_text({**listed, "tools": "- f(x)"}).startswith("System: Tools:\n- f(x)\nReturn only")


def test_arguments_that_may_be_left_out_are_told():
    parameters = {"properties": {"a": {}, "b": {}}, "required": ["a"]}
    record = {**chat({"role": "assistant", "content": "a"}), "tools": [{"name": "f", "parameters": parameters}]}
    assert '{"name":"f","arguments":{"a":{},"b":{}},"required":["a"]}' in document_text(record)


@pytest.mark.parametrize("switch", [{"train": False}, {"training": False}, {"loss": False}, {"loss": 0}, {"weight": 0}])
def test_every_common_switch_takes_a_turn_out_of_training(switch):
    assert not any(part.trained for part in segments(chat({"role": "assistant", "content": "a", **switch})))


def test_a_switch_that_is_off_may_stand_on_any_turn():
    assert segments({"messages": [{"role": "user", "content": "q", "train": False, "weight": 0}]})


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": [], "conversations": []}, ["two layouts", '"messages" and "conversations"']),
        ({"prompt": "a", "completion": "b", "response": "c"}, ["two layouts", '"prompt"/"response"']),
        ({"instruction": "a", "output": "b", "response": "c"}, ["two layouts"]),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, ['"history"', "messages"]),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["a pair of answers and no document", "--objective dpo"]),
        ({"prompt": "a", "chosen": "b", "reject": "c"}, ["a pair of answers and no document"]),
        ({"prompt": "User: a\n\nAssistant:", "completion": "b"}, ['ends in "Assistant:"']),
        ({"prompt": "a", "completion": None}, ['"completion" must be text', "null"]),
        (chat({"role": "assistant", "content": None}), ["turn 2", "null"]),
        (chat({"role": "assistant", "content": [{"type": "image_url"}]}), ["part 1", "'image_url'"]),
        (chat({"role": "assistant", "content": "a", "weight": -1}), ['"weight" of turn 2', "-1"]),
        (chat({"role": "assistant", "content": "a", "weight": float("nan")}), ['"weight" of turn 2']),
        # larger than fp32 and than any float
        (chat({"role": "assistant", "content": "a", "weight": 1e39}), ['"weight" of turn 2']),
        (chat({"role": "assistant", "content": "a", "weight": 10**400}), ['"weight" of turn 2']),
        (chat({"role": "assistant", "content": "a", "train": "no"}), ['"train" of turn 2', "'no'"]),
        (chat({"role": "user", "content": "a", "train": True}), ["turn 2", "only an assistant's"]),
        (chat({"role": "assistant", "content": "<think>a", "reasoning": "b"}), ['"reasoning"', "leave one out"]),
        (chat({"role": "assistant", "tool_calls": [{"name": 3}]}), ["call 1 of turn 2"]),
        (chat({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}), ["must be JSON"]),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, ["must be JSON"]),
        ({**chat({"role": "assistant", "content": "a"}), "tools": [{"type": "function"}]}, ["function 1", '"name"']),
    ],
)
def test_a_record_that_cannot_be_honoured_is_refused_in_one_line(record, words):
    with pytest.raises(RecordError) as error:
        segments(record)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
