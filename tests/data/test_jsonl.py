"""Files of JSON lines: precise errors, the right ends of lines, and documents as tokens."""

from __future__ import annotations

import itertools
import json

import pytest

from rwkvpeft.data import parallel
from rwkvpeft.data.jsonl import blocks, read_block, read_records
from rwkvpeft.data.records import JsonlSource
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.data.vocabulary import write_characters
from rwkvpeft.errors import UserError


@pytest.fixture
def jsonl(tmp_path):
    def write(content):
        path = tmp_path / "data.jsonl"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def test_records_come_with_their_line_numbers(jsonl):
    path = jsonl('{"a": 1}\n\n   \r{"a": 2}\r\n\t{"a": 3} \u00a0')
    assert [(record.line, record.value) for record in read_records(path)] == [
        (1, {"a": 1}),
        (4, {"a": 2}),
        (5, {"a": 3}),
    ]


def test_only_lf_cr_and_crlf_end_a_line(jsonl):
    text = "one\u2028two\u0085three\x0bfour\x1cfive"
    path = jsonl(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    assert [record.value["text"] for record in read_records(path)] == [text]


def test_a_byte_order_mark_at_the_start_is_dropped(jsonl):
    assert next(iter(read_records(jsonl(b'\xef\xbb\xbf{"a": 1}')))).value == {"a": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', r"not valid JSON: .* at character 12"),
        (b"[1, 2]", "not a JSON object but a list"),
        (b"3.5", "not a JSON object but a number"),
        (b'{"text": "ab\xff"}', "invalid UTF-8 at byte 12"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not readable JSON"),
    ],
)
def test_a_bad_line_is_named_with_file_line_and_beginning(jsonl, line, message):
    path = jsonl(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"data\.jsonl:3: {message}") as error:
        list(read_records(path))
    shown = line[:80].decode("utf-8", errors="replace")
    assert shown in str(error.value)
    assert line[:90].decode("utf-8", errors="replace") not in str(error.value) or len(line) <= 80


def test_bad_lines_can_be_skipped(jsonl):
    path = jsonl('{"a": 1}\nnonsense\n{"a": 2}\n')
    assert [record.line for record in read_records(path, skip_bad=True)] == [1, 3]


def test_control_characters_of_a_bad_line_do_not_reach_the_terminal(jsonl):
    with pytest.raises(UserError) as error:
        list(read_records(jsonl("\x1b[31m bad")))
    assert "\x1b" not in str(error.value)


def test_a_file_in_utf16_is_recognised(jsonl):
    with pytest.raises(UserError, match="looks like UTF-16"):
        list(read_records(jsonl('{"text": "a"}'.encode("utf-16"))))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_records_is_refused(jsonl, content):
    with pytest.raises(UserError, match="holds no record"):
        list(read_records(jsonl(content)))


def test_a_path_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        list(read_records(tmp_path))


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
@pytest.mark.parametrize("block_bytes", [1, 2, 3, 4, 5, 7, 100])
def test_blocks_of_any_size_hold_the_same_lines(jsonl, end, block_bytes):
    lines = ["ab", "", "c", "defgh", "", "", "i"]
    path = jsonl(end.join(lines))
    ranges = list(blocks(path, block_bytes))
    assert [line.decode() for start, stop in ranges for line in read_block(path, start, stop)] == lines


def test_a_line_longer_than_any_buffer_is_one_block(jsonl):
    path = jsonl("a" * 200_000 + "\r\n" + "b" * 70_000)
    assert list(blocks(path, 10)) == [(0, 200_002), (200_002, 270_002)]


def test_documents_are_tokens_with_a_final_zero(jsonl):
    tokenizer = load_tokenizer("world")
    source = JsonlSource(jsonl('{"text": "Hello"}\n{"text": ""}\n{"text": "a b"}'), tokenizer)
    documents = [[*tokenizer.encode(text), 0] for text in ("Hello", "", "a b")]
    assert [source.read(i).tolist() for i in range(len(source))] == documents
    assert source.tokens(0, source.n_tokens).tolist() == list(itertools.chain(*documents))
    assert source.stream.dtype == "uint16"


def test_only_the_assistants_tokens_are_trained_and_the_end_is_too(jsonl):
    tokenizer = load_tokenizer("world")
    turns = [("user", "Hi, you?"), ("assistant", "Fine, 你好"), ("user", "Why?"), ("assistant", "Because.")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    source = JsonlSource(jsonl(json.dumps(record)), tokenizer)
    tokens, mask = source.read(0).tolist(), source.spoken(0).answers()
    assert tokenizer.decode([t for t, m in zip(tokens, mask, strict=True) if m]) == " Fine, 你好\n\n Because."
    assert mask[-1] == 1
    assert tokens[:-1] == tokenizer.encode(tokenizer.decode(tokens))


def test_a_last_turn_of_the_user_leaves_the_end_untrained(jsonl):
    record = {"messages": [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Bye"}]}
    assert JsonlSource(jsonl(json.dumps(record)), load_tokenizer("bytes")).spoken(0).answers()[-1] == 0


def test_a_record_that_is_no_document_is_named(jsonl):
    with pytest.raises(UserError, match=r"data\.jsonl:2: field \"text\" must be text; found a number"):
        JsonlSource(jsonl('{"text": "a"}\n{"text": 5}'), load_tokenizer("bytes"))


def test_text_that_cannot_be_encoded_is_named(jsonl):
    with pytest.raises(UserError, match=r"data\.jsonl:1: .*surrogate"):
        JsonlSource(jsonl('{"text": "a\\ud800"}'), load_tokenizer("world"))


def test_a_token_above_the_models_vocabulary_is_refused(jsonl):
    source = JsonlSource(jsonl('{"text": "ab"}\n{"text": "az"}'), load_tokenizer("bytes"))
    source.check(256)
    with pytest.raises(UserError, match="document 1, position 1"):
        source.check(ord("c"))


def test_a_vocabulary_without_a_token_for_the_end_is_refused(jsonl, tmp_path):
    write_characters(tmp_path / "vocab.json", sorted(set("hello")))
    with pytest.raises(UserError, match="none for the end of a document"):
        JsonlSource(jsonl('{"text": "hello"}'), load_tokenizer(str(tmp_path / "vocab.json")))


def test_a_large_file_is_the_same_from_several_processes(jsonl, monkeypatch):
    path = jsonl("\n".join(json.dumps({"text": f"User: {i}\n\nAssistant: {'a' * (i % 5)}"}) for i in range(40)))
    alone = JsonlSource(path, load_tokenizer("bytes"))
    monkeypatch.setattr(parallel, "blocks", lambda path: blocks(path, 300))
    monkeypatch.setattr(parallel, "_suitable_workers", lambda path: 2)
    seen = []
    together = JsonlSource(path, load_tokenizer("bytes"), report=seen.append)
    assert together.stream.tolist() == alone.stream.tolist()
    assert together.sizes.tolist() == alone.sizes.tolist()
    for index in range(40):
        assert together.spoken(index).answers().tolist() == alone.spoken(index).answers().tolist()
    assert len(seen) > 2
    assert seen[-1].done == seen[-1].total


def test_a_bad_line_of_a_large_file_has_its_number(jsonl, monkeypatch):
    path = jsonl('{"text": "a"}\n' * 30 + "nonsense\n")
    monkeypatch.setattr(parallel, "blocks", lambda path: blocks(path, 50))
    with pytest.raises(UserError, match=r"data\.jsonl:31: not valid JSON"):
        JsonlSource(path, load_tokenizer("bytes"))
