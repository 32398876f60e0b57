"""Files written tensor by tensor read like any other."""

from __future__ import annotations

import zipfile

import pytest
import torch

from rwkvpeft.checkpoints.stream import Spec, write_tensors
from rwkvpeft.errors import ContractError, UserError

TENSORS = {
    "matrix": torch.randn(5, 7).to(torch.bfloat16),
    "stack": torch.randn(2, 3, 4),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
    "turned": torch.randn(4, 6).T,
    "half": torch.randn(1, 1, 9).half(),
    "counts": torch.arange(4),
}
SPECS = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("mmap", [True, False])
def test_torch_reads_the_streamed_file(tmp_path, mmap):
    path = tmp_path / "m.pth"
    write_tensors(path, SPECS, TENSORS.__getitem__)
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    assert list(loaded) == list(TENSORS)
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
        assert loaded[name].is_contiguous()


def test_data_are_aligned_and_their_checksums_hold(tmp_path):
    path = tmp_path / "m.pth"
    write_tensors(path, SPECS, TENSORS.__getitem__)
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            names = int.from_bytes(raw[info.header_offset + 26 : info.header_offset + 28], "little")
            extra = int.from_bytes(raw[info.header_offset + 28 : info.header_offset + 30], "little")
            assert (info.header_offset + 30 + names + extra) % 64 == 0


def test_the_safetensors_package_reads_the_streamed_file(tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    path = tmp_path / "m.safetensors"
    write_tensors(path, SPECS, TENSORS.__getitem__, format="safetensors")
    loaded = load_file(path)
    assert set(loaded) == set(TENSORS)
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


def test_a_tensor_that_is_not_as_announced_is_a_broken_promise(tmp_path):
    with pytest.raises(ContractError, match="matrix"):
        write_tensors(tmp_path / "m.pth", SPECS, lambda name: torch.zeros(1))


def test_a_dtype_without_a_place_in_the_format_is_refused(tmp_path):
    with pytest.raises(UserError, match="complex64"):
        write_tensors(tmp_path / "m.pth", {"a": Spec((1,), torch.complex64)}, TENSORS.__getitem__)
