"""Layer profiles on small models: one of every mode, merged, loaded, switched off."""

from __future__ import annotations

import pytest
import torch

from rwkvpeft.adapters.base import Rates
from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.adapters.profile import LayerPlan, ProfileAdapter
from rwkvpeft.checkpoints.adapter import Recipe, load_adapter, save_adapter
from rwkvpeft.checkpoints.files import save_tensors
from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.checkpoints.merge import merge_files
from rwkvpeft.checkpoints.quantised import Quantiser
from rwkvpeft.config.layer_profile import LayerRow
from rwkvpeft.errors import UserError
from rwkvpeft.generation.tuned import load_tuned
from rwkvpeft.models.shape import new_shape
from rwkvpeft.quantization.linear import QuantizedLinear
from rwkvpeft.registry import MODELS, find

# two rows each of LoRA and PiSSA that differ in rank or scale: their tensors are named alike
ROWS = [
    LayerRow("emb", "full", lr_init=1e-6),
    LayerRow("0", "full", lr_init=3e-5, lr_final=1e-5, weight_decay=0.1, reject=("att.key", "ln2")),
    LayerRow("1", "lora", rank=4, alpha=8, lr_init=1e-4, reject=("ffn.key",)),
    LayerRow("2", "lora", rank=2, alpha=64, dropout=0.0, state=True, state_lr_init=0.5),
    LayerRow("3", "pissa", part="att", rank=4),
    LayerRow("3", "pissa", part="ffn", rank=2),
    LayerRow("4", "freeze"),
    LayerRow("4", "bone", part="att", rank=12),
    LayerRow("4", "dora", part="att.value", rank=2),
    LayerRow("5", "state"),
    LayerRow("*", "bat", rank=8),
    LayerRow("head", "lora", rank=2, lr_init=2e-4),
]
LAYERS = 7


@pytest.fixture(scope="module", params=sorted(MODELS))
def base(request, tmp_path_factory):
    """A checkpoint with every weight random, so that no update is multiplied by zero."""
    torch.manual_seed(0)
    shape = new_shape(request.param, n_layer=LAYERS, n_embd=32, vocab_size=256, head_size=16)
    weights = find(MODELS, request.param, flag="").initial_weights(shape)
    path = tmp_path_factory.mktemp("base") / "base.pth"
    save_tensors(path, {name: tensor + 0.05 * torch.randn(tensor.shape) for name, tensor in weights.items()})
    return path


@pytest.fixture
def profile():
    return ProfileAdapter(ROWS, ["ln"])


def attached(adapter, path):
    model = load_model(path, prepare=adapter.prepare)
    model.requires_grad_(True)
    adapter.attach(model)
    return model


def disturb(adapter, model):
    with torch.no_grad():
        for tensor in adapter.trained_tensors(model).values():
            tensor.add_(0.05 * torch.randn(tensor.shape))


def tokens():
    return torch.randint(0, 256, (2, 9))


def test_each_layer_trains_what_its_row_says(base, profile):
    model = attached(profile, base)
    trained = set(profile.trained_tensors(model))
    for name in ("emb.weight", "blocks.0.ln0.weight", "blocks.0.att.value.weight", "blocks.1.att.key.lora_A",
                 "blocks.1.ln1.weight", "blocks.2.att.time_state", "blocks.3.ffn.key.lora_B", "blocks.4.att.key.miss",
                 "blocks.4.att.value.lora_magnitude_vector", "blocks.4.att.ln_x.weight", "blocks.5.att.time_state",
                 "blocks.6.ffn.value.miss", "head.lora_A", "ln_out.weight"):
        assert name in trained, name
    for name in ("blocks.0.att.key.weight", "blocks.0.ln2.weight", "blocks.0.att.v0", "blocks.1.ffn.key.lora_A",
                 "blocks.1.att.time_state", "blocks.4.ln1.weight", "blocks.4.ffn.key.miss", "blocks.4.att.value.miss",
                 "blocks.5.att.key.weight", "blocks.5.ln1.weight", "head.weight"):
        assert name not in trained, name
    assert model.get_parameter("blocks.1.att.key.lora_A").shape[0] == 4
    assert model.get_parameter("blocks.3.att.key.lora_A").shape[0] == 4
    assert model.get_parameter("blocks.3.ffn.key.lora_A").shape[0] == 2


