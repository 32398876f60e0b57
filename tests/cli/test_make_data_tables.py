"""make_data.py on csv and parquet."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkvpeft.cli.make_data import main
from rwkvpeft.data import convert
from rwkvpeft.data.binidx import BinidxSource


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def documents(prefix):
    source = BinidxSource(prefix)
    return sorted(bytes(source.read(index).tolist()) for index in range(len(source)))


def test_rows_of_csv_become_documents_and_nothing_else_is_left(folder):
    (folder / "pairs.csv").write_text('query,response\n"Hi,\nyou",yes\nWhat,that\n')
    words = ["pairs.csv", "1", "8", "--tokenizer", "bytes", "--sft_field", "query", "response"]
    assert main(words) == 0
    assert documents("pairs") == [b"User: Hi,\nyou\n\nAssistant: yes\0", b"User: What\n\nAssistant: that\0"]
    assert {path.name for path in folder.iterdir()} == {"pairs.csv", "pairs.bin", "pairs.idx"}


def test_a_bad_row_is_named_by_its_line_of_the_table(folder, capsys):
    (folder / "texts.csv").write_text('text\n"two\nlines"\n"a\0b"\n')
    assert main(["texts.csv", "1", "8", "--tokenizer", "bytes"]) == 2
    assert "texts.csv:4: character 1 of the text is NUL" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["texts.csv"]


def test_turns_of_parquet_become_documents(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]
    parquet.write_table(pyarrow.table({"messages": [turns] * 3}), "turns.parquet")
    assert main(["turns.parquet", "2", "8", "--tokenizer", "bytes", "--mask"]) == 0
    assert documents("turns") == [b"User: q\n\nAssistant: yes\0"] * 6


def test_more_columns_than_are_read_are_refused(folder, capsys):
    (folder / "three.csv").write_text("a,b,c\n1,2,3\n")
    assert main(["three.csv", "1", "8", "--tokenizer", "bytes", "--sft_field", "a", "b", "c"]) == 2
    assert "--sft_field takes the columns of prompt and answer" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["three.csv"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no list of open files")
def test_the_rows_are_closed_before_they_are_read_for_windows_opens_no_file_twice(folder, monkeypatch):
    held, itself = [], convert.convert

    def look(job, report):
        held.extend(path for path in Path("/proc/self/fd").iterdir() if path.exists() and path.samefile(job.path))
        return itself(job, report)

    monkeypatch.setattr(convert, "convert", look)
    (folder / "texts.csv").write_text("text\none\n")
    assert main(["texts.csv", "1", "8", "--tokenizer", "bytes"]) == 0
    assert held == []
    assert {path.name for path in folder.iterdir()} == {"texts.csv", "texts.bin", "texts.idx"}


def test_half_of_a_surrogate_pair_in_a_list_is_named_by_its_place(folder, capsys):
    (folder / "list.json").write_text('[{"text": "ok"}, {"text": "\\ud800"}]')
    assert main(["list.json", "1", "8", "--tokenizer", "bytes"]) == 2
    assert "list.json:2: the text holds half of a surrogate pair" in capsys.readouterr().err
