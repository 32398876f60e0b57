"""Texts by characters, arrays of tokens, tables and datasets as sources of documents."""

from __future__ import annotations

import csv
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.arrays import open_numpy, open_uint16
from rwkvpeft.data.dataset import open_dataset, open_source
from rwkvpeft.data.huggingface import sft_records
from rwkvpeft.data.tables import read_table
from rwkvpeft.data.text import data_tokenizer, keep_vocabulary, open_text
from rwkvpeft.data.tokenizer import load_tokenizer
from rwkvpeft.errors import UserError

SFT = DataConfig(tokenizer="bytes", data_type="sft", data_shuffle=0)
STREAM = [5, 6, 0, 7, 0, 8, 9, 10]


def text_config(tmp_path, text="hello world\n", encoding="utf-8", tokenizer=None):
    (tmp_path / "text.txt").write_bytes(text.encode(encoding))
    return DataConfig(data_file=str(tmp_path / "text.txt"), data_type=encoding, dataload="get",
                      tokenizer=str(tmp_path / "vocab.json") if tokenizer is None else tokenizer)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16le"])
def test_a_text_is_the_ids_of_its_characters_in_their_order(tmp_path, encoding):
    text = "Größe: 中 ab\n"
    source = open_text(text_config(tmp_path, text, encoding))
    characters = sorted(set(text))
    assert source.read(0).tolist() == [characters.index(character) for character in text]
    assert len(source) == 1


def test_the_vocabulary_is_written_once_as_rwkv_lm_writes_it_and_read_again(tmp_path):
    config = text_config(tmp_path, "banana")
    tokens = open_text(config).read(0).tolist()
    keep_vocabulary(config)
    assert json.loads((tmp_path / "vocab.json").read_text()) == {"0": "a", "1": "b", "2": "n"}
    (tmp_path / "text.txt").write_text("nab")
    keep_vocabulary(config)
    assert open_text(config).read(0).tolist() == [2, 0, 1]
    assert load_tokenizer(config.tokenizer).decode(tokens) == "banana"


def test_a_character_that_the_vocabulary_lacks_is_named(tmp_path):
    config = text_config(tmp_path, "abc")
    keep_vocabulary(config)
    (tmp_path / "text.txt").write_text("abz")
    with pytest.raises(UserError, match="text.txt.*lacks the character 'z'"):
        open_text(config)


def test_the_size_of_a_model_for_a_text_is_known_before_its_vocabulary_is_written(tmp_path):
    assert data_tokenizer(text_config(tmp_path, "banana")).vocab_size == 3
    assert data_tokenizer(DataConfig()).vocab_size == 65536
    assert not (tmp_path / "vocab.json").exists()


def test_a_text_can_be_read_with_a_tokenizer_by_name(tmp_path):
    assert open_text(text_config(tmp_path, "ab", tokenizer="bytes")).read(0).tolist() == [97, 98, 0]


def test_a_text_in_another_encoding_is_refused(tmp_path):
    config = text_config(tmp_path, "é", "latin-1")
    with pytest.raises(UserError, match="is not utf-8"):
        open_text(replace(config, data_type="utf-8"))


def test_an_empty_text_is_refused(tmp_path):
    with pytest.raises(UserError, match="is empty"):
        open_text(text_config(tmp_path, ""))


@pytest.mark.parametrize("content", ['{"0": "a", "2": "b"}', '{"0": "ab"}', '{"0": "a", "1": "a"}', "[1]", "{", "{}"])
def test_a_broken_vocabulary_is_refused(tmp_path, content):
    (tmp_path / "broken.json").write_text(content)
    with pytest.raises(UserError, match="is not a vocabulary of characters"):
        load_tokenizer(str(tmp_path / "broken.json"))


def test_dummy_data_are_sums_that_hold_and_always_the_same(tmp_path):
    config = DataConfig(data_file="dummy", data_type="dummy", tokenizer=str(tmp_path / "vocab.json"), dataload="get")
    tokens = open_text(config).tokens(0, 60).tolist()
    text = data_tokenizer(config).decode(tokens)
    assert text.startswith(".0+0=0..1+1=2..2+4=6.")
    assert open_dataset(config, ctx_len=64, vocab_size=13, seed=1).report().trained_tokens > 1_000_000


@pytest.mark.parametrize("save", [np.save, np.savez])
def test_an_array_of_numpy_is_a_stream_whose_documents_end_at_token_0(tmp_path, save):
    path = tmp_path / ("data.npy" if save is np.save else "data.npz")
    save(path, np.array(STREAM))
    source = open_numpy(DataConfig(data_file=str(path)))
    assert [source.read(index).tolist() for index in range(3)] == [[5, 6, 0], [7, 0], [8, 9, 10]]
    assert source.tokens(0, 8).tolist() == STREAM


