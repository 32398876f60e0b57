"""Files of lines on disks that fill up and in folders that go away."""

from __future__ import annotations

import json
import shutil

from rwkvpeft.training.callbacks.lines import LineFile, keep_lines, read_records

from .full_disks import limited_file_size


def line(step):
    return json.dumps({"step": step}) + "\n"


def steps(path):
    return [record["step"] for record in read_records(path)]


def test_lines_that_a_full_disk_refuses_come_when_there_is_room_again(tmp_path):
    told = []
    file = LineFile(tmp_path / "a.jsonl", told.append)
    file.write(line(1))
    with limited_file_size(len(line(1)) + 3):
        file.write(line(2))
        file.write(line(3))
        assert (tmp_path / "a.jsonl").read_text() == line(1)
    file.write(line(4))
    assert steps(tmp_path / "a.jsonl") == [1, 2, 3, 4]
    assert len(told) == 1
    assert "training goes on" in told[0]


def test_a_folder_that_was_deleted_is_made_anew(tmp_path):
    told = []
    file = LineFile(tmp_path / "run" / "a.jsonl", told.append)
    file.write(line(1))
    shutil.rmtree(tmp_path / "run")
    file.write(line(2))
    assert steps(tmp_path / "run" / "a.jsonl") == [2]
    assert told == []


def test_a_place_that_takes_no_file_is_told_once(tmp_path):
    told = []
    file = LineFile(tmp_path / "run" / "a.jsonl", told.append)
    (tmp_path / "run").write_text("a file, where a folder should be")
    for step in (1, 2):
        file.write(line(step))
    (tmp_path / "run").unlink()
    file.write(line(3))
    assert steps(tmp_path / "run" / "a.jsonl") == [1, 2, 3]
    assert len(told) == 1


def test_a_file_is_cut_back_without_room_for_another_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(line(1) + line(2) + line(3) + '{"st')
    with limited_file_size(0):
        keep_lines(path, lambda text: json.loads(text)["step"] <= 2)
    assert path.read_text() == line(1) + line(2)
