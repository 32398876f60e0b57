"""Files of arrays in the safetensors format."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rwkvpeft.data.file_array import FileChanged
from rwkvpeft.data.tensor_file import (
    Layout,
    TensorFile,
    empty_arrays,
    holds,
    size_of_layout,
    to_bf16,
    write_arrays,
)
from rwkvpeft.errors import UserError

LAYOUTS = {"ids": Layout("U16", (5, 3)), "tails": Layout("F32", (2, 5)), "half": Layout("F16", (5,)),
           "brief": Layout("BF16", (5, 2))}  # fmt: skip


@pytest.fixture
def written(tmp_path):
    draw = np.random.default_rng(0)
    values = {
        "ids": draw.integers(0, 65536, (5, 3)),
        "tails": draw.normal(size=(2, 5)).astype(np.float32),
        "half": draw.normal(size=5).astype(np.float16),
        "brief": draw.normal(size=(5, 2)).astype(np.float32),
    }
    path = tmp_path / "a.safetensors"
    write_arrays(path, LAYOUTS, {**values, "brief": to_bf16(values["brief"])})
    return path, values


def test_parts_are_read_as_they_were_written(written):
    path, values = written
    file = TensorFile(path, LAYOUTS)
    np.testing.assert_array_equal(file.read("ids", 1, 4), values["ids"][1:4])
    np.testing.assert_array_equal(file.read("half", 0, 5), values["half"])
    np.testing.assert_array_equal(file.read_row("tails", 1, 2, 5), values["tails"][1, 2:5])
    expected = torch.from_numpy(values["brief"]).bfloat16().float().numpy()
    np.testing.assert_array_equal(file.read("brief", 3, 5), expected[3:5])


def test_other_programs_read_the_file(written):
    safetensors = pytest.importorskip("safetensors.torch")
    path, values = written
    found = safetensors.load_file(path)
    assert found["tails"].tolist() == values["tails"].tolist()
    assert found["ids"].tolist() == values["ids"].tolist()
    assert torch.equal(found["brief"], torch.from_numpy(values["brief"]).bfloat16())


def test_the_size_is_known_before(written):
    assert written[0].stat().st_size == size_of_layout(LAYOUTS)


def test_empty_arrays_fit_their_layouts():
    made = empty_arrays(LAYOUTS)
    assert all(made[name].shape == layout.shape for name, layout in LAYOUTS.items())


@pytest.mark.parametrize("place", [0, 9, -1])
def test_a_file_that_says_something_else_of_itself_is_refused(written, place):
    path, content = written[0], bytearray(written[0].read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[place % header] ^= 1
    path.write_bytes(content)
    assert not holds(path, LAYOUTS)
    with pytest.raises(UserError, match="does not hold what it should"):
        TensorFile(path, LAYOUTS)


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 40, b"\xff" * 40, b"\x02" + b"\0" * 7 + b"{}", b"\x02" + b"\0" * 7 + b"[]"]
)
def test_a_file_of_another_format_is_refused(tmp_path, content):
    path = tmp_path / "b.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="does not hold what it should"):
        TensorFile(path, LAYOUTS)


def test_a_file_that_is_cut_short_is_noticed(written):
    path = written[0]
    file = TensorFile(path, LAYOUTS)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(FileChanged):
        file.read("brief", 4, 5)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.00390625, 3.14159, -88.1, 1e-30])
def test_bits_of_bf16_are_those_of_pytorch(value):
    expected = torch.tensor([value]).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_bf16(np.array([value], np.float32)), expected)
