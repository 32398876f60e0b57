from __future__ import annotations

import pickle

import pytest
import torch

from rwkvpeft import load_model
from rwkvpeft.checkpoints.files import fingerprint, load_tensors, save_tensors
from rwkvpeft.checkpoints.quantised import Quantiser
from rwkvpeft.errors import UserError
from rwkvpeft.models.shape import new_shape
from rwkvpeft.registry import MODELS, find

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def weights():
    return find(MODELS, "x070", flag="").initial_weights(
        new_shape("x070", n_layer=2, n_embd=32, vocab_size=40, head_size=8)
    )


@pytest.mark.parametrize("version", sorted(MODELS))
def test_version_and_sizes_come_from_the_file(tmp_path, version):
    shape = new_shape(version, n_layer=2, n_embd=32, vocab_size=40, head_size=8)
    save_tensors(tmp_path / "m.pth", find(MODELS, version, flag="").initial_weights(shape))
    assert load_model(tmp_path / "m.pth").shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_keeps_the_dtype_of_its_file(tmp_path, weights, dtype):
    save_tensors(tmp_path / "m.pth", {name: tensor.to(dtype) for name, tensor in weights.items()})
    logits, _ = load_model(tmp_path / "m.pth")(TOKENS)
    assert logits.dtype == dtype


def test_prefixes_and_missing_unused_tensors_change_nothing(tmp_path, weights):
    save_tensors(tmp_path / "plain.pth", weights)
    old = {f"_forward_module.{n}": t for n, t in weights.items() if n[:14] != "blocks.0.att.v" or "value" in n}
    save_tensors(tmp_path / "old.pth", old)
    plain, prefixed = (load_model(tmp_path / name)(TOKENS)[0] for name in ("plain.pth", "old.pth"))
    assert torch.equal(plain, prefixed)


def test_a_merged_state_is_loaded_in_fp32(tmp_path, weights):
    state = torch.randn(4, 8, 8)
    merged = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_tensors(tmp_path / "m.pth", merged | {"blocks.1.att.time_state": state})
    assert torch.equal(load_model(tmp_path / "m.pth").blocks[1].att.time_state, state)


def test_merged_first_shifts_are_loaded_and_used(tmp_path, weights):
    # new weights end in zeros, behind which nothing shows
    weights = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in weights.items()}
    save_tensors(tmp_path / "m.pth", weights)
    shifts = {"blocks.0.att.shift_state": torch.randn(32), "blocks.1.ffn.shift_state": torch.randn(32)}
    save_tensors(tmp_path / "s.pth", weights | shifts)
    plain, shifted = load_model(tmp_path / "m.pth"), load_model(tmp_path / "s.pth")
    assert torch.equal(shifted.blocks[1].ffn.shift_state, shifts["blocks.1.ffn.shift_state"])
    assert not torch.equal(shifted.hidden(TOKENS)[0], plain.hidden(TOKENS)[0])


def test_a_file_that_does_not_fit_is_refused_before_anything_is_quantised(tmp_path, weights):
    del weights["ln_out.bias"]
    save_tensors(tmp_path / "m.pth", weights)
    quantiser = Quantiser("fp8")
    quantiser.module = lambda name, weight: pytest.fail("a weight was quantised")
    with pytest.raises(UserError, match="ln_out.bias is missing"):
        load_model(tmp_path / "m.pth", quantiser=quantiser)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("blocks.1.att.w2"), "blocks.1.att.w2 is missing"),
        (lambda w: w.update({"blocks.0.ffn.s_emb.weight": torch.zeros(2)}), "s_emb.weight is not a tensor of x070"),
        (lambda w: w.update({"blocks.1.att.key.weight": torch.zeros(8, 8)}), r"key.weight is \(8, 8\)"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, weights, change, words):
    change(weights)
    save_tensors(tmp_path / "m.pth", weights)
    with pytest.raises(UserError, match=words):
        load_model(tmp_path / "m.pth")


class Payload:
    def __reduce__(self):
        return (print, ("executed",))


def test_code_in_a_checkpoint_is_not_executed(tmp_path, capsys):
    torch.save({"emb.weight": torch.zeros(1), "evil": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="holds more than tensors"):
        load_tensors(tmp_path / "evil.pth")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps([1, 2, 3])])
def test_a_broken_file_is_a_user_error(tmp_path, content):
    (tmp_path / "m.pth").write_bytes(content)
    with pytest.raises(UserError, match="m.pth"):
        load_tensors(tmp_path / "m.pth")


def test_a_file_cut_short_is_a_user_error(tmp_path, weights):
    save_tensors(tmp_path / "m.pth", weights)
    whole = (tmp_path / "m.pth").read_bytes()
    (tmp_path / "m.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        load_tensors(tmp_path / "m.pth")


def test_a_changed_byte_near_either_end_changes_the_fingerprint(tmp_path):
    path = tmp_path / "m.bin"
    path.write_bytes(bytes(1 << 20))
    before = fingerprint(path)
    path.write_bytes(bytes((1 << 20) - 1) + b"\1")
    assert fingerprint(path) != before


def test_saving_a_view_does_not_save_its_whole_storage(tmp_path):
    save_tensors(tmp_path / "m.pth", {"row": torch.zeros(1000, 1000)[0]})
    assert (tmp_path / "m.pth").stat().st_size < 10_000
