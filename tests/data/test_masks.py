from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpeft.data import tokenizer as tokenizers
from rwkvpeft.data.conversation import segments
from rwkvpeft.data.masks import qa_weights, se_weights
from rwkvpeft.errors import UserError

TOKENIZERS = ["world", "bytes", "utf-16le"]
CHAT = "System: s\n\nUser: q。\n\nAssistant: a。\n\n\nUser: q2\n\nAssistant: b"

# the World vocabulary is read once for all tests
load_tokenizer = lru_cache(tokenizers.load_tokenizer)


def document(text, tokenizer):
    return np.array([*tokenizer.encode(text), 0])


def trained_text(tokens, weights, tokenizer):
    """The trained parts joined by |, the final token shown as <0>."""
    shown = []
    for place, (token, weight) in enumerate(zip(tokens.tolist(), weights, strict=True)):
        if weight:
            shown.append(b"<0>" if place == len(tokens) - 1 else tokenizer.token_bytes(token))
        elif shown and shown[-1] != b"|":
            shown.append(b"|")
    if tokenizer.name == "utf-16le":
        return b"".join(shown).replace(b"\0", b"").decode()
    return b"".join(shown).decode()


def qa(text, name="world"):
    tokenizer = load_tokenizer(name)
    tokens = document(text, tokenizer)
    return trained_text(tokens, qa_weights(tokens, tokenizer), tokenizer)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_answer_its_separator_and_the_final_zero_are_trained(name):
    text = CHAT.replace("。", ".")
    assert qa(text, name) == " a.\n\n\n| b<0>"


def test_answers_of_wide_characters_are_trained_whole():
    assert qa(CHAT) == " a。\n\n\n| b<0>"


def test_the_end_after_a_user_turn_is_not_trained():
    assert qa("User: q\n\nAssistant: a\n\nUser: r") == " a\n\n|"


def test_a_document_without_an_answer_has_no_trained_token():
    assert qa("The Assistant: of someone.\nAssistant: x") == ""


def test_a_prompt_without_its_answer_has_no_trained_token():
    assert qa("User: q\n\nAssistant:") == ""


def test_a_response_to_an_instruction_is_trained():
    assert qa("Instruction: i\n\nInput: x\n\nResponse: r\n\ns") == " r\n\ns<0>"


def test_an_answer_with_windows_line_ends_is_found():
    assert qa("User: q\r\n\r\nAssistant: a") == " a<0>"


def test_each_document_between_zeros_is_read_for_itself():
    tokenizer = load_tokenizer("world")
    one, two = document("User: q\n\nAssistant: a", tokenizer), document("Assistant: in prose", tokenizer)
    both = qa_weights(np.concatenate([one, two]), tokenizer)
    assert np.array_equal(both, np.concatenate([qa_weights(one, tokenizer), qa_weights(two, tokenizer)]))


def test_no_tokens_have_no_weights():
    assert qa_weights(np.array([], dtype=np.int64), load_tokenizer("world")).shape == (0,)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), st.text(max_size=12)), min_size=1, max_size=5),
    st.sampled_from(TOKENIZERS),
)
def test_no_byte_of_a_prompt_is_trained(turns, name):
    tokenizer = load_tokenizer(name)
    turns = [(role, content.replace("\0", "")) for role, content in turns]
    pieces = segments({"messages": [{"role": role, "content": content} for role, content in turns]})
    allowed = [piece.trained for piece in pieces for _ in tokenizer.to_bytes(piece.text)]
    tokens = document("".join(piece.text for piece in pieces), tokenizer)
    weights, place = qa_weights(tokens, tokenizer), 0
    for token, weight in zip(tokens[:-1].tolist(), weights, strict=False):
        end = place + len(tokenizer.token_bytes(token))
        assert not weight or all(allowed[place:end])
        place = end


def test_a_token_id_the_tokenizer_lacks_is_refused():
    with pytest.raises(UserError, match="300"):
        qa_weights(np.array([300, 0]), load_tokenizer("bytes"))


def se(text, start, end, name="world"):
    tokenizer = load_tokenizer(name)
    tokens = document(text, tokenizer)
    return trained_text(tokens, se_weights(tokens, tokenizer, start, end), tokenizer)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_stands_between_the_markers_is_trained_without_them(name):
    assert se("a <s> b </s> c <s> d </s> e", "<s>", "</s>", name).replace(" ", "") == "b|d|"


def test_without_the_second_marker_the_rest_of_the_document_is_trained():
    assert se("a <<< b", "<<<", ">>>") == " b<0>"


def test_without_the_first_marker_nothing_is_trained():
    assert se("a b >>>", "<<<", ">>>") == ""


def test_the_same_text_can_mark_both_ends():
    assert se("a\n||b\n||c", "||", "||", "bytes") == "b\n|"


def test_an_empty_marker_is_refused():
    with pytest.raises(UserError, match="--mask_id"):
        se("a", "", "b")
