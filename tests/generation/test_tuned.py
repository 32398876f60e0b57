"""Adapters and states on a model without merging."""

from __future__ import annotations

import pytest
import torch

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.adapter import Recipe, save_adapter
from rwkvpeft.checkpoints.files import fingerprint, save_tensors
from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.checkpoints.merge import merge_files
from rwkvpeft.errors import UserError
from rwkvpeft.generation.tuned import load_tuned, pick_device
from rwkvpeft.models.shape import new_shape
from rwkvpeft.registry import MODELS, find

IDS = torch.randint(0, 40, (1, 11))


@pytest.fixture(params=sorted(MODELS))
def base(request, tmp_path):
    shape = new_shape(request.param, n_layer=2, n_embd=32, vocab_size=40, head_size=16)
    weights = find(MODELS, request.param, flag="").initial_weights(shape)
    save_tensors(tmp_path / "base.pth", {name: t + 0.05 * torch.randn(t.shape) for name, t in weights.items()})
    return tmp_path / "base.pth"


def trained(base, method, path, **recipe):
    """Save a disturbed adapter and return the logits of the model it was on."""
    model = load_model(base)
    adapter = build_adapter(method, {}, recipe.pop("parts", []))
    adapter.attach(model)
    with torch.no_grad():
        for tensor in adapter.trained_tensors(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape))
    save_adapter(path, adapter.trained_tensors(model), Recipe(method=method, config=adapter.settings(), **recipe))
    return model(IDS)[0]


@pytest.mark.parametrize(("method", "parts"), [("lora", ["time", "ln", "emb", "head"]), ("lora", []), ("state", [])])
def test_merging_then_running_equals_running_the_adapter(base, tmp_path, method, parts):
    expected = trained(base, method, tmp_path / "a.pth", parts=parts)
    unmerged = load_tuned(base, tmp_path / "a.pth", device="cpu", tokenizer="bytes").model
    merge_files(base, tmp_path / "a.pth", tmp_path / "merged.pth")
    merged = load_model(tmp_path / "merged.pth")
    torch.testing.assert_close(unmerged(IDS)[0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged(IDS)[0], expected, rtol=0, atol=1e-5)


def test_an_adapter_without_a_recipe_is_understood_from_its_tensors(base, tmp_path):
    expected = trained(base, "lora", tmp_path / "a.pth", parts=["ln"])
    (tmp_path / "a.json").unlink()
    unmerged = load_tuned(base, tmp_path / "a.pth", device="cpu", tokenizer="bytes").model
    torch.testing.assert_close(unmerged(IDS)[0], expected, rtol=0, atol=1e-5)


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    trained(base, "lora", tmp_path / "a.pth", base_fingerprint=fingerprint(base)[::-1])
    with pytest.raises(UserError, match="trained on"):
        load_tuned(base, tmp_path / "a.pth", device="cpu")


def test_a_state_of_another_size_is_refused(base, tmp_path):
    save_tensors(tmp_path / "s.pth", {"blocks.0.att.time_state": torch.zeros(2, 16, 16)})
    with pytest.raises(UserError, match=r"blocks\.1\.att\.time_state"):
        load_tuned(base, tmp_path / "s.pth", device="cpu")


def test_the_recipe_names_tokenizer_and_divisor(base, tmp_path):
    trained(base, "lora", tmp_path / "a.pth", tokenizer="utf-16le", head_size_divisor=1)
    tuned = load_tuned(base, tmp_path / "a.pth", device="cpu")
    assert tuned.tokenizer.name == "utf-16le"
    assert tuned.model.blocks[0].att.ln_x.eps == pytest.approx(1e-5)


@pytest.mark.parametrize("name", ["cuda:99", "toaster"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match="--device"):
        pick_device(name)
