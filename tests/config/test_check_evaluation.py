"""How files beside the training data are read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rwkvpeft.config.check_evaluation import check_evaluation_files, general_data, other_data
from rwkvpeft.config.findings import Findings
from rwkvpeft.config.groups import DataConfig, EvaluationConfig
from rwkvpeft.config.parse import build_groups

COLUMNS = DataConfig(data_file="train.parquet", sft_field=["asked", "said"], sft_split="train[:10]")
TEXT = DataConfig(data_file="train.txt", data_type="utf-16le")


@pytest.mark.parametrize(
    ("data", "path", "kind", "fields"),
    [
        (COLUMNS, "val.parquet", "binidx", ["asked", "said"]),
        (COLUMNS, "val.csv:2,more.csv", "binidx", ["asked", "said"]),
        (COLUMNS, "val.jsonl", "jsonl", []),
        (replace(COLUMNS, data_type="sft"), "val.jsonl", "sft", ["asked", "said"]),
        (replace(COLUMNS, data_type="sft"), "val.jsonl:1,more.jsonl:2", "sft", ["asked", "said"]),
        (TEXT, "val.txt", "utf-16le", []),
        (replace(TEXT, data_type="dummy"), "val.txt", "utf-8", []),
        (DataConfig(), "val.txt", "utf-8", []),
    ],
)
def test_held_out_data_are_read_as_the_training_data_are(data, path, kind, fields):
    found = other_data(data, path)
    assert (found.data_type, found.sft_field) == (kind, fields)
    assert found.sft_split == "train"


def test_rows_of_a_training_dataset_are_no_rows_of_a_held_out_file():
    data = replace(COLUMNS, data_type="sft", data_file="user/data")
    assert other_data(data, "val.csv").sft_split == "train"
    assert other_data(data, "user/more").sft_split == "train[:10]"


def test_general_records_need_no_columns_of_the_training_data():
    found = general_data(replace(COLUMNS, data_type="sft"), "general.jsonl")
    assert (found.data_type, found.sft_field, found.sft_split) == ("jsonl", [], "train")


def test_what_a_held_out_file_does_not_go_with_names_the_file(tmp_path):
    path = tmp_path / "val.txt"
    path.write_text("a text")
    config = replace(build_groups({"data_file": "data"}), evaluation=EvaluationConfig(val_data_file=str(path)))
    findings = Findings()
    check_evaluation_files(config, findings)
    assert len(findings.errors) == 1
    assert findings.errors[0].what.startswith(f"--val_data_file {path}: --data_type utf-8 is one text")


@pytest.mark.parametrize("val", ["{}/b.jsonl", "{}/c.jsonl:2,{}/./b.jsonl:1"])
def test_a_file_is_not_trained_on_and_held_out_at_once(tmp_path, val):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a text"}')
    config = replace(
        build_groups({"data_file": f"{tmp_path}/a.jsonl:3,{tmp_path}/b.jsonl:1"}),
        evaluation=EvaluationConfig(val_data_file=val.format(tmp_path, tmp_path)),
    )
    findings = Findings()
    check_evaluation_files(config, findings)
    assert [error.what for error in findings.errors] == ["--val_data_file holds out what --data_file trains on"]
    assert str(findings.errors[0].found) == f"{tmp_path}/b.jsonl"
