"""What a run makes of data files that are changed while it reads them."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rwkvpeft.config.groups import DataConfig
from rwkvpeft.data.arrays import open_numpy, open_uint16
from rwkvpeft.data.binidx import BinidxSource, write_binidx
from rwkvpeft.data.file_array import FileArray, FileChanged
from rwkvpeft.data.mask_file import read_mask
from rwkvpeft.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def numbers(tmp_path):
    """A file of the numbers 0 to 9,999 behind 8 other bytes."""
    path = tmp_path / "numbers.bin"
    path.write_bytes(bytes(8) + np.arange(10_000, dtype="<u2").tobytes())
    return path


def opened(path):
    return FileArray(path, np.dtype("<u2"), 10_000, offset=8)


def test_slices_are_those_of_the_numbers_in_the_file(numbers):
    found = opened(numbers)
    assert len(found) == 10_000
    assert found[5:8].tolist() == [5, 6, 7]
    assert found[9_998:20_000].tolist() == [9_998, 9_999]
    assert found[7:3].tolist() == []
    assert found[:].tolist() == list(range(10_000))


def test_a_file_cut_short_is_refused_with_its_name(numbers):
    found = opened(numbers)
    os.truncate(numbers, 100)
    with pytest.raises(FileChanged, match=r"changed while the run was reading it: .*numbers\.bin"):
        found[9_000:9_010]


def test_what_a_cut_left_is_refused_too(numbers):
    found = opened(numbers)
    os.truncate(numbers, 100)
    with pytest.raises(FileChanged, match="100 bytes"):
        found[0:2]


def test_a_file_of_the_same_size_that_was_written_to_is_refused(numbers):
    found = opened(numbers)
    with numbers.open("r+b") as file:
        file.write(b"others")
    os.utime(numbers, ns=(0, 12345))
    with pytest.raises(FileChanged, match="written to since"):
        found[0:2]


def test_a_file_put_in_its_place_does_not_disturb_and_is_noticed(numbers, tmp_path):
    found = opened(numbers)
    assert not found.is_replaced
    other = tmp_path / "other"
    other.write_bytes(bytes(8))
    os.replace(other, numbers)
    assert found[9_000:9_002].tolist() == [9_000, 9_001]
    assert found.is_replaced


def test_another_process_reads_the_same_file_or_none(numbers, tmp_path):
    found = opened(numbers)
    assert pickle.loads(pickle.dumps(found))[3:5].tolist() == [3, 4]
    other = tmp_path / "other"
    other.write_bytes(numbers.read_bytes())
    os.replace(other, numbers)
    with pytest.raises(FileChanged, match="another file"):
        pickle.loads(pickle.dumps(found))


def test_a_source_in_another_process_is_not_opened_on_other_tokens(tmp_path):
    prefix = tmp_path / "pair"
    write_binidx(prefix, [[1, 2, 0], [3, 0]])
    source = pickle.dumps(BinidxSource(prefix))
    write_binidx(prefix, [[4, 5, 0], [6, 0]])
    with pytest.raises(FileChanged):
        pickle.loads(source)


def test_the_error_survives_the_way_from_a_data_worker(numbers):
    found = opened(numbers)
    os.truncate(numbers, 100)
    with pytest.raises(FileChanged) as error:
        found[0:1]
    arrived = pickle.loads(pickle.dumps(error.value))
    assert arrived.render() == error.value.render()


@pytest.mark.parametrize("kind", ["binidx", "uint16", "numpy", "mask"])
def test_no_kind_of_data_kills_the_process_when_its_file_shrinks(tmp_path, kind):
    # a map of a file that was cut short ends the process with SIGBUS, which only another process survives
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.data.test_file_array import open_and_cut
sys.exit(open_and_cut({kind!r}, {str(tmp_path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2, done.stderr


def open_and_cut(kind, folder):
    """2 if reading is refused, as the commands' exit code is."""
    path = os.path.join(folder, "data")
    if kind in ("binidx", "mask"):
        write_binidx(path, [np.ones(100_000), np.zeros(1)])
    if kind == "mask":
        with open(f"{path}.mask", "wb") as file:
            file.write(b"RWKVMASK" + (100_001).to_bytes(8, "little") + bytes(100_001))
            file.write(b'{"voices": [[1.0, true, false, false]], "fingerprint": "f"}')
        codes, _ = read_mask(Path(f"{path}.mask"), 100_001, "f")
        reads, cut = (lambda: codes[90_000:90_010]), f"{path}.mask"
    elif kind == "binidx":
        source = BinidxSource(path)
        for end in (".bin", ".idx"):
            os.truncate(f"{path}{end}", 10)
        reads, cut = (lambda: source.read(0)), f"{path}.bin"
    elif kind == "uint16":
        np.ones(100_000, dtype="<u2").tofile(path)
        source = open_uint16(DataConfig(data_file=path, data_type="uint16"))
        reads, cut = (lambda: source.tokens(90_000, 10)), path
    else:
        np.save(f"{path}.npy", np.ones(100_000, dtype="<u2"))
        source = open_numpy(DataConfig(data_file=f"{path}.npy", data_type="numpy"))
        reads, cut = (lambda: source.tokens(90_000, 10)), f"{path}.npy"
    os.truncate(cut, 10)
    try:
        reads()
    except FileChanged:
        return 2
    return 0


def test_a_file_that_is_not_there_is_a_mistake_of_the_user(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        FileArray(tmp_path / "none", np.dtype("<u2"), 0)
