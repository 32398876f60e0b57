"""Adapter files and their recipes."""

from __future__ import annotations

import json

import pytest
import torch

from rwkvpeft.checkpoints.adapter import Recipe, check_base, load_adapter, recipe_path, save_adapter
from rwkvpeft.checkpoints.files import fingerprint, save_tensors
from rwkvpeft.errors import UserError

TENSORS = {"blocks.0.att.key.lora_A": torch.randn(2, 4), "blocks.0.att.key.lora_B": torch.randn(6, 2)}
RECIPE = Recipe(method="lora", config={"r": 2}, train_parts=["ln"], base_model="b.pth", step=7, loss=1.25, ctx_len=64)


def test_tensors_and_recipe_come_back(tmp_path):
    path = tmp_path / "rwkv-0.pth"
    save_adapter(path, TENSORS, RECIPE)
    tensors, recipe = load_adapter(path)
    assert recipe == RECIPE
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


def test_the_file_holds_nothing_but_tensors(tmp_path):
    path = tmp_path / "rwkv-0.pth"
    save_adapter(path, TENSORS, RECIPE)
    assert set(torch.load(path, weights_only=True, mmap=True)) == set(TENSORS)


def test_an_adapter_without_a_recipe_can_be_loaded(tmp_path):
    path = tmp_path / "a.pth"
    save_tensors(path, TENSORS)
    assert load_adapter(path)[1] is None


def test_the_recipe_beside_a_merged_model_is_that_of_its_adapter(tmp_path):
    assert recipe_path(tmp_path / "rwkv-3-adapter.pth") == recipe_path(tmp_path / "rwkv-3.pth")
    assert recipe_path(tmp_path / "rwkv-3.pth") == tmp_path / "rwkv-3.json"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_adapter_is_neither_saved_nor_loaded(tmp_path, value):
    broken = {**TENSORS, "blocks.0.ln1.weight": torch.tensor([1.0, value])}
    path = tmp_path / "a.pth"
    with pytest.raises(UserError, match="ln1"):
        save_adapter(path, broken, RECIPE)
    assert not list(tmp_path.iterdir())
    save_tensors(path, broken)
    with pytest.raises(UserError, match="ln1"):
        load_adapter(path)


def test_names_of_trainers_are_stripped(tmp_path):
    path = tmp_path / "a.pth"
    save_tensors(path, {f"_forward_module.model.{name}": tensor for name, tensor in TENSORS.items()})
    assert set(load_adapter(path)[0]) == set(TENSORS)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"method": "lora", "format": 99}'])
def test_a_broken_recipe_is_named(tmp_path, text):
    path = tmp_path / "a.pth"
    save_tensors(path, TENSORS)
    recipe_path(path).write_text(text)
    with pytest.raises(UserError, match=r"a\.json"):
        load_adapter(path)


def test_keys_of_later_versions_are_ignored():
    text = json.dumps({**json.loads(RECIPE.to_json()), "colour": "blue"})
    assert Recipe.from_json(text, "a.json") == RECIPE


def test_another_base_is_refused(tmp_path):
    right, wrong = tmp_path / "b.pth", tmp_path / "c.pth"
    save_tensors(right, TENSORS)
    save_tensors(wrong, {name: tensor + 1 for name, tensor in TENSORS.items()})
    recipe = Recipe(method="lora", base_model="b.pth", base_fingerprint=fingerprint(right))
    check_base(recipe, right)
    with pytest.raises(UserError, match=r"b\.pth"):
        check_base(recipe, wrong)
