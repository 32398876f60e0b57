"""Files appear complete or not at all; one process works while others wait."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rwkvpeft.atomic import alone, write_whole
from rwkvpeft.errors import UserError


def test_a_written_file_is_in_place_and_alone(tmp_path):
    write_whole(tmp_path / "new" / "a.txt", lambda partial: partial.write_text("whole"))
    assert [(path.name, path.read_text()) for path in (tmp_path / "new").iterdir()] == [("a.txt", "whole")]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_older_file(tmp_path, failure):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(partial):
        partial.write_text("half")
        raise failure

    with pytest.raises(failure):
        write_whole(path, write)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]


def test_the_partial_file_keeps_the_suffix_that_writers_go_by(tmp_path):
    seen = []
    write_whole(tmp_path / "a.png", lambda partial: (seen.append(partial), partial.write_text("")))
    assert seen[0].suffix == ".png"
    assert seen[0].parent == tmp_path


def test_what_the_system_refuses_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_whole(tmp_path / "file" / "a.txt", lambda partial: partial.write_text(""))


def test_others_wait_for_the_one_that_works_alone(tmp_path):
    pytest.importorskip("fcntl")
    path = tmp_path / "new" / "lock"
    code = "import sys; from pathlib import Path; from rwkvpeft.atomic import alone\n" \
        "with alone(Path(sys.argv[1]), lambda: print('waits', flush=True)): print('works')"
    with alone(path, pytest.fail):
        other = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "waits\n"
    assert other.communicate(timeout=60)[0] == "works\n"


def test_a_place_that_cannot_be_locked_keeps_nobody_from_working(tmp_path):
    (tmp_path / "file").write_text("")
    with alone(tmp_path / "file" / "lock", pytest.fail):
        pass
