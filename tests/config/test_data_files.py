from fractions import Fraction

import pytest

from rwkvpeft.config.data_files import check_data_files, data_files, format_of, is_jsonl, without_suffix
from rwkvpeft.config.findings import Findings
from rwkvpeft.config.groups import DataConfig
from rwkvpeft.errors import UserError


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a.jsonl", [("a.jsonl", 1)]),
        ("a.jsonl:3,b.jsonl:1", [("a.jsonl", 3), ("b.jsonl", 1)]),
        ("a.jsonl:0.7, b:.3", [("a.jsonl", Fraction(7, 10)), ("b", Fraction(3, 10))]),
        ("a.jsonl,b.jsonl:2", [("a.jsonl", 1), ("b.jsonl", 2)]),
        (r"C:\data\a.jsonl:2,D:\b", [(r"C:\data\a.jsonl", 2), (r"D:\b", 1)]),
        ("user/set-1", [("user/set-1", 1)]),
    ],
)
def test_parts_and_their_shares_are_read(text, parts):
    assert data_files(text) == parts


@pytest.mark.parametrize("text", ["a.jsonl:0,b.jsonl:1", "a.jsonl,,b.jsonl", ":3", "a.jsonl,"])
def test_a_part_without_a_path_or_a_share_is_refused(text):
    with pytest.raises(UserError, match="a path and a share"):
        data_files(text)


def test_the_name_of_a_part_tells_that_it_is_jsonl():
    assert format_of("a.jsonl", "binidx") == format_of("a.json", "binidx") == format_of("a", "jsonl") == "jsonl"
    assert format_of("a", "binidx") == "binidx"
    assert is_jsonl("a.jsonl:3,b.json")
    assert not is_jsonl("a.jsonl:3,b")


def test_suffixes_of_a_pair_are_left_out_of_every_part():
    assert without_suffix("a.bin:3,b.idx,c.bin.jsonl:1") == "a:3,b,c.bin.jsonl:1"


def test_each_missing_part_is_named(tmp_path):
    (tmp_path / "there.jsonl").write_text("{}")
    findings = Findings()
    files = f"{tmp_path}/there.jsonl:2,{tmp_path}/gone.jsonl:1,{tmp_path}/lost"
    check_data_files(DataConfig(data_file=files), findings)
    assert ["gone.jsonl" in error.render() for error in findings.errors] == [True, False]
    assert "lost.bin" in findings.errors[1].render()
    assert "comma" in findings.errors[1].render()


@pytest.mark.parametrize(("name", "kind"), [("book.txt", "utf-8"), ("ids.npy", "numpy"), ("set", "sft")])
def test_data_of_another_kind_are_told_what_kind(tmp_path, name, kind):
    path = tmp_path / name
    path.write_text("x") if path.suffix else path.mkdir()
    findings = Findings()
    check_data_files(DataConfig(data_file=str(path)), findings)
    assert f"--data_type {kind}" in findings.errors[0].render()


@pytest.mark.parametrize("share", ["-1", "x", ""])
def test_what_is_no_share_is_told_apart_from_a_missing_file(tmp_path, share):
    (tmp_path / "a.jsonl").write_text("{}")
    findings = Findings()
    check_data_files(DataConfig(data_file=f"{tmp_path}/a.jsonl:{share},{tmp_path}/a.jsonl:1"), findings)
    assert ["share" in error.render() for error in findings.errors] == [True]
