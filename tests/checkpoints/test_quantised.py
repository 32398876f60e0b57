"""Quantising while loading, quantising afterwards and loading a quantised file give one model."""

from __future__ import annotations

import pytest
import torch

from rwkvpeft import load_model
from rwkvpeft.checkpoints import files
from rwkvpeft.checkpoints.adapter import Recipe, check_base, save_adapter
from rwkvpeft.checkpoints.files import MappedTensors, fingerprint, load_tensors, save_tensors
from rwkvpeft.checkpoints.merge import merge_files
from rwkvpeft.checkpoints.quantised import (
    FINGERPRINT,
    Quantisation,
    Quantiser,
    find_packed,
    model_fingerprint,
    quantisation_of,
    quantise_file,
)
from rwkvpeft.errors import UserError
from rwkvpeft.models.names import is_large_linear
from rwkvpeft.models.shape import new_shape
from rwkvpeft.quantization.linear import QuantizedLinear
from rwkvpeft.registry import MODELS, find

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
KINDS = [("int8", False), ("nf4", False), ("nf4", True), ("fp4", False), ("fp8", False)]


@pytest.fixture(params=sorted(MODELS))
def model_path(request, tmp_path):
    return save_random(tmp_path / "m.pth", request.param)


@pytest.fixture
def v7(tmp_path):
    return save_random(tmp_path / "m.pth", "x070")


def save_random(path, version, dtype=torch.bfloat16):
    shape = new_shape(version, n_layer=2, n_embd=48, vocab_size=41, head_size=16)
    weights = find(MODELS, version, flag="").initial_weights(shape)
    noisy = {name: tensor + 0.05 * torch.randn(tensor.shape) for name, tensor in weights.items()}
    save_tensors(path, {name: tensor.to(dtype) for name, tensor in noisy.items()})
    return path


def quantiser(kind, **settings):
    if kind[0] != "fp8":
        pytest.importorskip("bitsandbytes")
    return Quantiser(kind[0], double=kind[1], **settings)


def logits(model, dtype=None):
    return model(TOKENS)[0].detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [False, True])
def test_quantising_while_loading_equals_quantising_afterwards(model_path, kind, head):
    quantise = quantiser(kind, head=head)
    loaded = load_model(model_path, dtype=torch.float32, quantiser=quantise)
    plain = load_model(model_path, dtype=torch.float32)
    for name, weight in load_tensors(model_path).items():
        if quantise.takes(name):
            owner, _, last = name.removesuffix(".weight").rpartition(".")
            setattr(plain.get_submodule(owner), last, quantise.module(name, weight))
    assert torch.equal(logits(loaded), logits(plain))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [False, True])
def test_a_quantised_file_gives_exactly_the_model_of_quantising_while_loading(model_path, tmp_path, kind, head):
    quantise = quantiser(kind, head=head)
    quantise_file(model_path, tmp_path / "q.pth", quantise)
    expected, found = load_model(model_path, quantiser=quantise), load_model(tmp_path / "q.pth")
    assert found.shape == expected.shape
    assert {n: type(m) for n, m in found.named_modules()} == {n: type(m) for n, m in expected.named_modules()}
    assert torch.equal(logits(found), logits(expected))


def test_exactly_the_large_linears_are_quantised(model_path):
    model = load_model(model_path, quantiser=Quantiser("fp8"))
    packed = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert packed == {name.removesuffix(".weight") for name in load_tensors(model_path) if is_large_linear(name)}
    assert len(packed) == (12 if model.shape.version == "x070" else 16)


def test_the_head_is_quantised_when_asked(v7):
    assert isinstance(load_model(v7, quantiser=Quantiser("fp8", head=True)).head, QuantizedLinear)


def test_weights_that_are_trained_themselves_stay_as_they_are(v7):
    name = "blocks.1.ffn.key.weight"
    model = load_model(v7, quantiser=Quantiser("fp8", keep=name.__eq__))
    assert torch.equal(model.get_parameter(name), load_tensors(v7)[name])


def test_the_dtype_of_activations_does_not_change_what_is_packed(v7):
    low, high = (load_model(v7, dtype=dtype, quantiser=Quantiser("fp8")) for dtype in (torch.bfloat16, torch.float32))
    assert torch.equal(low.blocks[0].att.key.codes, high.blocks[0].att.key.codes)
    assert low(TOKENS)[0].dtype == torch.bfloat16


