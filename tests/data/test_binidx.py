"""Pairs of .bin and .idx: what is written is read, and what is damaged is refused."""

from __future__ import annotations

import itertools
import pickle
import struct

import pytest

from rwkvpeft.data.binidx import BinidxSource, write_binidx
from rwkvpeft.errors import ContractError, UserError

DOCUMENTS = [[5, 6, 0], [0], [7, 65535, 8, 9, 0]]


@pytest.fixture
def prefix(tmp_path):
    write_binidx(tmp_path / "data", DOCUMENTS)
    return tmp_path / "data"


def patch_index(prefix, offset, content):
    path = prefix.with_suffix(".idx")
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(raw)


def test_documents_come_back(prefix):
    source = BinidxSource(prefix)
    assert [source.read(i).tolist() for i in range(len(source))] == DOCUMENTS
    assert source.sizes.tolist() == [3, 1, 5]
    assert source.starts.tolist() == [0, 3, 4]
    assert source.n_tokens == 9
    assert source.tokens(2, 4).tolist() == [0, 0, 7, 65535]


def test_the_files_have_the_published_layout(prefix):
    expected = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4)
    expected += struct.pack("<3i3q4q", 3, 1, 5, 0, 6, 8, 0, 1, 2, 3)
    assert prefix.with_suffix(".idx").read_bytes() == expected
    assert prefix.with_suffix(".bin").read_bytes() == struct.pack("<9H", *itertools.chain(*DOCUMENTS))


@pytest.mark.golden
def test_upstreams_files_are_read_and_written_alike(golden, tmp_path):
    source = BinidxSource(golden / "make_data_a")
    write_binidx(tmp_path / "copy", (source.read(i) for i in range(len(source))))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"copy{suffix}").read_bytes() == (golden / f"make_data_a{suffix}").read_bytes()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_every_integer_type_is_written_and_read(tmp_path, dtype):
    write_binidx(tmp_path / "data", [[1, 100, 0], [0]], dtype=dtype)
    source = BinidxSource(tmp_path / "data")
    assert source.stream.dtype == dtype
    assert source.read(0).tolist() == [1, 100, 0]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_the_name_of_either_file_will_do(prefix, suffix):
    assert len(BinidxSource(str(prefix) + suffix)) == 3


def test_a_worker_gets_the_path_and_not_the_data(prefix):
    source = BinidxSource(prefix)
    sent = pickle.dumps(source)
    assert len(sent) < 500
    assert pickle.loads(sent).read(2).tolist() == DOCUMENTS[2]


def test_tokens_outside_the_stream_break_the_contract(prefix):
    with pytest.raises(ContractError):
        BinidxSource(prefix).tokens(5, 5)


@pytest.mark.parametrize("missing", [".bin", ".idx"])
def test_a_missing_half_is_named(prefix, missing):
    prefix.with_suffix(missing).unlink()
    with pytest.raises(UserError, match=rf"data\{missing} does not exist"):
        BinidxSource(prefix)


def test_a_truncated_bin_is_refused(prefix):
    path = prefix.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"data\.bin is cut short.*document 2"):
        BinidxSource(prefix)


def test_a_bin_of_another_index_is_refused(prefix):
    path = prefix.with_suffix(".bin")
    path.write_bytes(path.read_bytes() + b"\1\0")
    with pytest.raises(UserError, match="do not belong together"):
        BinidxSource(prefix)


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"X", "not a binidx index"),
        (9, struct.pack("<Q", 2), "unknown version"),
        (17, b"\6", "not integers"),
        (17, b"\7", "not integers"),
        (17, b"\x63", "not integers"),
        (18, struct.pack("<Q", 1 << 63), "cut short"),
        (18, struct.pack("<q", -1), "cut short"),
        (26, struct.pack("<Q", (1 << 64) - 1), "cut short"),
        (34, struct.pack("<i", -3), "document 0 does not lie in it"),
        (38, struct.pack("<i", 0x7FFFFFFF), "document 1 does not lie in it"),
        (46, struct.pack("<q", -2), "document 0 does not lie in it"),
        (54, struct.pack("<q", (1 << 63) - 1), "document 1 does not lie in it"),
        (54, struct.pack("<q", 3), "document 1 does not lie in it"),
    ],
)
def test_a_hostile_index_is_refused_before_anything_is_allocated(prefix, offset, content, message):
    patch_index(prefix, offset, content)
    with pytest.raises(UserError, match=message):
        BinidxSource(prefix)


@pytest.mark.parametrize("content", [b"", b"MMIDIDX\0\0", b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 0, 1) + bytes(8)])
def test_an_empty_or_headless_index_is_refused(prefix, content):
    prefix.with_suffix(".idx").write_bytes(content)
    with pytest.raises(UserError):
        BinidxSource(prefix)


def test_a_token_above_the_vocabulary_is_named_with_its_place(prefix):
    source = BinidxSource(prefix)
    source.check(65536)
    with pytest.raises(UserError, match=r"document 2, position 1(.|\n)*65535"):
        source.check(300)


def test_a_negative_token_is_refused_whatever_the_vocabulary(tmp_path):
    write_binidx(tmp_path / "data", [[1, -1, 0]], dtype="int8")
    with pytest.raises(UserError, match="document 0, position 1"):
        BinidxSource(tmp_path / "data").check(65536)


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failing_source_of_documents_leaves_the_older_pair(prefix, failure):
    def documents():
        yield [1, 0]
        raise failure

    with pytest.raises(failure):
        write_binidx(prefix, documents())
    assert BinidxSource(prefix).n_tokens == 9
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["data.bin", "data.idx"]


def test_a_token_too_large_for_the_type_is_refused(tmp_path):
    with pytest.raises(UserError, match="document 1 holds a token id"):
        write_binidx(tmp_path / "data", [[1, 0], [65536, 0]])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_binidx(tmp_path / "file" / "data", DOCUMENTS)
