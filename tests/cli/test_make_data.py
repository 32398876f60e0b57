"""make_data.py as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkvpeft.cli.make_data import main
from rwkvpeft.data.binidx import BinidxSource
from rwkvpeft.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_texts(path, texts, key="text"):
    path.write_text("\n".join(json.dumps({key: text}, ensure_ascii=False) for text in texts), encoding="utf-8")
    return path


def run_script(folder, *arguments, **options):
    command = [sys.executable, str(ROOT / "make_data.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.mark.golden
@pytest.mark.parametrize("run", [0, 1])
def test_the_files_are_upstreams_byte_for_byte(golden, folder, capsys, run):
    case = json.loads((golden / "make_data.json").read_text())["runs"][run]
    source = golden / case["jsonl"]
    assert main([str(source), *case["argv"][1:], "--seed", str(case["seed"])]) == 0
    for suffix in (".bin", ".idx"):
        name = source.with_suffix(suffix).name
        assert (folder / name).read_bytes() == (golden / name).read_bytes()
    assert (case["console"][-1] in capsys.readouterr().out) == (case["magic_prime"] is not None)


@pytest.mark.golden
def test_worker_processes_change_nothing(golden, folder):
    done = run_script(folder, golden / "make_data_a.jsonl", 3, 64, "--seed", 20240501, "--workers", 2)
    assert done.returncode == 0, done.stderr
    for suffix in (".bin", ".idx"):
        assert (folder / f"make_data_a{suffix}").read_bytes() == (golden / f"make_data_a{suffix}").read_bytes()


def test_every_layout_is_accepted(folder):
    records = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "input": "", "output": "b"},
        {"text": "plain"},
    ]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert main(["in.jsonl", "1", "512", "--seed", "1", "--tokenizer", "bytes"]) == 0
    source, tokenizer = BinidxSource("in"), load_tokenizer("bytes")
    chat = "User: a\n\nAssistant: b"
    expected = sorted([chat, chat, "Instruction: a\n\nResponse: b", "plain"])
    assert sorted(tokenizer.decode(source.read(i).tolist()) for i in range(4)) == expected


def test_output_text_key_and_seed_are_obeyed(folder):
    write_texts(folder / "in.jsonl", [str(i) for i in range(50)], key="content")
    flags = ["in.jsonl", "2", "8", "--text_key", "content"]
    for name, seed in (("a/one", "5"), ("a/two.bin", "5"), ("a/three", "6")):
        assert main([*flags, "--output", name, "--seed", seed]) == 0
    one, two, three = ((folder / "a" / f"{name}.bin").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


def test_without_a_seed_the_one_used_is_printed(folder, capsys):
    write_texts(folder / "in.jsonl", [str(i) for i in range(50)])
    assert main(["in.jsonl", "1", "8", "--output", "one"]) == 0
    seed = capsys.readouterr().out.split("--seed ")[1].split()[0]
    assert main(["in.jsonl", "1", "8", "--output", "two", "--seed", seed]) == 0
    assert (folder / "one.bin").read_bytes() == (folder / "two.bin").read_bytes()


def test_first_and_last_document_are_previewed(folder, capsys):
    write_texts(folder / "in.jsonl", ["a" * 150 + "é" * 150])
    assert main(["in.jsonl", "1", "8", "--tokenizer", "bytes"]) == 0
    out = capsys.readouterr().out
    assert "a" * 100 + "\n" in out
    assert "\n" + "é" * 50 + "\n" in out


def test_a_bad_line_stops_everything_and_is_named(folder, capsys):
    (folder / "in.jsonl").write_text('{"text": "a"}\n' * 6 + '{"text": nonsense}\n{"text": "b"}\n')
    assert main(["in.jsonl", "1", "8"]) == 2
    error = capsys.readouterr().err
    assert "error: in.jsonl:7: not valid JSON" in error
    assert '{"text": nonsense}' in error
    assert [path.name for path in folder.iterdir()] == ["in.jsonl"]


def test_bad_lines_are_counted_and_skipped_when_asked(folder, capsys):
    (folder / "in.jsonl").write_bytes(b'{"text": "a"}\n{"text": 3}\n\xff\n{"text": "\\udc00"}\n{"text": "b"}\n')
    assert main(["in.jsonl", "1", "8", "--skip_bad_lines", "--seed", "0"]) == 0
    out = capsys.readouterr().out
    assert "skipped 3 bad lines, the first: in.jsonl:2: " in out
    assert len(BinidxSource("in")) == 2


@pytest.mark.parametrize("setting", [{"weight": 0.5}, {"train": False}])
def test_weights_that_a_pair_without_a_mask_drops_are_told(folder, capsys, setting):
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    chats = [[question, {**answer, **setting}], [question, answer]]
    (folder / "in.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in chats))
    assert main(["in.jsonl", "1", "8"]) == 0
    assert "note: 1 document with a \"weight\" of turns" in capsys.readouterr().out
    assert main(["in.jsonl", "1", "8", "--mask"]) == 0
    assert "note:" not in capsys.readouterr().out


def test_a_document_that_does_not_decode_back_is_refused(folder, capsys, monkeypatch):
    class Lossy(type(load_tokenizer("bytes"))):
        def encode(self, text):
            return super().encode(text.replace("ü", "u"))

    monkeypatch.setattr("rwkvpeft.data.block.loaded", lambda name: Lossy())
    write_texts(folder / "in.jsonl", ["one", "", "zwölf", "fünf", "u"])
    assert main(["in.jsonl", "1", "8"]) == 2
    assert "in.jsonl:4: the tokens do not decode" in capsys.readouterr().err
    assert main(["in.jsonl", "1", "8", "--skip_bad_lines"]) == 0
    assert sorted(BinidxSource("in").sizes.tolist()) == [1, 2, 4, 7]


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(folder, capsys, content):
    (folder / "in.jsonl").write_text(content)
    assert main(["in.jsonl", "1", "8"]) == 2
    assert "holds no document" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl", "1", "8"], "cannot read nowhere.jsonl"),
        ([".", "1", "8"], "cannot read ."),
        (["in.jsonl", "0", "8"], "N_EPOCH"),
        (["in.jsonl", "1", "x"], "CTX_LEN"),
        (["in.jsonl", "1", "8", "--tokenizer", "wrold"], "neither a name nor a file"),
        (["in.jsonl", "1", "8", "--output", "in.jsonl/x"], "cannot write"),
        (["in.jsonl", "1", "8", "--text_key", "body"], "in.jsonl:1: no document in this record"),
        (["in.bin", "1", "8"], "would replace the input"),
        (["in.jsonl", "1", "8", "--wrokers", "2"], "--wrokers"),
    ],
)
def test_a_users_mistake_gives_one_message_and_exit_code_2(folder, capsys, arguments, message):
    write_texts(folder / "in.jsonl", ["a"])
    (folder / "in.bin").write_text('{"text": "a"}')
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert sorted(path.name for path in folder.iterdir()) == ["in.bin", "in.jsonl"]


def test_a_full_disk_leaves_the_older_pair(folder):
    write_texts(folder / "in.jsonl", ["a"])
    assert main(["in.jsonl", "1", "8"]) == 0
    before = (folder / "in.bin").read_bytes()
    write_texts(folder / "in.jsonl", ["word " * 100_000])
    resource = pytest.importorskip("resource")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    done = run_script(folder, "in.jsonl", 2, 8, preexec_fn=limit)
    assert done.returncode == 2, done.stderr
    assert "cannot write in.bin" in done.stderr
    assert (folder / "in.bin").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["in.bin", "in.idx", "in.jsonl"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing_behind(folder, number, code):
    write_texts(folder / "in.jsonl", [f"line {i} of many" for i in range(20_000)])
    command = [sys.executable, str(ROOT / "make_data.py"), "in.jsonl", "4000", "8"]
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts background jobs with SIGINT ignored, and so would everything they start
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(folder.glob(".in.partial*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in error
    assert [path.name for path in folder.iterdir()] == ["in.jsonl"]


def test_the_command_never_imports_torch(folder):
    write_texts(folder / "in.jsonl", ["a"])
    code = (
        "import sys; from rwkvpeft.cli.make_data import main; main(['in.jsonl', '1', '8']);"
        "print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.splitlines()[-1] == "False"