def test_only_those_tensors_get_gradients_and_all_of_them(base, profile):
    model = attached(profile, base)
    disturb(profile, model)
    model(tokens())[0].sin().sum().backward()
    trained = profile.trained_tensors(model)
    assert {id(parameter) for parameter in model.parameters() if parameter.grad is not None} == {
        id(tensor) for tensor in trained.values()
    }
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}


def test_an_attached_profile_changes_nothing_until_it_is_trained_and_can_be_switched_off(base, profile):
    ids = tokens()
    before, _ = load_model(base)(ids)
    model = attached(profile, base)
    torch.testing.assert_close(model(ids)[0], before, rtol=0, atol=2e-5)
    disturb(profile, model)
    tuned, _ = model(ids)
    with profile.disabled(model):
        torch.testing.assert_close(model(ids)[0], before, rtol=0, atol=2e-5)
    assert torch.equal(model(ids)[0], tuned)
    assert (tuned - before).abs().max() > 1e-2


@pytest.fixture
def saved(base, profile, tmp_path):
    """A trained profile's file, and logits of it for some tokens."""
    model = attached(profile, base)
    disturb(profile, model)
    ids = tokens()
    expected, _ = model(ids)
    recipe = Recipe("profile", profile.settings(), ["ln"])
    save_adapter(tmp_path / "rwkv-0.pth", profile.file_tensors(model), recipe)
    return tmp_path / "rwkv-0.pth", ids, expected


def test_merging_gives_what_the_adapter_gave(base, saved, tmp_path):
    path, ids, expected = saved
    merge_files(base, path, tmp_path / "merged.pth")
    merged, _ = load_model(tmp_path / "merged.pth")(ids)
    torch.testing.assert_close(merged, expected, rtol=0, atol=5e-5)


def test_generation_runs_the_file_unmerged(base, saved):
    path, ids, expected = saved
    torch.testing.assert_close(load_tuned(base, path).model(ids)[0], expected, rtol=0, atol=2e-5)


def test_training_goes_on_from_the_file(base, saved):
    path, ids, expected = saved
    again = ProfileAdapter(ROWS, ["ln"])
    tensors = again.take_constants(again.rename(load_adapter(path)[0]))
    model = attached(again, base)
    again.load(model, tensors)
    assert torch.equal(model(ids)[0], expected)


