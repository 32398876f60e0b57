"""Hugging Face peft's tuners as adapters. Contracts run over every tuner of the installed package that is usable."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.adapters.huggingface import method_settings, reason_against, tuner_names
from rwkvpeft.checkpoints.load import build_model, fill_model
from rwkvpeft.errors import UserError
from rwkvpeft.models.shape import new_shape
from rwkvpeft.quantization.fp8 import Fp8
from rwkvpeft.quantization.linear import QuantizedLinear
from rwkvpeft.registry import ADAPTERS, BACKENDS, MODELS, find

SETTINGS = json.loads((Path(__file__).parents[1] / "tuners.json").read_text())
"""The tuners that work, with settings that go with a width of 32."""
USABLE = [name for name in SETTINGS if name in tuner_names()]


def build(method, **settings):
    return build_adapter(method, {**SETTINGS.get(method, {}), **settings}, ["ln"])


def weights(version="x070"):
    shape = new_shape(version, n_layer=2, n_embd=32, vocab_size=40, head_size=16)
    draw = torch.Generator().manual_seed(1)
    start = find(MODELS, version, flag="").initial_weights(shape)
    return shape, {name: tensor.float() + 0.1 * torch.randn(tensor.shape, generator=draw)
                   for name, tensor in start.items()}


SHAPE, WEIGHTS = weights()


def small_model(tensors=WEIGHTS, device="cpu"):
    with torch.device(device):
        model = build_model(SHAPE, find(BACKENDS["wkv7"], "reference", flag="").run)
    if device != "meta":
        fill_model(model, tensors, device="cpu", dtype=torch.float32, source="small model")
    return model.eval()


def disturb(adapter, model):
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in adapter.trained_tensors(model).values():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=draw))


def copies(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.fixture
def ids():
    return torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=USABLE)
def attached(request):
    """A tuner on a small model, not trained yet."""
    torch.manual_seed(4)
    model, adapter = small_model(), build(request.param)
    adapter.attach(model)
    return model, adapter


def logits(model, ids):
    return model(ids)[0]


@pytest.mark.slow
def test_the_tuners_that_are_listed_are_those_that_work():
    working = {name for name in tuner_names() if reason_against(name) is None}
    assert working - set(ADAPTERS) == set(USABLE)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("prompt_tuning", "virtual tokens"),
        ("prefix_tuning", "virtual tokens"),
        ("adaption_prompt", "attention"),
        ("xlora", "trained already"),
        ("trainable_tokens", "--train_parts emb"),
        ("ln_tuning", "copy of the weight"),
        ("poly", "task_ids"),
        ("lily", "cannot be merged"),
        ("vblora", "first values already change"),
    ],
)
def test_a_method_that_breaks_a_promise_is_refused_with_the_reason(method, reason):
    if method not in tuner_names():
        pytest.skip(f"this peft has no {method}")
    with pytest.raises(UserError, match=f"{method} cannot be used on RWKV.*{reason}"):
        build_adapter(method, {})


def test_names_are_found_in_any_letters_and_unknown_ones_get_the_nearest():
    assert build("LoHa").name == "loha"
    with pytest.raises(UserError, match="--peft loha"):
        build_adapter("lohaa", {})


def test_help_knows_the_packages_settings():
    settings = method_settings("vera")
    assert settings().r == 256
    assert "modules_to_save" not in settings.__dataclass_fields__


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"oft_blok_size": 4}, "write oft_block_size"),
        ({"modules_to_save": ["head"]}, "--train_parts"),
        ({"bias": "all"}, "no bias"),
        ({"target_modules": ["nothing"]}, "names no linear"),
        ({"target_modules": 3}, "a list of names"),
        ({"layers_to_transform": [7]}, "leave no linear"),
    ],
)
def test_settings_that_have_no_meaning_here_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        build("oft", **settings).attach(small_model())


def test_settings_that_do_not_suit_the_model_are_refused_in_the_packages_words():
    with pytest.raises(UserError, match="divisible"):
        build("road", group_size=24).attach(small_model())


def test_an_adapter_config_of_the_package_can_be_pasted():
    assert build("loha", task_type="CAUSAL_LM", peft_type="LOHA", modules_to_save=None, inference_mode=True)


def test_targets_exclusions_and_layers_choose_the_linears():
    model = small_model()
    adapter = build("loha", target_modules="att.key,ffn.key", exclude_modules=["ffn.key"], layers_to_transform=[1])
    adapter.attach(model)
    assert {name.rpartition(".")[0] for name in adapter.own_tensors(model)} == {"blocks.1.att.key"}


def test_settings_come_back_through_json(attached):
    _, adapter = attached
    again = build_adapter(adapter.name, json.loads(json.dumps(adapter.settings())))
    assert again.settings() == adapter.settings()


def test_an_attached_tuner_changes_nothing_at_first(attached, ids):
    model, _ = attached
    torch.testing.assert_close(logits(model, ids), logits(small_model(), ids), rtol=0, atol=2e-5)


def test_only_trained_tensors_get_gradients_and_all_are_fp32(attached, ids):
    model, adapter = attached
    disturb(adapter, model)
    logits(model, ids).sin().sum().backward()
    trained = adapter.trained_tensors(model).values()
    assert {id(tensor) for tensor in trained} == {id(p) for p in model.parameters() if p.grad is not None}
    assert {tensor.dtype for tensor in trained} == {torch.float32}


def test_switched_off_the_base_model_answers(attached, ids):
    model, adapter = attached
    disturb(adapter, model)
    tuned = logits(model, ids)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with adapter.disabled(model):
        assert torch.equal(logits(model, ids), logits(small_model(), ids))
    assert torch.equal(logits(model, ids), tuned)
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not torch.allclose(tuned, logits(small_model(), ids), atol=1e-4)


def test_a_file_brings_a_tuner_back_whatever_the_seed(attached, ids):
    model, adapter = attached
    disturb(adapter, model)
    tensors = copies(adapter.file_tensors(model))
    torch.manual_seed(99)
    again, fresh = small_model(), build(adapter.name)
    rest = fresh.take_constants(tensors)
    fresh.attach(again)
    fresh.load(again, rest)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert fresh.file_tensors(again).keys() == tensors.keys()


def test_a_merged_weight_computes_what_the_tuner_does(attached, ids):
    model, adapter = attached
    disturb(adapter, model)
    fresh = build(adapter.name)
    rest = fresh.take_constants(copies(adapter.file_tensors(model)))
    merged = {}
    for name, tensor in WEIGHTS.items():
        changed = fresh.merge(name, tensor.clone(), rest) if fresh.changes(name, tuple(tensor.shape), rest) else None
        merged[name] = rest.get(name, tensor) if changed is None else changed
    assert any(not torch.equal(merged[name], tensor) for name, tensor in WEIGHTS.items() if "att.key" in name)
    expected = logits(model, ids)
    tolerance = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(logits(small_model(merged), ids), expected, rtol=0, atol=tolerance)


def test_a_tuner_takes_its_place_on_a_model_without_data(attached):
    model, adapter = attached
    outline, fresh = small_model(device="meta"), build(adapter.name)
    fresh.attach(outline)
    sizes = {name: tensor.shape for name, tensor in adapter.trained_tensors(model).items()}
    assert {name: tensor.shape for name, tensor in fresh.trained_tensors(outline).items()} == sizes
    assert all(parameter.is_meta for parameter in outline.parameters())


@pytest.mark.parametrize("method", USABLE)
def test_bf16_activations_on_quantised_weights_stay_bf16(method):
    adapter = build(method)
    model = small_model()
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path.startswith("blocks."):
            parent, _, last = path.rpartition(".")
            quantised = QuantizedLinear.from_weight(module.weight.detach(), Fp8())
            setattr(model.get_submodule(parent), last, quantised)
    adapter.attach(model)
    x = torch.randn(2, 3, 32, dtype=torch.bfloat16, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(model.blocks[0].att.key, x, use_reentrant=False)
    y.float().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16


def test_constants_are_written_once_even_where_the_package_repeats_them():
    model, adapter = small_model(), build("randlora")
    adapter.attach(model)
    assert set(adapter.constants(model)) == {"randlora_A", "randlora_B"}


def test_a_broken_file_is_refused():
    model, adapter = small_model(), build("vera")
    adapter.attach(model)
    tensors = copies(adapter.file_tensors(model))
    del tensors["vera_B"]
    fresh = build("vera")
    fresh.take_constants(tensors)
    with pytest.raises(UserError, match="missing: vera_B"):
        fresh.attach(small_model())


def train_adalora(adapter, model, ids, steps):
    """Steps ``steps`` of ten. The optimizer has no state of its own."""
    optimizer = torch.optim.SGD(adapter.trained_tensors(model).values(), lr=0.5)
    for step in steps:
        optimizer.zero_grad()
        logits(model, ids).sin().mean().backward()
        optimizer.step()
        adapter.after_step(model, step, 10)


def ranks(adapter, model):
    values = [t for name, t in adapter.own_tensors(model).items() if name.endswith("lora_E")]
    return sum(int((value != 0).sum()) for value in values), len(values)


def test_adalora_ends_with_the_rank_it_was_asked_for(ids):
    model, adapter = small_model(), build("adalora", tfinal=2)
    adapter.attach(model)
    train_adalora(adapter, model, ids, range(1, 11))
    left, linears = ranks(adapter, model)
    assert 0 < left <= 3 * linears


def adalora_from(tensors):
    model, adapter = small_model(), build("adalora", tfinal=2)
    rest = adapter.take_constants(tensors)
    adapter.attach(model)
    adapter.load(model, rest)
    return model, adapter


@pytest.mark.parametrize("cut", [4, 9])
def test_adalora_goes_on_exactly_from_its_file(ids, cut):
    model, adapter = small_model(), build("adalora", tfinal=2)
    adapter.attach(model)
    start = copies(adapter.file_tensors(model))
    train_adalora(adapter, model, ids, range(1, 11))
    first, part = adalora_from(start)
    train_adalora(part, first, ids, range(1, cut))
    second, part = adalora_from(copies(part.file_tensors(first)))
    train_adalora(part, second, ids, range(cut, 11))
    found = part.file_tensors(second)
    assert all(torch.equal(found[name], tensor) for name, tensor in adapter.file_tensors(model).items())


def test_adaloras_averages_follow_the_model_to_its_device(ids, monkeypatch):
    model, adapter = small_model(), build("adalora", tfinal=2)
    adapter.attach(model)
    train_adalora(adapter, model, ids, [1])
    model, adapter = adalora_from(copies(adapter.file_tensors(model)))
    model.to("meta")
    tuner = adapter._peft.base_model
    monkeypatch.setattr(tuner, "update_and_allocate", lambda step: None)
    adapter.after_step(model, 2, 10)
    averages = [*tuner.rankallocator.exp_avg_ipt.values(), *tuner.rankallocator.exp_avg_unc.values()]
    assert {tensor.device.type for tensor in averages} == {"meta"}


def test_adalora_needs_more_steps_than_it_keeps_aside(ids):
    model, adapter = small_model(), build("adalora", tinit=6, tfinal=5)
    adapter.attach(model)
    with pytest.raises(UserError, match="no steps"):
        train_adalora(adapter, model, ids, [1])


def test_trying_a_tuner_draws_no_random_numbers():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    build("hra", r=4)
    assert torch.equal(torch.randn(3), expected)


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'rwkvpeft\[peft\]'"):
        build_adapter("vera", {})
