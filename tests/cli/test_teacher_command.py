"""python -m rwkvpeft.teacher."""

from __future__ import annotations

import json

import pytest
import torch

from rwkvpeft.checkpoints.files import save_tensors
from rwkvpeft.cli.teacher import main
from rwkvpeft.data.label_index import read_index
from rwkvpeft.data.teacher_labels import TeacherLabels
from rwkvpeft.models.shape import new_shape
from rwkvpeft.registry import MODELS, find

TEXTS = ["User: a\n\nAssistant: first", "User: b\n\nAssistant: the second, which is longer"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("teacher")
    shape = new_shape("x060", n_layer=1, n_embd=16, vocab_size=256, head_size=8)
    for name in ("t.pth", "other.pth"):
        weights = find(MODELS, "x060", flag="").initial_weights(shape)
        save_tensors(folder / name, {name: value + 0.1 * torch.randn_like(value) for name, value in weights.items()})
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


@pytest.fixture
def teach(files, tmp_path, capsys):
    """Call the command on the tiny model and data; later words win. Returns code, output, errors."""

    def run(*words):
        common = f"--model {files / 't.pth'} --data_file {files / 'data.jsonl'} --device cpu --output {tmp_path}/labels"
        code = main([*common.split(), *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_labels_are_written_and_counted(teach, tmp_path):
    code, out, err = teach("--top_k", "4", "--shard_tokens", "16")
    assert code == 0, err
    places = sum(len(text) for text in TEXTS)
    assert f"labels of {places} tokens of 2 documents in 5 files, 34 bytes each" in out
    labels = TeacherLabels(tmp_path / "labels", top_k=0, temperature=2.0)
    assert (labels.top_k, labels.index.temperatures, labels.index.dtype) == (4, (1.0, 2.0), "fp16")


def test_every_setting_of_the_labels_reaches_the_index(teach, tmp_path):
    code, _, err = teach("--top_k", "3", "--dtype", "bf16", "--temperature", "1.5", "--ctx_len", "7")
    assert code == 0, err
    index = read_index(tmp_path / "labels")
    assert (index.top_k, index.dtype, index.temperatures, index.ctx_len) == (3, "bf16", (1.5,), 7)
    assert (index.teacher, index.vocab_size, index.places) == ("t.pth", 256, 14)


def test_the_same_command_goes_on_where_it_was_stopped(teach, tmp_path):
    words = ("--top_k", "4", "--shard_tokens", "16")
    assert teach(*words)[0] == 0
    shard = tmp_path / "labels" / "labels-00002.safetensors"
    whole = shard.read_bytes()
    shard.unlink()
    code, _, err = teach(*words)
    assert code == 0, err
    assert "4 of 5 shards are there already" in err
    assert shard.stat().st_size == len(whole)


def test_progress_says_how_long_it_takes(teach):
    _, _, err = teach("--top_k", "4")
    assert "100 %, 72 of 72 tokens" in err
    assert "a second" in err
    assert "minutes left" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--top_k", "-1"], "--top_k is too small"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--shard_tokens", "0"], "--shard_tokens is too small"),
        (["--tokens_at_once", "0"], "--tokens_at_once is too small"),
        (["--ctx_len", "0"], "--ctx_len is too small"),
        (["--data_file", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "nowhere.pth"], "nowhere.pth"),
        (["--tokenizer", "world"], "token"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(teach, tmp_path, words, said):
    code, _, err = teach(*words)
    assert code == 2
    assert said in err
    assert not (tmp_path / "labels").exists()


def test_a_file_is_no_place_for_labels(teach, tmp_path):
    (tmp_path / "labels").write_text("")
    code, _, err = teach()
    assert code == 2
    assert "--output names a file" in err


def test_data_without_two_tokens_have_no_labels(teach, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    code, _, err = teach("--data_file", str(tmp_path / "empty.jsonl"))
    assert code == 2
    assert "no document of two tokens" in err


@pytest.mark.parametrize("words", [["--top_k", "5"], ["--dtype", "fp32"], ["--temperature", "1"]])
def test_a_folder_of_other_labels_is_left_alone(teach, tmp_path, words):
    assert teach("--top_k", "4")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "labels").iterdir()}
    code, _, err = teach("--top_k", "4", *words)
    assert code == 2
    assert "made in another way" in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "labels").iterdir()} == before


def test_another_teacher_does_not_go_on_with_a_folder(teach, files):
    assert teach("--top_k", "4")[0] == 0
    code, _, err = teach("--top_k", "4", "--model", str(files / "other.pth"))
    assert code == 2
    assert "teacher_fingerprint" in err


def test_a_document_longer_than_a_shard_is_read_through(teach, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "abcdefgh" * 30}))
    code, out, err = teach("--data_file", str(path), "--top_k", "2", "--shard_tokens", "100", "--tokens_at_once", "33")
    assert code == 0, err
    assert "of 1 documents in 3 files" in out


def test_a_text_without_documents_is_refused(teach, tmp_path):
    (tmp_path / "text.txt").write_text("abc")
    code, _, err = teach("--data_file", str(tmp_path / "text.txt"), "--data_type", "utf-8")
    assert code == 2
    assert "--teacher MODEL.pth" in err