@pytest.mark.parametrize("base", ["x070"], indirect=True)
def test_other_programs_names_are_understood_by_the_linears_own_adapter(base, profile):
    model = attached(profile, base)
    tensors = profile.file_tensors(model)
    foreign = {name.replace(".miss", ".bone").replace("lora_magnitude_vector", "lora_M"): tensor.unsqueeze(1)
               if "magnitude" in name else tensor for name, tensor in tensors.items()}
    renamed = profile.rename(foreign)
    assert {name: tensor.shape for name, tensor in renamed.items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("base", ["x070"], indirect=True)
def test_merging_a_profile_of_a_quantised_base_gives_what_was_trained(base, tmp_path):
    rows = [*ROWS[:-1], LayerRow("head", "pissa", rank=4)]
    adapter = ProfileAdapter(rows, ["ln"])
    quantiser = Quantiser("fp8", head=True, keep=adapter.trains)
    model = load_model(base, quantiser=quantiser, prepare=adapter.prepare)
    adapter.attach(model)
    disturb(adapter, model)
    ids = tokens()
    recipe = Recipe("profile", adapter.settings(), ["ln"], quant="fp8", quant_head=True)
    save_adapter(tmp_path / "rwkv-0.pth", adapter.file_tensors(model), recipe)
    merge_files(base, tmp_path / "rwkv-0.pth", tmp_path / "merged.pth")
    assert isinstance(model.get_submodule("blocks.5.att.key"), QuantizedLinear)
    assert not isinstance(model.get_submodule("blocks.0.att.value"), QuantizedLinear)
    merged, _ = load_model(tmp_path / "merged.pth")(ids)
    torch.testing.assert_close(merged, model(ids)[0], rtol=0, atol=1e-4)


def test_a_recipe_builds_the_same_profile_again(profile):
    again = build_adapter("profile", profile.settings())
    assert isinstance(again, ProfileAdapter)
    assert again.plan.rows == ROWS


def test_tensors_learn_at_their_rows_rates(profile):
    assert profile.rates("blocks.0.att.value.weight") == Rates(3e-5, 1e-5, 0.1)
    assert profile.rates("blocks.0.ln0.weight") == Rates(1e-6)
    assert profile.rates("blocks.1.att.key.lora_A") == Rates(1e-4)
    assert profile.rates("head.lora_B") == Rates(2e-4)
    assert profile.rates("ln_out.weight") == Rates(2e-4)
    assert profile.rates("blocks.2.att.time_state") == Rates(0.5, 0.01, 0.0)
    assert profile.rates("blocks.5.att.time_state") == Rates(1.0, 0.01, 0.0)
    assert profile.rates("blocks.6.att.key.miss") == Rates()


def test_weights_trained_in_full_are_told_apart_from_those_that_may_be_quantised(profile):
    assert profile.trains("blocks.0.att.value.weight")
    assert not profile.trains("blocks.0.att.key.weight")
    assert not profile.trains("blocks.1.att.value.weight")
    assert not profile.trains("blocks.4.ffn.key.weight")


@pytest.mark.parametrize(("mode", "owner"), [("full", "emb"), ("freeze", "0")])
def test_the_first_norm_goes_with_a_trained_embedding_or_else_with_layer_0(mode, owner):
    plan = LayerPlan([LayerRow("emb", mode), LayerRow("0", "full")])
    assert plan.row_of("blocks.0.ln0.weight").layer == owner


def test_the_row_of_the_longest_part_decides():
    rows = [LayerRow("1", "freeze"), LayerRow("1", "full", part="att"), LayerRow("1", "lora", part="att.key", rank=1)]
    plan = LayerPlan(rows)
    names = ("blocks.1.att.key.lora_A", "blocks.1.att.value.weight", "blocks.1.ffn.key.weight")
    assert [plan.row_of(name).part for name in names] == ["att.key", "att", ""]
    assert plan.row_of("blocks.2.att.key.weight") is None


def test_dropout_of_bone_rows_is_passed_over_as_upstream_does():
    rows = [LayerRow("0", "bone", rank=4, dropout=0.5), LayerRow("1", "miss", rank=4, dropout=0.5)]
    bone, miss = ProfileAdapter(rows).members[:2]
    assert (bone.config.miss_dropout, miss.config.miss_dropout) == (0.0, 0.5)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([LayerRow(str(layer), "full") for layer in range(24)], "made for 24 layers, and the model has 7"),
        ([LayerRow(str(layer), "full") for layer in range(5)], "no row for 5-6"),
        ([LayerRow("head", "full")], "no row for 0-6"),
        ([LayerRow("*", "full", reject=("att.recptance",))], "att.recptance"),
        ([LayerRow("*", "full", part="att.keys")], "att.keys"),
    ],
)
@pytest.mark.parametrize("base", ["x070"], indirect=True)
def test_rows_that_do_not_fit_the_model_are_named(base, rows, complaint):
    with pytest.raises(UserError, match=complaint):
        attached(ProfileAdapter(rows), base)


def test_the_tables_are_trained_by_rows_and_not_by_train_parts():
    with pytest.raises(UserError, match="layer emb, mode full"):
        ProfileAdapter([LayerRow("0", "full")], ["ln", "emb"])


def test_a_recipe_without_rows_is_refused():
    with pytest.raises(UserError, match="a list of rows"):
        build_adapter("profile", {})
