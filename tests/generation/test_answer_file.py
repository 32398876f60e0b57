"""Files of answers that are stopped and gone on with."""

from __future__ import annotations

import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkvpeft.errors import UserError
from rwkvpeft.generation.answer_file import AnswerFile, settings_path, stored_settings

SETTINGS = {"seed": 1, "stop": ["x"], "adapter": None}
COLUMNS = ("prompt", "reject")
ROWS = [
    {"prompt": 'a, "b"\n', "reject": "é\r\n\r\n'"},
    {"prompt": "", "reject": "{}"},
    {"prompt": "\u2028", "reject": "c\rd"},
]
BROKEN = ["", "[]", "{", '{"settings": {}, "skipped": ["a"]}', '{"settings": 1, "skipped": []}']


def write(path, numbers, skipped=(), settings=SETTINGS):
    """Write the rows of some numbers as far as they are still missing; rows repeat."""
    with AnswerFile(path, settings, COLUMNS) as file:
        begun = file.next_number
        for number in numbers:
            if number >= begun:
                assert file.next_number == number
                file.skip() if number in skipped else file.write(ROWS[number % 3])
    return begun


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return [json.loads(line) for line in file] if path.suffix == ".jsonl" else list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_is_gone_on_with(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("answers")
    skipped = data.draw(st.sets(st.integers(0, 7)))
    whole, cut = folder / f"whole-{name}", folder / f"cut-{name}"
    write(whole, range(8), skipped)
    write(cut, range(data.draw(st.integers(0, 8))), skipped)
    content = cut.read_bytes()
    cut.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    write(cut, range(8), skipped)
    assert cut.read_bytes() == whole.read_bytes()
    assert settings_path(cut).read_bytes() == settings_path(whole).read_bytes()
    assert rows(cut) == [ROWS[number % 3] for number in range(8) if number not in skipped]


def test_a_complete_file_is_not_changed(tmp_path):
    write(tmp_path / "a.jsonl", range(4))
    before = (tmp_path / "a.jsonl").read_bytes()
    assert write(tmp_path / "a.jsonl", range(4)) == 4
    assert (tmp_path / "a.jsonl").read_bytes() == before


def test_rows_are_in_the_file_as_soon_as_they_are_written(tmp_path):
    with AnswerFile(tmp_path / "a.jsonl", SETTINGS, ()) as file:
        file.write({"prompt": "a"})
        assert rows(tmp_path / "a.jsonl") == [{"prompt": "a"}]


def test_other_settings_are_refused_and_named(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, range(2))
    with pytest.raises(UserError, match="other settings") as error:
        write(path, range(4), settings={**SETTINGS, "seed": 2})
    assert "seed 1, now 2" in error.value.found
    assert len(rows(path)) == 2


def test_a_file_of_unknown_origin_is_left_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("precious\n")
    with pytest.raises(UserError, match="there already"):
        write(path, range(2))
    assert path.read_text() == "precious\n"
    assert not settings_path(path).exists()


@pytest.mark.parametrize("content", BROKEN)
def test_broken_settings_are_refused(tmp_path, content):
    path = tmp_path / "a.jsonl"
    write(path, range(2))
    settings_path(path).write_text(content)
    for read in (lambda: write(path, range(4)), lambda: stored_settings(path)):
        with pytest.raises(UserError, match="broken"):
            read()


def test_settings_can_be_read_back(tmp_path):
    assert stored_settings(tmp_path / "a.jsonl") == {}
    write(tmp_path / "a.jsonl", range(1))
    assert stored_settings(tmp_path / "a.jsonl") == SETTINGS


def test_two_processes_do_not_write_one_file(tmp_path):
    path = tmp_path / "a.jsonl"
    first, second, late = (AnswerFile(path, SETTINGS, ()) for _ in range(3))
    with first:
        first.write(ROWS[0])
        with pytest.raises(UserError, match="another process writes"), second:
            pass
    with pytest.raises(UserError, match="another process writes"), late:
        pass
    assert write(path, range(2)) == 1
    assert rows(path) == ROWS[:2]


def test_an_empty_file_without_settings_is_begun(tmp_path):
    (tmp_path / "a.jsonl").touch()
    assert write(tmp_path / "a.jsonl", range(2)) == 0
    assert rows(tmp_path / "a.jsonl") == ROWS[:2]
