"""Contract of all adapters on small models of every version."""

from __future__ import annotations

import pytest
import torch

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.checkpoints.load import build_model, fill_model
from rwkvpeft.errors import UserError
from rwkvpeft.models.shape import new_shape
from rwkvpeft.registry import ADAPTERS, BACKENDS, MODELS, find

VERSIONS = sorted(MODELS)
METHODS = [*sorted(ADAPTERS), "lora+state"]


def small_model(version: str, dtype: torch.dtype = torch.float32):
    """Two layers of width 32 with every weight random, so that no update is multiplied by zero."""
    shape = new_shape(version, n_layer=2, n_embd=32, vocab_size=40, head_size=16)
    weights = find(MODELS, version, flag="").initial_weights(shape)
    weights = {name: tensor + 0.05 * torch.randn(tensor.shape) for name, tensor in weights.items()}
    operator = {"x052": "wkv5", "x060": "wkv6", "x070": "wkv7"}[version]
    model = build_model(shape, find(BACKENDS[operator], "reference", flag="").run)
    fill_model(model, weights, device="cpu", dtype=dtype, source="small model")
    return model


SETTINGS = {"bat": {"r": 8}, "miss": {"r": 12}, "bone": {"r": 8}, "disha": {"r": 8}, "state": {"token_shift": True}}


def small_adapter(method):
    """Sizes that suit ``small_model``."""
    return build_adapter(method, SETTINGS.get(method, {}), [] if method == "state" else ["time", "ln"])


def tokens(length: int = 9):
    return torch.randint(0, 40, (2, length))


def disturb(adapter, model) -> None:
    with torch.no_grad():
        for tensor in adapter.trained_tensors(model).values():
            tensor.add_(0.1 * torch.randn(tensor.shape))


@pytest.fixture(params=VERSIONS)
def model(request):
    return small_model(request.param)


@pytest.fixture(params=METHODS)
def adapter(request):
    return small_adapter(request.param)


def test_an_attached_adapter_changes_nothing_at_first(model, adapter):
    ids = tokens()
    before, _ = model(ids)
    adapter.attach(model.eval())
    after, _ = model(ids)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_gradients_reach_the_trained_tensors_and_no_others(model, adapter):
    adapter.attach(model)
    disturb(adapter, model)
    model(tokens())[0].sin().sum().backward()
    trained = adapter.trained_tensors(model)
    with_gradient = {id(parameter) for parameter in model.parameters() if parameter.grad is not None}
    assert with_gradient == {id(tensor) for tensor in trained.values()}
    assert all(tensor.grad.abs().sum() > 0 for tensor in trained.values())


def test_trained_tensors_are_fp32_on_a_bf16_model(adapter):
    model = small_model("x070", torch.bfloat16)
    adapter.attach(model)
    logits, _ = model(tokens())
    assert logits.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in adapter.trained_tensors(model).values()} == {torch.float32}


def test_disabled_gives_the_base_model_and_then_the_adapter_again(model, adapter):
    ids = tokens()
    base, _ = model.eval()(ids)
    adapter.attach(model)
    disturb(adapter, model)
    tuned, _ = model(ids)
    with adapter.disabled(model):
        torch.testing.assert_close(model(ids)[0], base, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(ids)[0], tuned, rtol=0, atol=0)
    assert (tuned - base).abs().max() > 1e-3


def test_an_adapter_that_is_disabled_can_be_disabled_again_and_loses_nothing(model, adapter):
    ids = tokens()
    base, _ = model.eval()(ids)
    adapter.attach(model)
    disturb(adapter, model)
    tuned, _ = model(ids)
    with adapter.disabled(model):
        with adapter.disabled(model):
            torch.testing.assert_close(model(ids)[0], base, rtol=0, atol=1e-6)
        torch.testing.assert_close(model(ids)[0], base, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(ids)[0], tuned, rtol=0, atol=0)


def test_loading_gives_the_logits_that_were_saved(model, adapter):
    adapter.attach(model.eval())
    disturb(adapter, model)
    saved = {name: tensor.detach().clone() for name, tensor in adapter.trained_tensors(model).items()}
    ids = tokens()
    expected, _ = model(ids)
    disturb(adapter, model)
    adapter.load(model, saved)
    torch.testing.assert_close(model(ids)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_loading_another_adapters_file_names_the_first_differences(adapter, fault):
    model = small_model("x060")
    adapter.attach(model)
    tensors = dict(adapter.trained_tensors(model))
    name = next(iter(tensors))
    if fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        name = "blocks.7.att.key.lora_A"
        tensors[name] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(3)
    with pytest.raises(UserError, match=name):
        adapter.load(model, tensors)


def test_settings_survive_being_written_and_read(adapter):
    again = build_adapter(adapter.name, adapter.settings())
    assert again.config == adapter.config


def test_an_unknown_setting_is_answered_with_the_known_ones(adapter):
    with pytest.raises(UserError, match="rank"):
        build_adapter(adapter.name, {"rank": 4})


def test_no_adapter_is_built_for_full_training():
    assert build_adapter("none", {}) is None


def test_a_head_with_an_adapter_cannot_be_a_trained_part_too():
    adapter = build_adapter("lora", {"target_modules": ["att.key", "head"]}, ["head"])
    with pytest.raises(UserError, match="on the head already"):
        adapter.attach(small_model("x070"))


@pytest.mark.parametrize("method", ["lora", "miss", "bat"])
def test_an_empty_tensor_is_refused_before_it_is_merged(method):
    adapter = small_adapter(method)
    empty = {"lora": {"lora_A": (0, 8), "lora_B": (8, 0)}, "miss": {"miss": (0, 8)}, "bat": {"miss": (0, 0, 0)}}[method]
    tensors = {f"k.{name}": torch.zeros(shape) for name, shape in empty.items()}
    with pytest.raises(UserError, match="does not fit"):
        adapter.changes("k.weight", (8, 8), tensors)
