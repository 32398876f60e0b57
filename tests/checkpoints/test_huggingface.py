"""Adapters in Hugging Face peft's folder format: nothing is lost, and both libraries compute the same from it."""

from __future__ import annotations

import json
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")

from rwkvpeft.adapters.build import build_adapter  # noqa: E402
from rwkvpeft.adapters.huggingface import reason_against, tuner_names  # noqa: E402
from rwkvpeft.checkpoints.adapter import Recipe, load_adapter  # noqa: E402
from rwkvpeft.checkpoints.huggingface import read_folder, write_folder  # noqa: E402
from rwkvpeft.checkpoints.load import build_model, fill_model  # noqa: E402
from rwkvpeft.errors import UserError  # noqa: E402
from rwkvpeft.models.layers import Linear  # noqa: E402
from rwkvpeft.models.shape import new_shape  # noqa: E402
from rwkvpeft.registry import ADAPTERS, BACKENDS, MODELS, find  # noqa: E402

METHODS = {
    "lora": {"r": 4},
    "rslora": {"r": 4, "use_rslora": True},
    "dora": {"r": 4},
    "miss": {"r": 12},
    "mini": {"r": 8, "mini_r": 4},
    "adalora": {"init_r": 6, "target_r": 3},
    "c3a": {"block_size": 16},
    "fourierft": {"n_frequency": 100},
    "gralora": {"r": 8},
    "psoft": {"r": 8},
    "randlora": {"r": 8},
    "road": {"group_size": 16},
    "shira": {"r": 4},
    "vera": {"r": 16},
    "waveft": {"n_frequency": 64},
}
OURS = {"rslora": "lora", "mini": "miss"}
NAMES = ["lora", "rslora", "dora", "miss", "mini",
         *(name for name in tuner_names() if reason_against(name) is None and name not in ADAPTERS)]


SHAPE = new_shape("x070", n_layer=2, n_embd=32, vocab_size=40, head_size=16)


@cache
def random_weights():
    draw = torch.Generator().manual_seed(1)
    return {name: tensor.float() + 0.1 * torch.randn(tensor.shape, generator=draw)
            for name, tensor in find(MODELS, "x070", flag="").initial_weights(SHAPE).items()}


def small_model():
    model = build_model(SHAPE, find(BACKENDS["wkv7"], "reference", flag="").run)
    fill_model(model, random_weights(), device="cpu", dtype=torch.float32, source="small model")
    return model.eval()


@pytest.fixture
def ids():
    return torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(3))


def trained(name, parts=("ln",)):
    """A model with an adapter whose every tensor has changed, the adapter's file and its recipe."""
    method = OURS.get(name, name)
    adapter = build_adapter(method, METHODS.get(name, {}), parts)
    model = small_model()
    adapter.attach(model)
    with torch.no_grad():
        for tensor in adapter.trained_tensors(model).values():
            tensor.add_(0.05 * torch.randn(tensor.shape))
    tensors = {key: tensor.detach().clone() for key, tensor in adapter.file_tensors(model).items()}
    recipe = Recipe(method=method, config=adapter.settings(), train_parts=list(parts), base_model="rwkv.pth", step=7,
                    quant="nf4", shape={"n_layer": 2})
    return model, tensors, recipe


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_comes_back_from_the_folder_bit_for_bit(name, tmp_path):
    _, tensors, recipe = trained(name)
    write_folder(tmp_path / "hf", tensors, recipe)
    found, again = read_folder(tmp_path / "hf")
    assert again == recipe
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    assert {key: tensor.dtype for key, tensor in found.items()} == {key: t.dtype for key, t in tensors.items()}


@pytest.mark.parametrize("name", NAMES)
def test_peft_reads_the_folder_and_computes_the_same(name, tmp_path, ids, recwarn):
    model, tensors, recipe = trained(name)
    write_folder(tmp_path / "hf", tensors, recipe)
    theirs = peft.PeftModel.from_pretrained(small_model(), tmp_path / "hf").eval()
    torch.testing.assert_close(theirs(ids)[0], model(ids)[0], rtol=0, atol=2e-5)
    assert not [warning for warning in recwarn if "missing adapter keys" in str(warning.message)]


