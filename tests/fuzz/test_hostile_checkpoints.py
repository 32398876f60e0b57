"""Checkpoints and recipes made to do harm: each is refused, at once and with little memory."""

import io
import os
import pickle
import zipfile

import pytest
import torch

from rwkvpeft.checkpoints.adapter import load_adapter
from rwkvpeft.checkpoints.files import load_tensors, save_tensors
from rwkvpeft.errors import UserError
from rwkvpeft.models.shape import read_shape

pytestmark = pytest.mark.usefixtures("bounded")


class _Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self._parts = function, arguments

    def __reduce__(self):
        return self._parts


def archive(path, parts, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in parts.items():
            file.writestr(f"archive/{name}", content)
    return path


def described(path, *, elements=4, shape=(2, 2), stride=(2, 1), offset=0, data=bytes(16)):
    """A checkpoint of one fp32 tensor of that shape in that storage, of ``data``."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return ("storage", torch.FloatStorage, "0", "cpu", elements) if thing is torch else None

    stream = io.BytesIO()
    tensor = _Call(torch._utils._rebuild_tensor_v2, torch, offset, shape, stride, False, {})
    Pickler(stream, 2).dump({"a": tensor})
    return archive(path, {"data.pkl": stream.getvalue(), "data/0": data})


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("function", [os.system, eval, getattr, bytearray])
def test_code_in_a_checkpoint_is_named_and_not_run(tmp_path, function, is_zip):
    path = tmp_path / "model.pth"
    torch.save({"a": _Call(function, f"touch {tmp_path}/hacked")}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match=f"holds more than tensors(.|\n)*{function.__name__}"):
        load_tensors(path)
    assert not (tmp_path / "hacked").exists()


def test_a_zip_bomb_is_refused_by_its_directory(tmp_path):
    path = archive(tmp_path / "model.pth", {"data.pkl": b"\x80\x02}.", "data/0": bytes(1 << 28)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="compressed"):
        load_tensors(path)


def test_a_description_that_is_a_bomb_is_refused(tmp_path):
    path = archive(tmp_path / "model.pth", {"data.pkl": b"\x80\x02" + b"}" * (10 << 20) + b"."})
    with pytest.raises(UserError, match="instructions"):
        load_tensors(path)


def test_a_memo_of_two_thousand_million_places_takes_no_memory(tmp_path):
    path = archive(tmp_path / "model.pth", {"data.pkl": b"\x80\x02}r\xff\xff\xff\x7f."})
    assert load_tensors(path) == {}


def test_a_key_nested_too_deeply_to_be_hashed_does_not_end_the_process(tmp_path):
    path = archive(tmp_path / "model.pth", {"data.pkl": b"\x80\x02})" + b"\x85" * 500_000 + b"K\x01s."})
    with pytest.raises(UserError, match="names and numbers"):
        load_tensors(path)


@pytest.mark.parametrize(
    "change",
    [
        {"elements": 5},
        {"elements": 1 << 62},
        {"shape": (2, 3)},
        {"shape": (1 << 40, 1 << 40)},
        {"shape": (-1, 2)},
        {"stride": (4, 1)},
        {"stride": (-2, 1)},
        {"offset": 1},
        {"offset": -1},
        {"shape": (1 << 40, 1 << 40), "stride": (0, 0)},
        {"shape": (4,)},
        {"shape": (1 << 62, 0)},
        {"data": bytes(8)},
        {"shape": (1.5, 2)},
    ],
    ids=str,
)
def test_a_tensor_that_does_not_lie_in_its_file_is_refused(tmp_path, change):
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        load_tensors(described(tmp_path / "model.pth", **change))


def test_the_tensor_that_the_others_are_made_of_is_read(tmp_path):
    assert load_tensors(described(tmp_path / "model.pth"))["a"].tolist() == [[0, 0], [0, 0]]


def test_many_tensors_of_one_storage_are_refused(tmp_path):
    shared = torch.zeros(1000)
    torch.save({f"a{number}": shared for number in range(5000)}, tmp_path / "model.pth")
    with pytest.raises(UserError, match="larger than the file"):
        load_tensors(tmp_path / "model.pth")


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_checkpoint_cut_anywhere_is_refused(tmp_path, is_zip):
    torch.save(
        {"a": torch.ones(300), "b": torch.ones(5)}, tmp_path / "whole.pth", _use_new_zipfile_serialization=is_zip
    )
    whole = (tmp_path / "whole.pth").read_bytes()
    for size in range(0, len(whole) - 1, 37):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        with pytest.raises(UserError):
            load_tensors(tmp_path / "cut.pth")


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_writes_comes_back_in_either_format(tmp_path, is_zip, protocol):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "whole": base,
        "view": base.t()[1:],
        "empty": torch.zeros(0, 3),
        "single": torch.tensor(2),
        "eight": torch.ones(3).to(torch.float8_e4m3fn),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    nested = {
        "state_dict": tensors,
        "epoch": 3,
        "lr": [1e-3, None, True],
        "big": 2**70,
        "bytes": b"\xff",
        "dtype": torch.float32,
    }
    torch.save(nested, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip, pickle_protocol=protocol)
    found = load_tensors(tmp_path / "a.pth")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()
    }
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in tensors.items())


def test_a_block_number_of_a_thousand_million_makes_no_list(tmp_path):
    names = ("x_r", "r_k", "w1")
    tensors = {f"blocks.0.att.{name}": torch.zeros(2, 2) for name in names} | {
        "blocks.999999999.att.x_r": torch.zeros(1)
    }
    with pytest.raises(UserError, match="lacks whole blocks"):
        read_shape(tensors)


@pytest.mark.parametrize(
    "recipe",
    [
        '{"method": 5}',
        '{"method": "lora", "config": []}',
        '{"method": "lora", "step": "x"}',
        '{"method": "lora", "format": "x"}',
        '{"method": "\\ud800"}',
        "[" * 100_000,
        '{"method": "lora", "step": ' + "9" * 5000 + "}",
        "\xff",
        '{"method": "lora", "ctx_len": 1e400}',
    ],
)
def test_a_broken_recipe_is_refused(tmp_path, recipe):
    save_tensors(tmp_path / "rwkv-0.pth", {"blocks.0.att.key.lora_A": torch.zeros(2, 2)})
    (tmp_path / "rwkv-0.json").write_bytes(recipe.encode("latin-1"))
    with pytest.raises(UserError, match=r"rwkv-0\.json"):
        load_adapter(tmp_path / "rwkv-0.pth")
