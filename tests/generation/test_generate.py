"""Streaming text, stop texts, dialogue."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rwkvpeft.data.template import chat_prompt
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.errors import UserError
from rwkvpeft.generation.chat import Chat
from rwkvpeft.generation.generate import StopGate, TextGenerator
from rwkvpeft.generation.sampling import Sampler, SamplingConfig
from rwkvpeft.models.shape import new_shape

GREEDY = SamplingConfig(temperature=0)


class Script:
    """A model of bytes that says given texts, one after each reading of a prompt that ends in ':'.

    Its state is all it has read.
    """

    def __init__(self, *answers: bytes, vocab_size: int = 256):
        self.answers = list(answers)
        self.shape = new_shape("x070", n_layer=1, n_embd=8, vocab_size=vocab_size)
        self.emb = SimpleNamespace(weight=torch.zeros(1))
        self.head = torch.nn.Identity()
        self.calls: list[int] = []
        self.plan = b""

    def hidden(self, tokens, state):
        read = (state or b"") + bytes(tokens[0].tolist())
        self.calls.append(tokens.shape[1])
        if read.endswith(b":"):
            self.plan = self.answers.pop(0) if self.answers else b""
        following = self.plan[:1] or b"\0"
        self.plan = self.plan[1:]
        hidden = torch.zeros(1, tokens.shape[1], 256)
        hidden[0, -1, following[0]] = 1
        return hidden, read

    def generator(self, **settings):
        return TextGenerator(self, load_tokenizer("bytes"), **settings)


def said(model: Script, prompt: str = "Q:", max_tokens: int = 50, **settings) -> list[str]:
    return list(model.generator().stream(prompt, Sampler(GREEDY), max_tokens=max_tokens, **settings))


def test_text_ends_at_the_token_that_ends_a_document():
    assert "".join(said(Script(b"yes.\0no"))) == "yes."


def test_text_ends_after_so_many_tokens():
    model = Script(b"abcdefgh")
    assert "".join(said(model, max_tokens=3)) == "abc"
    # the last token is not read: nothing would come of it
    assert len(model.calls) == 3


def test_characters_of_several_tokens_come_whole():
    assert said(Script("aé🙂b".encode())) == ["a", "é", "🙂", "b"]


def test_an_unfinished_character_at_the_end_is_shown_as_unknown():
    assert "".join(said(Script("é".encode()[:1]))) == "\ufffd"


def test_a_stop_text_ends_the_answer_and_is_not_shown():
    pieces = said(Script(b"one\n\ntwo\n\nUser: x"), stop=["\n\nUser:"])
    assert "".join(pieces) == "one\n\ntwo"


def test_what_looked_like_a_stop_text_is_shown_in_the_end():
    assert "".join(said(Script(b"one\n\nUse"), stop=["\n\nUser:"])) == "one\n\nUse"


def test_a_prompt_is_read_in_chunks_and_answers_token_by_token():
    model = Script(b"xy")
    list(model.generator(chunk=4).stream("123456789:", Sampler(GREEDY), max_tokens=9))
    assert model.calls == [4, 4, 2, 1, 1]


def test_an_empty_prompt_is_the_beginning_of_a_document():
    model = Script()
    assert said(model, prompt="") == []
    assert model.calls == [1]


def test_a_tokenizer_with_ids_beyond_the_vocabulary_is_refused():
    with pytest.raises(UserError, match="--tokenizer"):
        said(Script(vocab_size=65))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_stop_gate_does_not_depend_on_how_the_text_is_cut(size):
    text = "aab aabb aaab\n\n\nUser: end"
    gate = StopGate(["\n\nUser:", "aabbc"])
    shown = "".join(gate.push(text[start : start + size]) for start in range(0, len(text), size)) + gate.finish()
    assert shown == "aab aabb aaab\n"
    assert gate.stopped


def test_a_dialogue_goes_on_from_the_turns_before():
    model = Script(b" one.\n\nUser: more", b" two.\0")
    chat = Chat(model.generator(), GREEDY, max_tokens=60)
    assert "".join(chat.answer("first\n\n?")) == " one."
    assert "".join(chat.answer("second")) == " two."
    assert chat._state == b"User: first\n?\n\nAssistant: one.\n\nUser: second\n\nAssistant: two.\n\n"


def test_an_answer_cut_short_stays_in_the_dialogue():
    model = Script(b" one two three")
    chat = Chat(model.generator(), GREEDY, max_tokens=60)
    answer = chat.answer("q")
    pieces = [next(answer) for _ in range(4)]
    answer.close()
    assert chat._state == (chat_prompt("q") + "".join(pieces) + "\n\n").encode()


def test_reset_forgets_the_dialogue():
    chat = Chat(Script(b" a\0", b" b\0").generator(), GREEDY, max_tokens=9)
    list(chat.answer("x"))
    chat.reset()
    list(chat.answer("y"))
    assert chat._state == b"User: y\n\nAssistant: b\n\n"