@pytest.mark.parametrize("name", ["lora", "dora", "miss", "vera", "randlora", "loha"])
def test_a_folder_written_by_peft_is_read(name, tmp_path, ids):
    kind = {"dora": "lora"}.get(name, name).upper()
    settings = {"peft_type": kind, "target_modules": ["key", "ffn.value"], "r": 8, "modules_to_save": ["ln1"]}
    config = peft.get_peft_config({**settings, **({"use_dora": True} if name == "dora" else {})})
    theirs = peft.get_peft_model(small_model(), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path / "hf")
    tensors, recipe = load_adapter(tmp_path / "hf")
    adapter, model = build_adapter(recipe.method, recipe.config, ["ln"]), small_model()
    rest = adapter.take_constants(tensors)
    adapter.attach(model)
    adapter.load(model, {**adapter.trained_tensors(model), **rest})
    assert recipe.method == name
    torch.testing.assert_close(model(ids)[0], theirs(ids)[0], rtol=0, atol=2e-5)


GOLDEN = ["lora", "lora_rslora", "lora_dora", "miss", "miss_random", "miss_nondiv", "miss_mini"]


@pytest.fixture
def reference(golden):
    return np.load(golden / "peft_hf.npz"), json.loads((golden / "peft_hf.json").read_text())


def golden_folder(folder, reference, name):
    arrays, told = reference
    folder.mkdir()
    prefix = f"{name}|adapter|"
    tensors = {key.removeprefix(prefix): torch.from_numpy(arrays[key]) for key in arrays.files
               if key.startswith(prefix)}
    safetensors.save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(told[name]["config"]))
    return tensors


class Stack(nn.Module):
    """The channel mixing the reference was computed with."""

    def __init__(self, arrays):
        super().__init__()
        self.weights = {key.removeprefix("base|"): torch.from_numpy(arrays[key]) for key in arrays.files
                        if key.startswith("base|")}
        for name in ("receptance", "key", "value", "output"):
            weight = self.weights[f"{name}.weight"]
            linear = Linear(weight.shape[1], weight.shape[0])
            linear.weight = nn.Parameter(weight)
            self.add_module(name, linear)

    def forward(self, x):
        norms = {name.rpartition(".")[2]: tensor for name, tensor in self.weights.items() if tensor.dim() == 1}
        x = nn.functional.layer_norm(x, x.shape[-1:], norms.get("weight"), norms.get("bias"))
        hidden = self.value(torch.relu(self.key(x)) ** 2)
        return self.output(torch.sigmoid(self.receptance(x)) * hidden)


@pytest.mark.golden
@pytest.mark.parametrize("name", GOLDEN)
def test_forward_and_merge_equal_those_of_the_reference(name, reference, tmp_path):
    arrays, _ = reference
    golden_folder(tmp_path / "hf", reference, name)
    tensors, recipe = read_folder(tmp_path / "hf")
    adapter, stack = build_adapter(recipe.method, recipe.config), Stack(arrays)
    merged = {key: adapter.merge(key, tensor.clone(), tensors) for key, tensor in stack.weights.items()
              if tensor.dim() == 2}
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, torch.from_numpy(arrays[f"{name}|merged|{key}"]), rtol=1e-6, atol=1e-6)
    for path in ("receptance", "key", "value", "output"):
        layer = adapter.make_layer(path, stack.get_submodule(path)).eval()
        layer.load_state_dict({key.removeprefix(f"{path}."): tensor for key, tensor in tensors.items()
                               if key.startswith(f"{path}.")}, strict=False)
        setattr(stack, path, layer)
    y = stack(torch.from_numpy(arrays["x"]))
    torch.testing.assert_close(y, torch.from_numpy(arrays[f"{name}|y"]), rtol=1e-6, atol=1e-6)