def test_the_rows_of_a_table_of_tokens_are_documents(tmp_path):
    np.save(tmp_path / "data.npy", np.arange(6).reshape(2, 3))
    source = open_numpy(DataConfig(data_file=str(tmp_path / "data.npy")))
    assert [source.read(index).tolist() for index in range(2)] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    "array", [np.array([0.5]), np.array([], dtype=np.int64), np.array(3), np.array([{}], dtype=object)]
)
def test_an_array_without_tokens_is_refused_and_nothing_unpickled(tmp_path, array):
    np.save(tmp_path / "data.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=r"data\.npy is (no array of tokens|not an array of numpy)"):
        open_numpy(DataConfig(data_file=str(tmp_path / "data.npy")))


def test_a_file_that_is_no_array_is_refused(tmp_path):
    (tmp_path / "data.npy").write_text("1 2 3")
    with pytest.raises(UserError, match="is not an array of numpy"):
        open_numpy(DataConfig(data_file=str(tmp_path / "data.npy")))


def test_uint16_tokens_are_mapped_in_documents_or_in_rows_of_one_length(tmp_path):
    path = tmp_path / "data.u16"
    np.array([*STREAM, 65535], dtype="<u2").tofile(path)
    stream = open_uint16(DataConfig(data_file=str(path)))
    assert stream.read(2).tolist() == [8, 9, 10, 65535]
    rows = open_uint16(DataConfig(data_file=str(path), my_sample_len=3))
    assert [rows.read(index).tolist() for index in range(3)] == [[5, 6, 0], [7, 0, 8], [9, 10, 65535]]
    with pytest.raises(UserError, match="whole rows"):
        open_uint16(DataConfig(data_file=str(path), my_sample_len=4))


def test_a_mapped_source_travels_to_a_worker_without_its_tokens(tmp_path):
    np.arange(50_000, dtype="<u2").tofile(tmp_path / "data.u16")
    source = open_uint16(DataConfig(data_file=str(tmp_path / "data.u16"), my_sample_len=50))
    sent = pickle.dumps(source)
    assert len(sent) < 2000
    assert pickle.loads(sent).read(999).tolist() == source.read(999).tolist()


def test_half_a_token_is_refused(tmp_path):
    (tmp_path / "data.u16").write_bytes(b"abc")
    with pytest.raises(UserError, match="whole tokens"):
        open_uint16(DataConfig(data_file=str(tmp_path / "data.u16")))


def test_a_token_id_beyond_the_vocabulary_is_refused_in_every_kind(tmp_path):
    np.save(tmp_path / "data.npy", np.array([1, 2, 300, 4]))
    config = DataConfig(data_file=str(tmp_path / "data.npy"), data_type="numpy", dataload="get", tokenizer="bytes")
    with pytest.raises(UserError, match="position 2"):
        open_dataset(config, ctx_len=2, vocab_size=256, seed=1)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "data.csv"
    rows = [["query", "response"], ["Hi, you", "yes"], ["007", "None"], ['a "b"\nc', "NA"]]
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(rows)
    return path


def test_every_value_of_csv_is_the_text_that_stands_there(table):
    values = [record.value for record in read_table(table)]
    assert values[0] == {"query": "Hi, you", "response": "yes"}
    assert values[1] == {"query": "007", "response": "None"}
    assert values[2] == {"query": 'a "b"\nc', "response": "NA"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1\n", "data.csv:2: a row of 1 values under 2 names"),
        ("a,a\n1,2\n", "names a column twice"),
        ('a,b\n"1,2\n', "data.csv:2: not csv"),
        ("a,b\n", "holds no row"),
        ("", "holds no row"),
    ],
)
def test_broken_csv_is_refused_with_its_line(tmp_path, content, message):
    (tmp_path / "data.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_table(tmp_path / "data.csv"))


def test_two_columns_are_prompt_and_answer(table):
    config = replace(SFT, data_file=str(table), sft_field=["query", "response"], loss_mask="qa")
    dataset = open_dataset(config, ctx_len=64, vocab_size=256, seed=1)
    row = dataset.row(0)
    assert bytes(row.input_ids.tolist()).startswith(b"User: Hi, you\n\nAssistant: yes")
    assert bytes(row.labels[row.weights > 0].tolist()) == b" yes\0"


def test_one_column_is_the_text(table):
    source = open_source(replace(SFT, data_file=str(table), sft_field=["response"]))
    assert [bytes(source.read(index).tolist()) for index in range(3)] == [b"yes\0", b"None\0", b"NA\0"]


def test_without_columns_rows_are_records_as_in_jsonl(tmp_path):
    (tmp_path / "data.csv").write_text("instruction,input,output\nAdd,1 1,2\n")
    source = open_source(replace(SFT, data_file=str(tmp_path / "data.csv"), data_type="binidx"))
    assert bytes(source.read(0).tolist()) == b"Instruction: Add\n\nInput: 1 1\n\nResponse: 2\0"


def test_a_column_that_is_not_there_is_refused_with_those_that_are(table):
    with pytest.raises(UserError, match="has no column quary") as error:
        list(sft_records(str(table), "train", ["quary", "response"]))
    assert "query, response" in error.value.render()


@pytest.mark.parametrize("mark", [";", "\t"])
def test_other_marks_than_commas_between_columns_are_named(tmp_path, mark):
    (tmp_path / "in.csv").write_text(f"query{mark}response\nq{mark}a\n")
    with pytest.raises(UserError, match="has no column") as error:
        list(sft_records(str(tmp_path / "in.csv"), "train", ["query", "response"]))
    assert f"commas between columns, not {mark!r}" in error.value.render()


def test_rows_of_a_file_can_be_chosen_as_a_split(table):
    rows = list(sft_records(str(table), "train[1:2]", ["query"]))
    assert [row.value["text"] for row in rows] == ["007"]
    for split in ("test", "train[-1:]", "train[:10%]"):
        with pytest.raises(UserError, match="has no split"):
            list(sft_records(str(table), split, []))
    with pytest.raises(UserError, match="holds no row"):
        list(sft_records(str(table), "train[7:]", []))


def test_json_may_be_a_list_or_lines(tmp_path):
    rows = [{"query": "a", "response": "b"}, {"query": "c", "response": "d"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("list.json", "lines.jsonl"):
        found = list(sft_records(str(tmp_path / name), "train", ["response"]))
        assert [row.value["text"] for row in found] == ["b", "d"]


def test_a_value_that_is_no_text_is_refused_with_its_row(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"a": "x", "b": 1}\n{"a": "y", "b": null}\n')
    with pytest.raises(UserError, match=r"data\.jsonl:2: column b must be text"):
        list(sft_records(str(tmp_path / "data.jsonl"), "train", ["a", "b"]))


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    for name in (str(tmp_path / "data.parquet"), str(tmp_path)):
        with pytest.raises(UserError, match="not installed") as error:
            list(sft_records(name, "train", []))
        assert "pip install '.[data]'" in error.value.render()


def test_parquet_keeps_turns_and_has_no_use_for_what_is_null(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    turns = [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "yes", "name": None}]
    columns = {"messages": [turns] * 2, "text": pyarrow.nulls(2, pyarrow.string())}
    parquet.write_table(pyarrow.table(columns), tmp_path / "data.parquet")
    config = replace(SFT, data_file=str(tmp_path / "data.parquet"), data_type="binidx", loss_mask="qa")
    row = open_dataset(config, ctx_len=32, vocab_size=256, seed=1).row(0)
    assert bytes(row.labels[row.weights > 0].tolist()) == b" yes\0"


def test_a_broken_parquet_file_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "data.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        list(read_table(tmp_path / "data.parquet"))


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A dataset as ``save_to_disk`` writes it, with and without splits, and a folder of parquet files."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    rows = {split: datasets.Dataset.from_dict({"query": ["a", "b"], "response": [split, "y"]}) for split in
            ("train", "test")}
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "splits")
    rows["train"].save_to_disk(tmp_path / "one")
    (tmp_path / "files").mkdir()
    for split, part in rows.items():
        part.to_parquet(tmp_path / "files" / f"{split}.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["splits", "files"])
def test_a_split_of_a_folder_is_read(saved, name):
    rows = list(sft_records(str(saved / name), "test[:1]", ["query", "response"]))
    assert [turn["content"] for row in rows for turn in row.value["messages"]] == ["a", "test"]


def test_a_dataset_saved_without_splits_counts_as_any(saved):
    assert len(list(sft_records(str(saved / "one"), "train[1:]", ["query"]))) == 1


@pytest.mark.parametrize("name", ["splits", "files"])
def test_an_unknown_split_is_refused_with_those_that_are_there(saved, name):
    with pytest.raises(UserError) as error:
        list(sft_records(str(saved / name), "dev", []))
    assert "dev" in error.value.render()
    assert "test" in error.value.render()


@pytest.mark.parametrize("problem", [ConnectionError("no way"), TimeoutError("too long")])
def test_a_network_that_does_not_answer_is_one_message(monkeypatch, problem):
    datasets = pytest.importorskip("datasets")

    def fail(*words, **more):
        raise problem

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match="somebody/data cannot be opened") as error:
        list(sft_records("somebody/data", "train", []))
    assert "network" in error.value.render()
