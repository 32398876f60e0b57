"""Texts become ids and come back, whatever the ids are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpeft.data.tokenizer import IncrementalDecoder, load_tokenizer, world_vocabulary_path
from rwkvpeft.data.vocabulary import read_vocabulary
from rwkvpeft.errors import UserError

TEXT = "User: 你好, naïve 👩‍👩‍👧 \u2028\x85\r\n\tdef f(x): return x\n\n\n"
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=80)


@pytest.fixture(scope="module")
def world():
    return load_tokenizer("world")


@pytest.fixture(scope="module")
def own_world(tmp_path_factory):
    """The World vocabulary as a user's file, with one more token so that it is not recognised."""
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_bytes(world_vocabulary_path().read_bytes().rstrip() + b"\n65530 '<|a marker of a user|>' 22\n")
    return load_tokenizer(str(path))


@pytest.mark.parametrize("name", ["world", "bytes", "utf-16le"])
def test_a_text_comes_back_from_its_tokens(name):
    tokenizer = load_tokenizer(name)
    tokens = tokenizer.encode(TEXT)
    assert tokenizer.decode(tokens) == TEXT
    assert tokenizer.spell(np.array(tokens)) == tokenizer.to_bytes(TEXT)
    assert max(tokens) < tokenizer.vocab_size


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_our_greedy_match_gives_the_ids_of_the_rust_tokenizer(world, own_world, text):
    assert own_world.encode(text) == world.encode(text)


def test_a_token_of_the_users_vocabulary_is_found(own_world):
    assert own_world.encode("x<|a marker of a user|>") == [own_world.encode("x")[0], 65530]
    assert own_world.vocab_size == 65531


def test_known_world_ids(world):
    assert world.encode("Today is a beautiful day. 今天是美好的一天。") == [
        33520, 4600, 332, 59219, 21509, 47, 33, 10381, 11639, 13091, 15597, 11685, 14734, 10250, 11639, 10080,
    ]  # fmt: skip
    assert world.vocab_size == 65536


def test_the_end_of_a_document_and_unknown_ids_spell_nothing(world):
    for token in (0, 65530, 65535, 65536, 1 << 40, -1):
        assert world.token_bytes(token) == b""
    assert world.decode([0, *world.encode("a"), 65535, -7]) == "a"


def test_half_a_character_decodes_to_a_replacement(world):
    assert world.decode(world.encode("👩")[:1]) == "\ufffd"


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(-5, 70000), max_size=30))
def test_any_ids_decode_and_the_stream_decodes_the_same(world, tokens):
    decoder = IncrementalDecoder(world)
    pieces = [decoder.push(token) for token in tokens]
    assert "".join(pieces) + decoder.finish() == world.decode(tokens)


def test_the_stream_holds_back_a_character_until_it_is_whole():
    tokenizer = load_tokenizer("bytes")
    decoder = IncrementalDecoder(tokenizer)
    assert [decoder.push(token) for token in tokenizer.encode("é!")] == ["", "é", "!"]


def test_a_stream_that_stops_inside_a_character_says_so_once():
    decoder = IncrementalDecoder(load_tokenizer("bytes"))
    assert decoder.push(0xC3) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.finish() == ""


@pytest.mark.parametrize("name", ["world", "bytes", "utf-16le"])
def test_half_of_a_surrogate_pair_is_a_users_error(name):
    with pytest.raises(UserError, match=r"\\ud83d at character 2"):
        load_tokenizer(name).encode("ab\ud83d")


def test_utf16_bytes_are_little_endian_pairs():
    assert load_tokenizer("utf-16le").encode("A你") == [0x41, 0, 0x60, 0x4F]


def test_the_byte_tokenizer_refuses_the_byte_that_ends_documents():
    with pytest.raises(UserError, match="character 1"):
        load_tokenizer("bytes").encode("a\0")


def test_the_path_of_the_world_vocabulary_means_the_world_tokenizer(world, tmp_path):
    path = tmp_path / "rwkv_vocab_v20230424.txt"
    path.write_bytes(world_vocabulary_path().read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert type(load_tokenizer(str(path))) is type(world)


def test_the_vocabulary_equals_the_inference_packages(world):
    package = pytest.importorskip("rwkv")
    other = read_vocabulary(Path(package.__path__[0]) / "rwkv_vocab_v20230424.txt")
    assert list(world.table[: len(other)]) == other


def test_a_small_vocabulary_matches_the_longest_token(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("1 'a' 1\n2 'ab' 2\n3 'abcd' 4\n4 b'\\xc3' 1\n5 'b' 1\n6 'c' 1\n7 b'\\xa9' 1\n8 \"'\" 1\n")
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.encode("abcabcdé'") == [2, 6, 3, 4, 7, 8]
    with pytest.raises(UserError, match="0x7a"):
        tokenizer.encode("az")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("2 'abc' 2", "has 3 bytes"),
        ("1 'b' 1", "listed twice"),
        ("2 'a' 1", "spell the same"),
        ("0 'b' 1", "outside"),
        ("2 __import__('os').getcwd() 5", "malformed"),
        ("nonsense", "invalid literal"),
        ("2 7 1", "int"),
    ],
)
def test_a_broken_vocabulary_line_is_named(tmp_path, line, reason):
    path = tmp_path / "vocab.txt"
    path.write_text(f"1 'a' 1\n{line}\n")
    with pytest.raises(UserError, match=rf"vocab.txt:2: .*{reason}"):
        load_tokenizer(str(path))


def test_an_unknown_name_is_a_users_error():
    with pytest.raises(UserError, match="neither a name nor a file"):
        load_tokenizer("wrld")