def test_a_prepared_weight_is_what_is_quantised(v7):
    def prepare(path, weight):
        return weight.float() * 2 if path == "blocks.0.att.key" else weight

    model = load_model(v7, quantiser=Quantiser("fp8"), prepare=prepare)
    weight = load_tensors(v7)["blocks.0.att.key.weight"].float()
    expected = Quantiser("fp8").round_trip("blocks.0.att.key.weight", weight * 2)
    assert torch.equal(model.blocks[0].att.key.weight, expected)


def test_a_prepared_weight_takes_the_dtype_of_the_model_where_nothing_is_quantised(v7):
    seen = []

    def prepare(path, weight):
        seen.append(path)
        return weight.float() + 1

    model = load_model(v7, prepare=prepare)
    assert model.blocks[0].att.key.weight.dtype == torch.bfloat16
    assert torch.equal(model.blocks[1].ffn.value.weight,
                       (load_tensors(v7)["blocks.1.ffn.value.weight"].float() + 1).bfloat16())
    assert {f"{path}.weight" for path in seen if path != "head"} == {n for n in load_tensors(v7) if is_large_linear(n)}


def test_a_round_trip_is_what_the_module_computes_with(v7):
    name, weight = "blocks.0.att.key.weight", torch.randn(48, 48)
    quantise = Quantiser("fp8")
    assert torch.equal(quantise.round_trip(name, weight), quantise.module(name, weight).weight)


def test_a_map_that_is_opened_anew_gives_the_same_model(v7, monkeypatch):
    expected = logits(load_model(v7, quantiser=Quantiser("fp8")))
    monkeypatch.setattr(files, "_REOPEN_BYTES", 4096)
    assert torch.equal(logits(load_model(v7, quantiser=Quantiser("fp8"))), expected)


def test_a_map_is_opened_anew_after_what_was_read(v7, monkeypatch):
    opened = []
    load = files.load_tensors
    monkeypatch.setattr(files, "load_tensors", lambda path: opened.append(path) or load(path))
    monkeypatch.setattr(files, "_REOPEN_BYTES", 10_000)
    tensors = MappedTensors(v7)
    names = [name for name in tensors if is_large_linear(name)]
    first = tensors[names[0]]
    copies = [tensors[name].clone() for name in names]
    assert len(opened) > 5
    assert torch.equal(first, copies[0])
    assert len(tensors) == len(tensors.outline)
    assert names[0] in tensors


def test_the_loaded_model_shares_no_memory_with_the_file(v7, tmp_path):
    quantise_file(v7, tmp_path / "q.pth", Quantiser("fp8"))
    model = load_model(tmp_path / "q.pth")
    before = logits(model)
    with (tmp_path / "q.pth").open("r+b") as file:
        file.write(bytes((tmp_path / "q.pth").stat().st_size))
    assert torch.equal(logits(model), before)


def test_a_quantised_file_tells_how_it_was_made(v7, tmp_path):
    quantise_file(v7, tmp_path / "q.pth", Quantiser("fp8", head=True))
    packed = find_packed(MappedTensors(tmp_path / "q.pth"), "q.pth")
    assert quantisation_of(packed) == Quantisation("fp8", False, True)
    assert quantisation_of(find_packed(MappedTensors(v7), "m.pth")) == Quantisation()


def test_a_quantised_file_is_smaller_by_what_the_format_saves(v7, tmp_path):
    pytest.importorskip("bitsandbytes")
    report = quantise_file(v7, tmp_path / "q.pth", Quantiser("nf4"))
    weights = sum(t.numel() for name, t in load_tensors(v7).items() if is_large_linear(name))
    tensors = load_tensors(tmp_path / "q.pth")
    packed = sum(tensor.nbytes for name, tensor in tensors.items() if ".nf4." in name and not name.endswith(".shape"))
    assert packed == pytest.approx(weights * 4.5 / 8)
    assert report.packed == 12
    assert report.output_bytes < report.source_bytes


def test_adapters_of_the_model_and_of_its_quantised_file_belong_together(v7, tmp_path):
    quantise_file(v7, tmp_path / "q.pth", Quantiser("fp8"))
    assert model_fingerprint(tmp_path / "q.pth") == model_fingerprint(v7) == fingerprint(v7)
    recipe = Recipe("lora", base_fingerprint=model_fingerprint(tmp_path / "q.pth"))
    check_base(recipe, v7)
    check_base(recipe, tmp_path / "q.pth")
    save_random(tmp_path / "other.pth", "x070", torch.float16)
    with pytest.raises(UserError, match="is not the model this adapter was trained on"):
        check_base(recipe, tmp_path / "other.pth")


