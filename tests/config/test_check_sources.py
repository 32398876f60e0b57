"""What each data type decides, and what it does not honour."""

from __future__ import annotations

import pytest

from rwkvpeft.config import check_sources
from rwkvpeft.config.check_sources import by_source
from rwkvpeft.config.data_files import check_data_files, format_of
from rwkvpeft.config.findings import Findings
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.config.resolve import Machine, resolve
from rwkvpeft.errors import UserError

BASE = {"load_model": "a.pth", "data_file": "data", "random_seed": 1}


def resolved(**given):
    return resolve({**BASE, **given}, Machine("cpu", has_bf16=True))[0]


def refused(**given):
    findings = Findings()
    check_data_files(DataConfig(**{"data_file": "dummy", **given}), findings)
    return [error.what for error in findings.errors]


@pytest.mark.parametrize("kind", ["utf-8", "utf-16le", "numpy", "uint16", "dummy"])
def test_data_without_documents_are_read_in_windows(kind):
    assert resolved(data_type=kind).data.dataload == "get"
    assert resolved(data_type=kind, dataload="pack").data.dataload == "pack"


def test_rows_of_one_length_are_documents():
    assert resolved(data_type="uint16", my_sample_len=65).data.dataload == "pad"


def test_dummy_data_need_no_file():
    assert resolve({"load_model": "a.pth", "data_type": "dummy"}, Machine("cpu", has_bf16=True))[0].data.data_file


def test_the_vocabulary_of_a_text_is_the_bases_or_else_the_projects(tmp_path):
    base, project = tmp_path / "base", tmp_path / "project"
    values = {"data_type": "utf-8", "load_model": str(base / "m.pth"), "proj_dir": str(project)}

    def chosen(**more):
        given = {**values, **more}
        by_source(given)
        return given["tokenizer"]

    assert chosen() == str(project / "vocab.json")
    base.mkdir()
    (base / "vocab.json").write_text("{}")
    assert chosen() == str(base / "vocab.json")
    assert chosen(load_model="") == str(project / "vocab.json")
    assert chosen(tokenizer="world") == "world"


def test_the_answers_of_two_columns_are_trained_unless_told_otherwise():
    assert resolved(data_type="sft", sft_field=["a", "b"]).data.loss_mask == "qa"
    assert resolved(data_file="a.csv", sft_field=["a", "b"]).data.loss_mask == "qa"
    assert resolved(data_type="sft", sft_field=["a", "b"], loss_mask="none").data.loss_mask == "none"
    assert resolved(data_type="sft", sft_field=["a"]).data.loss_mask == "none"


@pytest.mark.parametrize(
    ("path", "data_type", "expected"),
    [
        ("a.parquet", "binidx", "sft"),
        ("a.CSV", "jsonl", "sft"),
        ("a.jsonl", "binidx", "jsonl"),
        ("a.jsonl", "sft", "sft"),
        ("user/name", "sft", "sft"),
        ("a.txt", "utf-8", "utf-8"),
    ],
)
def test_tables_are_known_by_their_names(path, data_type, expected):
    assert format_of(path, data_type) == expected


def test_a_json_file_is_a_list_or_lines(tmp_path):
    (tmp_path / "list.json").write_text('\n [{"text": "a"}]')
    (tmp_path / "lines.json").write_text('{"text": "a"}')
    for data_type in ("binidx", "jsonl"):
        assert format_of(str(tmp_path / "list.json"), data_type) == "sft"
        assert format_of(str(tmp_path / "lines.json"), data_type) == "jsonl"
    assert format_of("nowhere.json", "jsonl") == "jsonl"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data_type": "dummy", "dataload": "pad"}, "--dataload pad would read the beginning alone"),
        ({"data_type": "dummy", "dataload": "get", "loss_mask": "qa"}, "--loss_mask qa needs documents"),
        ({"data_type": "dummy", "dataload": "get", "mask_think": True}, "--mask_think needs documents"),
        ({"data_type": "dummy", "dataload": "get", "data_file": "x"}, "makes its own data"),
        ({"data_type": "dummy", "dataload": "get", "sft_field": ["a"]}, "--sft_field has no effect"),
        ({"data_type": "dummy", "dataload": "get", "sft_split": "test"}, "--sft_split has no effect"),
        ({"data_type": "dummy", "dataload": "get", "my_sample_len": 9}, "--my_sample_len is the length"),
        ({"data_type": "utf-8", "dataload": "get", "data_file": "nowhere.txt"}, "does not exist"),
        ({"data_type": "sft", "data_file": "nowhere.csv"}, "does not exist"),
        ({"data_type": "sft", "data_file": __file__.replace(".py", ".csv"), "sft_field": ["a", "b", "c"]},
         "--sft_field takes the columns"),
    ],
)
def test_what_a_data_type_does_not_honour_is_refused(given, message):
    assert any(message in what for what in refused(**given))


def test_a_missing_package_is_found_before_anything_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(check_sources, "find_spec", lambda name: None)
    (tmp_path / "a.parquet").touch()
    for name, package in ((str(tmp_path / "a.parquet"), "pyarrow"), ("user/name", "datasets")):
        assert any(f"needs the package {package}" in what for what in refused(data_type="sft", data_file=name))


def test_a_text_goes_on_training_a_model_only_in_its_own_vocabulary(tmp_path):
    (tmp_path / "a.pth").touch()
    (tmp_path / "text.txt").write_text("abc")
    given = {"load_model": str(tmp_path / "a.pth"), "data_file": str(tmp_path / "text.txt"), "data_type": "utf-8",
             "proj_dir": str(tmp_path / "out"), "random_seed": 1}
    with pytest.raises(UserError, match="vocabulary that .* was trained with is not there"):
        resolve(given, Machine("cpu", has_bf16=True), files_too=True)
    (tmp_path / "vocab.json").write_text('{"0": "a"}')
    assert resolve(given, Machine("cpu", has_bf16=True), files_too=True)[0].data.tokenizer.endswith("vocab.json")
