import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkvpeft.data.conversation import RecordError, answer_spans, document_text, segments

CHAT = {
    "messages": [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "One\n\n\nTwo"},
        {"role": "assistant", "content": "A\r\n\r\nB"},
        {"role": "user", "content": "More"},
        {"role": "assistant", "content": "C"},
    ]
}
CHAT_TEXT = "System: Be brief.\n\nUser: One\nTwo\n\nAssistant: A\nB\n\nUser: More\n\nAssistant: C"
TRICKY = st.text(alphabet=st.sampled_from("\n\r:a é\U0001f600"), max_size=12) | st.sampled_from(
    ["Assistant: x", "\n\nAssistant: x", "a\n\n\nUser: b", "Response: y", "\r\n\r\nSystem:", ""]
)
CHATS = st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), TRICKY), min_size=1, max_size=6)


def chat(turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_a_text_is_the_document_as_it_is():
    assert document_text({"text": " a\n\n\nb ", "messages": 3}) == " a\n\n\nb "


def test_another_field_can_hold_the_text():
    assert document_text({"body": "x", "text": "y"}, text_key="body") == "x"


def test_messages_are_rendered_in_the_world_layout():
    assert document_text(CHAT) == CHAT_TEXT


def test_conversations_are_rendered_as_messages_are():
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in CHAT["messages"]]
    assert document_text({"conversations": turns}) == CHAT_TEXT


def test_an_instruction_with_input_has_three_parts():
    record = {"instruction": "Add", "input": "1 2", "output": "3"}
    assert document_text(record) == "Instruction: Add\n\nInput: 1 2\n\nResponse: 3"


@pytest.mark.parametrize("without", [{}, {"input": ""}, {"input": None}, {"input": " \n"}])
def test_an_instruction_without_input_has_no_input_part(without):
    assert document_text({"instruction": "Add", "output": "3", **without}) == "Instruction: Add\n\nResponse: 3"


def test_the_answer_is_trained_from_the_colon_to_the_separator():
    trained = [piece.text for piece in segments(CHAT) if piece.trained]
    assert trained == [" A\nB\n\n", " C"]


def test_a_response_is_trained():
    last = segments({"instruction": "Add", "output": "3"})[-1]
    assert (last.text, last.trained) == (" 3", True)


def test_the_input_of_an_instruction_is_not_trained():
    pieces = segments({"instruction": "Add", "input": "Response: 4", "output": "3"})
    assert [piece.text for piece in pieces if piece.trained] == [" 3"]


@given(CHATS)
def test_the_segments_joined_are_the_document(turns):
    record = chat(turns)
    assert "".join(piece.text for piece in segments(record)) == document_text(record)


@given(CHATS)
def test_no_word_of_the_user_can_pose_as_an_answer(turns):
    record = chat(turns)
    assert segments({"text": document_text(record)}) == segments(record)


@given(TRICKY)
def test_spans_of_text_and_of_its_bytes_are_the_same(text):
    document = "User: q\n\nAssistant:" + text
    from_text = [len(document[:place].encode()) for span in answer_spans(document) for place in span]
    assert from_text == [place for span in answer_spans(document.encode()) for place in span]


def test_a_response_inside_a_chat_is_content():
    assert answer_spans("User: what is\n\nResponse: 200\n\nAssistant: ok") == [(40, 43)]


def test_a_header_in_the_middle_of_a_line_starts_no_turn():
    assert answer_spans("I am an Assistant: hello\nAssistant: hello") == []


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, ['"prompt", "chosen"', "messages"]),
        ({}, ["no field"]),
        ({"text": 5}, ['"text" must be text', "a number"]),
        ({"text": None}, ["null"]),
        ({"messages": []}, ["an empty list"]),
        ({"messages": ["hi"]}, ["turn 1", '"role"']),
        ({"messages": [{"role": "user", "text": "a"}]}, ["turn 1", '"content"', '"text"']),
        ({"messages": [{"role": "narrator", "content": "a"}]}, ["'narrator'", "assistant"]),
        ({"conversations": [{"from": "human", "value": ["a"]}]}, ["turn 1", "a list"]),
        ({"instruction": "a"}, ['found "instruction"']),
        ({"instruction": "a", "output": 3}, ['"output"', "a number"]),
    ],
)
def test_a_record_that_is_no_document_is_refused_with_what_was_found(record, words):
    with pytest.raises(RecordError) as error:
        segments(record)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)
