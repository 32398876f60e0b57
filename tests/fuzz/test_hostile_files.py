"""Files made to do harm, each of its own kind: every one is refused, at once and with little memory."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rwkvpeft.checkpoints.files import load_tensors
from rwkvpeft.cli.train import main as train
from rwkvpeft.config.layer_profile import read_layer_profile
from rwkvpeft.config.parse import parse_train
from rwkvpeft.data.arrays import open_numpy
from rwkvpeft.data.binidx import BinidxSource, write_binidx
from rwkvpeft.data.jsonl import LARGEST_LINE_BYTES, read_records
from rwkvpeft.data.prompts import read_prompts
from rwkvpeft.data.records import JsonlSource
from rwkvpeft.data.tables import read_table
from rwkvpeft.data.tokenizer import Utf8Tokenizer
from rwkvpeft.data.vocabulary import read_vocabulary
from rwkvpeft.errors import UserError

pytestmark = pytest.mark.usefixtures("bounded")


def settings(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    return parse_train(["--config", str(tmp_path / "run.yaml")])


# --- binidx


def index(prefix, sizes, pointers, *, count=None, marks=None):
    count = len(sizes) if count is None else count
    marks = len(sizes) + 1 if marks is None else marks
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, count, marks)
    body = struct.pack(f"<{len(sizes)}i{len(sizes)}q{len(sizes) + 1}q", *sizes, *pointers, *range(len(sizes) + 1))
    (prefix.parent / f"{prefix.name}.idx").write_bytes(head + body)
    (prefix.parent / f"{prefix.name}.bin").write_bytes(bytes(20))
    return prefix


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 1 << 40},
        {"count": (1 << 64) - 1},
        {"marks": (1 << 64) - 1},
        {"count": (1 << 64) // 12, "marks": 0},
        {"sizes": [-5, 5]},
        {"sizes": [-(2**31), 5]},
        {"sizes": [2**31 - 1, 5]},
        {"pointers": [0, 18]},
        {"pointers": [0, -10]},
        {"pointers": [0, 2**63 - 2]},
        {"pointers": [0, -(2**63)]},
        {"pointers": [0, 9]},
        {"pointers": [0, 2**62]},
    ],
    ids=str,
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path, wrong):
    parts = {"sizes": [5, 5], "pointers": [0, 10], **wrong}
    with pytest.raises(UserError, match=r"data\.(idx|bin)"):
        BinidxSource(index(tmp_path / "data", **parts))


def test_the_index_that_the_others_are_made_of_is_read(tmp_path):
    source = BinidxSource(index(tmp_path / "data", [5, 5], [0, 10]))
    assert [len(source.read(document)) for document in range(len(source))] == [5, 5]


def test_a_mask_whose_weight_is_beyond_any_float_is_refused(tmp_path):
    write_binidx(tmp_path / "data", [np.arange(4)])
    footer = json.dumps({"voices": [[10**400, True, True, True]], "fingerprint": ""}).encode()
    (tmp_path / "data.mask").write_bytes(struct.pack("<8sQ", b"RWKVMASK", 4) + bytes(4) + footer)
    with pytest.raises(UserError, match=r"data\.mask"):
        BinidxSource(tmp_path / "data", with_mask=True)


# --- jsonl


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": ' + b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"text": "\xff"}',
        b'{"text": "\xed\xa0\x80"}',
        b'{"text": ' + b"9" * 100_000 + b"}",
        b"\x00",
        b'{"text": "\x00"}',
        b'{"text": "\\ud800"}',
        b'{"messages": [{"role": "user", "content": NaN}]}',
        b'{"messages": [{"role": "assistant", "content": "a", "weight": Infinity}]}',
        b"\xff\xfe{\x00}\x00",
        b'{"messages": [{"role": "tool", "content": {"a": ' + b"[" * 960 + b"]" * 960 + b"}}]}",
    ],
    ids=lambda line: ascii(line[:20]),
)
def test_a_hostile_line_is_refused_with_its_number(tmp_path, line):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=r"data\.jsonl:2: "):
        JsonlSource(path, Utf8Tokenizer())


def test_a_line_of_100_mb_is_refused_with_its_number_and_passed_over_where_asked(tmp_path):
    path = tmp_path / "data.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(100):
            file.write(b"a" * 1_000_000)
        file.write(b'"}\n{"text": "behind"}\n')
    with pytest.raises(UserError, match=f"data.jsonl:2: longer than {LARGEST_LINE_BYTES >> 20} MiB"):
        list(read_records(path))
    assert [(record.line, record.value["text"]) for record in read_records(path, skip_bad=True)] == [
        (1, "before"),
        (3, "behind"),
    ]


# --- settings


@pytest.mark.parametrize(
    "text",
    [
        "peft: !!python/object/apply:os.system ['touch hacked']",
        "peft: !!python/name:os.system",
        "- " * 3000,
        "peft_config: " + "[" * 3000,
        "micro_bsz: " + "9" * 5000,
        "epoch_save: 2001-99-99",
        "peft: !!int ''",
        "peft: !!bool maybe",
        "peft: !!float ''",
        "a: &a [*a]",
        "lr_init: .inf",
        'data_file: "a\\0b"',
        'data_file: "a\\ud800"',
        "? [a]\n: b",
        "a: \x00",
        "x" * 200_000,
        "peft_config: '" + "[" * 3000 + "'",
        "peft: lora\npeft_config: {r: " + "9" * 400 + "}",
    ],
    ids=lambda text: ascii(text[:30]),
)
def test_hostile_settings_are_refused(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = train(["--config", str(tmp_path / "run.yaml")]) if (tmp_path / "run.yaml").write_bytes(text.encode()) else 0
    assert code == 2
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "a: &a {x: 1}\n"
        + "".join(
            f"{b}: &{b}\n  <<: [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ),
    ],
)
def test_a_thousand_million_laughs_are_refused(tmp_path, text):
    with pytest.raises(UserError, match="written out"):
        settings(tmp_path, text)


def test_parts_used_again_in_settings_still_work(tmp_path):
    assert settings(tmp_path, "data: &a\n  ctx_len: 64\nmethod: {peft: lora}\n")["ctx_len"] == 64


def test_a_layer_profile_of_a_thousand_million_layers_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("layer,mode,rank\n0-999999999,lora,8\n")
    with pytest.raises(UserError, match="the layer is none"):
        read_layer_profile(tmp_path / "a.csv")


# --- tables, arrays, vocabularies


def test_a_table_whose_quote_never_ends_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("rwkvpeft.data.tables._LARGEST_ROW", 1 << 20)
    (tmp_path / "a.csv").write_text("text,other\n" + "a,b\n" * 100 + 'a,"' + "aaaa\n" * 300_000)
    with pytest.raises(UserError, match=r"a\.csv:\d+: (not csv: field larger|a row of more)"):
        list(read_table(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    "text", ["[", "[1", "[{}", "[{},", "[{},]", "[{}] x", "[{} {}]", "[" * 100_000, "[" + "9" * 5000 + "]", "[nul]"]
)
def test_a_broken_list_of_rows_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json"):
        list(read_table(tmp_path / "a.json"))


@pytest.mark.parametrize("space", ["", " ", "\n" * 3000])
def test_a_list_of_rows_is_read_item_by_item(tmp_path, space, monkeypatch):
    monkeypatch.setattr("rwkvpeft.data.tables._READ_AT_ONCE", 7)
    rows = [{"a": number, "b": ["x" * number]} for number in range(40)]
    (tmp_path / "a.json").write_text(json.dumps(rows).replace(", ", f",{space}") + space)
    assert [record.value for record in read_table(tmp_path / "a.json")] == rows


def test_a_list_of_many_small_rows_is_read_in_a_moment(tmp_path):
    (tmp_path / "a.json").write_text("[" + ",".join(['{"a":1}'] * 400_000) + "]")
    assert sum(1 for _ in read_table(tmp_path / "a.json")) == 400_000


def test_a_packed_array_that_is_a_bomb_is_refused(tmp_path):
    from rwkvpeft.config.groups import DataConfig

    np.savez_compressed(tmp_path / "a.npz", np.zeros(1 << 26, dtype=np.uint8))
    with pytest.raises(UserError, match="unpacked"):
        open_numpy(DataConfig(data_file=str(tmp_path / "a.npz")))


@pytest.mark.parametrize(
    "line",
    [
        "1 __import__('os').system('touch hacked') 1",
        "1 " + "(" * 5000 + " 1",
        "1 " + "-" * 7000 + "1 1",
        "99999999 'a' 1",
        "1 'a'*999999999 1",
        "9" * 5000 + " 'a' 1",
        "1 " + "'" + "a" * 10_000 + "' 10000",
    ],
    ids=lambda line: line[:20],
)
def test_a_hostile_vocabulary_is_refused(tmp_path, line, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vocab.txt").write_text(line + "\n")
    with pytest.raises(UserError, match=r"vocab\.txt:1"):
        read_vocabulary(tmp_path / "vocab.txt")
    assert not (tmp_path / "hacked").exists()


# --- what is no file

READERS = {
    "checkpoint": load_tensors,
    "settings": lambda path: parse_train(["--config", str(path)]),
    "profile": read_layer_profile,
    "jsonl": lambda path: list(read_records(path)),
    "prompts": read_prompts,
    "vocabulary": read_vocabulary,
    "table": lambda path: list(read_table(path)),
}


@pytest.fixture(params=["fifo", "loop", "folder", "device", "absent", "long name", "NUL"])
def no_file(request, tmp_path):
    path = tmp_path / "thing"
    if request.param == "fifo":
        os.mkfifo(path)
    elif request.param == "loop":
        path.symlink_to(path)
    elif request.param == "folder":
        path.mkdir()
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    elif request.param == "long name":
        path = tmp_path / ("n" * 5000)
    elif request.param == "NUL":
        path = tmp_path / "a\0b"
    return path


@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_refused_at_once(no_file, reader):
    with pytest.raises(UserError):
        READERS[reader](no_file)


@pytest.mark.parametrize(
    "name", ["$(touch hacked)", "; touch hacked", "a\nb", "'\"", "-rf", "a b", "`touch hacked`", "\u202e", "*"]
)
def test_a_name_with_characters_of_a_shell_is_a_name(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_binidx(tmp_path / name, [np.arange(4)])
    assert len(BinidxSource(tmp_path / name)) == 1
    (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n')
    assert len(list(read_records(tmp_path / f"{name}.jsonl"))) == 1
    assert not (tmp_path / "hacked").exists()


def test_a_name_that_is_no_text_ends_a_command_with_a_message(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff\xfe.jsonl"
    with open(name, "wb") as file:
        file.write(b'{"text": "\xff"}\n')
    command = Path(__file__).parents[2] / "make_data.py"
    done = subprocess.run(
        [sys.executable, command, name, b"1", b"8", b"--tokenizer", b"bytes"],
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONUTF8": "1"},
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert b"Traceback" not in done.stderr