@pytest.mark.golden
@pytest.mark.parametrize("name", GOLDEN)
def test_a_folder_comes_back_from_our_names_bit_for_bit(name, reference, tmp_path):
    before = golden_folder(tmp_path / "hf", reference, name)
    tensors, recipe = read_folder(tmp_path / "hf")
    write_folder(tmp_path / "again", tensors, recipe)
    after = safetensors.load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    told = reference[1][name]["config"]
    same = [key for key in told if key not in ("target_modules", "init_weights")]
    assert {key: config[key] for key in same} == {key: told[key] for key in same}
    assert sorted(config["target_modules"]) == sorted(told["target_modules"])


@pytest.mark.golden
def test_hugging_faces_bat_is_refused(reference, tmp_path):
    golden_folder(tmp_path / "hf", reference, "miss_bat")
    with pytest.raises(UserError, match="output rows"):
        read_folder(tmp_path / "hf")


@pytest.mark.parametrize(
    ("method", "settings", "parts", "message"),
    [
        ("bat", {"r": 8}, [], "blocks by input columns"),
        ("pissa", {"r": 4}, [], "pissa has no place"),
        ("lora+state", {"r": 4}, [], "has no place"),
        ("lora", {"r": 4}, ["time"], "no place for"),
        ("vera", {"r": 8}, ["time"], "no place for"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_nothing_written(method, settings, parts, message, tmp_path):
    adapter, model = build_adapter(method, settings, parts), small_model()
    adapter.attach(model)
    recipe = Recipe(method=method, config=adapter.settings())
    with pytest.raises(UserError, match=message):
        write_folder(tmp_path / "hf", adapter.file_tensors(model), recipe)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder(tmp_path):
    """A LoRA adapter in peft's format."""
    _, tensors, recipe = trained("lora", parts=())
    write_folder(tmp_path / "hf", tensors, recipe)
    return tmp_path / "hf"


def change(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_qalora": True}, "use_qalora"),
        ({"alpha_pattern": {"key": 2}}, "alpha_pattern"),
        ({"bias": "all"}, "bias all"),
        ({"init_lora_weights": "pissa"}, "changed weights of its base"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"r": 5}, "rank 4"),
        ({"peft_type": ""}, "does not name its method"),
        ({"peft_type": "FOURIERFT"}, "does not know"),
    ],
)
def test_an_adapter_that_computes_something_else_is_refused(folder, values, message):
    change(folder, **values)
    with pytest.raises(UserError, match=message):
        read_folder(folder)


def test_a_recipe_that_is_no_longer_true_is_passed_over(folder):
    change(folder, lora_alpha=5)
    assert read_folder(folder)[1].config["lora_alpha"] == 5


def test_what_stood_aside_is_not_dropped_from_a_changed_folder(tmp_path):
    _, tensors, recipe = trained("lora", parts=("time",))
    write_folder(tmp_path / "hf", tensors, recipe, set_aside=True)
    change(tmp_path / "hf", lora_alpha=5)
    with pytest.raises(UserError, match="has been changed since"):
        read_folder(tmp_path / "hf")


def test_pickled_adapters_are_not_opened(folder):
    shutil.move(folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    with pytest.raises(UserError, match="may run code"):
        read_folder(folder)


def test_a_file_cut_short_is_refused(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="cannot be read"):
        read_folder(folder)


def test_a_folder_with_something_in_it_is_not_overwritten(folder):
    _, tensors, recipe = trained("lora", parts=())
    with pytest.raises(UserError, match="there already"):
        write_folder(folder, tensors, recipe)


def test_a_failed_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    _, tensors, recipe = trained("lora", parts=())
    monkeypatch.setattr(safetensors, "save_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="cannot write"):
        write_folder(tmp_path / "hf", tensors, recipe)
    assert list(tmp_path.iterdir()) == []