def test_merging_into_a_quantised_file_is_refused(v7, tmp_path):
    quantise_file(v7, tmp_path / "q.pth", Quantiser("fp8"))
    factors = {"blocks.0.att.key.lora_A": torch.ones(2, 48), "blocks.0.att.key.lora_B": torch.ones(48, 2)}
    save_adapter(tmp_path / "a.pth", factors, Recipe("lora", config={"lora_alpha": 2}))
    with pytest.raises(UserError, match="merging needs the original"):
        merge_files(tmp_path / "q.pth", tmp_path / "a.pth", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_quantising_twice_is_refused(v7, tmp_path):
    quantise_file(v7, tmp_path / "q.pth", Quantiser("fp8"))
    with pytest.raises(UserError, match="quantising needs the original"):
        quantise_file(tmp_path / "q.pth", tmp_path / "qq.pth", Quantiser("fp8"))


def test_the_format_of_the_file_may_be_asked_for_and_no_other(v7, tmp_path):
    pytest.importorskip("bitsandbytes")
    quantise_file(v7, tmp_path / "q.pth", Quantiser("fp8"))
    assert torch.equal(logits(load_model(tmp_path / "q.pth", quantiser=Quantiser("fp8"))),
                       logits(load_model(tmp_path / "q.pth")))
    with pytest.raises(UserError, match="cannot be quantised in another way"):
        load_model(tmp_path / "q.pth", quantiser=Quantiser("nf4"))


def test_trained_weights_of_a_quantised_file_start_from_their_dequantised_values(v7, tmp_path):
    quantise_file(v7, tmp_path / "q.pth", Quantiser("fp8"))
    name = "blocks.1.ffn.key.weight"
    model = load_model(tmp_path / "q.pth", dtype=torch.float32, quantiser=Quantiser("fp8", keep=name.__eq__))
    assert torch.equal(model.get_parameter(name), Quantiser("fp8").round_trip(name, load_tensors(v7)[name]))


def test_an_adapter_that_changes_weights_needs_the_original(v7, tmp_path):
    quantise_file(v7, tmp_path / "q.pth", Quantiser("fp8"))
    with pytest.raises(UserError, match="quantised already, and the adapter changes it"):
        load_model(tmp_path / "q.pth", prepare=lambda path, weight: weight + 1)
    load_model(tmp_path / "q.pth", prepare=lambda path, weight: weight)


def test_a_broken_weight_is_named_before_anything_is_left_behind(v7, tmp_path):
    tensors = dict(load_tensors(v7))
    tensors["blocks.1.att.value.weight"] = tensors["blocks.1.att.value.weight"].clone()
    tensors["blocks.1.att.value.weight"][0, 0] = float("nan")
    save_tensors(tmp_path / "nan.pth", tensors)
    with pytest.raises(UserError, match=r"blocks\.1\.att\.value\.weight holds NaN"):
        quantise_file(tmp_path / "nan.pth", tmp_path / "q.pth", Quantiser("fp8"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pth", "nan.pth"]


@pytest.mark.parametrize("lost", ["codes", "scales", "shape"])
def test_a_quantised_file_with_a_part_missing_is_refused_by_name(v7, tmp_path, lost):
    quantise_file(v7, tmp_path / "q.pth", Quantiser("fp8"))
    tensors = dict(load_tensors(tmp_path / "q.pth"))
    del tensors[f"blocks.0.att.key.weight.fp8.{lost}"]
    save_tensors(tmp_path / "q.pth", tensors)
    with pytest.raises(UserError, match=r"does not hold all of blocks\.0\.att\.key\.weight"):
        load_model(tmp_path / "q.pth")


def test_the_model_itself_is_not_overwritten(v7):
    before = v7.read_bytes()
    with pytest.raises(UserError, match="would overwrite"):
        quantise_file(v7, v7, Quantiser("fp8"))
    assert v7.read_bytes() == before


def test_the_origin_is_no_tensor_of_the_model(v7, tmp_path):
    quantise_file(v7, tmp_path / "q.pth", Quantiser("fp8"))
    assert FINGERPRINT in load_tensors(tmp_path / "q.pth")
    assert FINGERPRINT not in load_model(tmp_path / "q.pth").state_dict()
