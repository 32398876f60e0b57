"""Whatever is in a file: it is read right, or refused with a message."""

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from rwkvpeft.checkpoints.files import load_tensors
from rwkvpeft.checkpoints.pickled import PickleError, read_pickle
from rwkvpeft.config.yaml_text import parse_yaml
from rwkvpeft.data.binidx import BinidxSource, write_binidx
from rwkvpeft.data.jsonl import BadLine, blocks, parse_line, read_block, read_records
from rwkvpeft.data.tables import read_table
from rwkvpeft.errors import UserError

JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False) | some.text(),
    lambda inner: some.lists(inner) | some.dictionaries(some.text(), inner),
    max_leaves=20,
)
SHAPES = some.lists(some.integers(0, 5), max_size=3)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


@settings(max_examples=60, deadline=None)
@given(
    documents=some.lists(some.lists(some.integers(0, 65535), max_size=9), min_size=1, max_size=5),
    at=some.integers(0),
    byte=some.integers(0, 255),
)
def test_an_index_with_any_byte_changed_is_refused_or_lies_in_its_tokens(folder, documents, at, byte):
    write_binidx(folder / "data", [np.array(document, dtype=np.uint16) for document in documents])
    index = bytearray((folder / "data.idx").read_bytes())
    index[at % len(index)] = byte
    (folder / "data.idx").write_bytes(bytes(index))
    try:
        source = BinidxSource(folder / "data")
    except UserError:
        return
    assert [len(source.read(document)) for document in range(len(source))] == source.sizes.tolist()


@settings(max_examples=60, deadline=None)
@given(
    shapes=some.dictionaries(some.text(min_size=1).filter(str.isprintable), SHAPES, max_size=4),
    is_zip=some.booleans(),
    size=some.floats(0, 1),
    at=some.floats(0, 1),
    byte=some.integers(0, 255),
)
def test_a_checkpoint_cut_or_changed_is_refused_or_holds_its_names(folder, shapes, is_zip, size, at, byte):
    stream = io.BytesIO()
    torch.save(
        {name: torch.ones(shape) for name, shape in shapes.items()}, stream, _use_new_zipfile_serialization=is_zip
    )
    content = bytearray(stream.getvalue())
    content[int(at * (len(content) - 1))] = byte
    (folder / "a.pth").write_bytes(bytes(content[: int(size * len(content)) or None]))
    try:
        found = load_tensors(folder / "a.pth")
    except UserError:
        return
    assert all(tensor.sum() is not None for tensor in found.values())


@settings(max_examples=200, deadline=None)
@given(some.binary(max_size=60))
def test_any_bytes_as_a_pickle_are_a_plain_value_or_refused(program):
    try:
        value = read_pickle(io.BytesIO(b"\x80\x02" + program + b"."))
    except PickleError:
        return
    assert not callable(value)


@settings(max_examples=200, deadline=None)
@given(some.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_line_is_an_object_or_nothing_or_bad(line):
    try:
        value = parse_line(line)
    except BadLine:
        return
    assert value is None or isinstance(value, dict)


@settings(max_examples=25, deadline=None)
@given(
    records=some.lists(some.dictionaries(some.text(), JSON, min_size=1), min_size=1, max_size=6),
    block_bytes=some.integers(1, 50),
)
def test_any_records_come_back_whatever_the_blocks(folder, records, block_bytes):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [record.value for record in read_records(path)] == records
    assert sum(len(read_block(path, *place)) for place in blocks(path, block_bytes)) == len(records)


@settings(max_examples=25, deadline=None)
@given(some.lists(some.dictionaries(some.text(), JSON, min_size=1), min_size=1, max_size=6))
def test_any_list_of_objects_comes_back_from_a_json_table(folder, rows):
    (folder / "a.json").write_text(json.dumps(rows))
    assert [record.value for record in read_table(folder / "a.json")] == rows


@settings(max_examples=150, deadline=None)
@given(some.text(alphabet="ab:-[]{}&*!<?,|>'\"%@#\n \t0159.\0\x85", max_size=40) | some.text(max_size=40))
def test_any_text_is_plain_yaml_or_refused(text):
    try:
        value, _ = parse_yaml(text, "run.yaml")
    except UserError:
        return
    assert type(value).__module__ in ("builtins", "datetime")
