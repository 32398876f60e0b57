"""The byte-mutation fuzzer, for a moment; its own help says how it is run at length."""

import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).with_name("run.py")
BROKEN_READERS = """
import os, signal
from types import SimpleNamespace

def read(folder):
    how = (folder / "number").read_text()
    if how == "1":
        1 / 0
    if how == "2":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "3":
        os.system("true")
    if how == "4":
        open("/tmp/outside", "w")
    if how == "5":
        bytearray(2 << 30)

def put(files, folder):
    (folder / "number").write_text(files)

def spoil(kind, random):
    return str(random.randrange(6))

def kinds(base):
    return {"broken": SimpleNamespace(share=1, seeds=["0"], read=read)}
"""


@pytest.mark.slow
def test_spoiled_files_of_every_kind_are_read_or_refused():
    done = subprocess.run([sys.executable, RUNNER, "--inputs", "1000"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) >= 14, "a kind is missing"
    assert {row.split("|")[5].strip() for row in rows} == {"0"}


@pytest.mark.slow
def test_the_fuzzer_finds_crashes_programs_and_writing_elsewhere(tmp_path):
    (tmp_path / "readers.py").write_text(BROKEN_READERS)
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(RUNNER.parent)!r}]; import run; sys.exit(run.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--inputs", "40"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 1, done.stderr
    for found in ("ZeroDivisionError", "Segmentation fault", "Forbidden: os.system", "Forbidden: open", "MemoryError"):
        assert found in done.stderr, found
