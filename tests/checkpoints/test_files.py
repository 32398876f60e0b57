"""Files of tensors."""

import torch

from rwkvpeft.checkpoints.files import save_tensors


def test_equal_tensors_make_equal_files(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    save_tensors(tmp_path / "first.pth", tensors)
    save_tensors(tmp_path / "second.pth", tensors)
    assert (tmp_path / "first.pth").read_bytes() == (tmp_path / "second.pth").read_bytes()
    found = torch.load(tmp_path / "first.pth", weights_only=True, mmap=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
