"""Files of tensors."""

import resource
from pathlib import Path

import pytest
import torch

from rwkvpeft.checkpoints.files import load_tensors, save_tensors


def test_equal_tensors_make_equal_files(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    save_tensors(tmp_path / "first.pth", tensors)
    save_tensors(tmp_path / "second.pth", tensors)
    assert (tmp_path / "first.pth").read_bytes() == (tmp_path / "second.pth").read_bytes()
    found = torch.load(tmp_path / "first.pth", weights_only=True, mmap=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit counts from what Linux tells")
def test_a_lack_of_memory_is_not_called_a_broken_file(tmp_path):
    large = tmp_path / "large.pth"
    save_tensors(large, {"a": torch.zeros(1 << 26)})
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (1 << 26), before[1]))
        with pytest.raises(MemoryError, match="no room to read"):
            load_tensors(large)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
