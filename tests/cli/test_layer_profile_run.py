"""Training with a layer profile through the real command."""

from __future__ import annotations

import json

import pytest
import torch

from rwkvpeft.checkpoints.load import load_model
from rwkvpeft.checkpoints.merge import merge_files
from rwkvpeft.generation.tuned import load_tuned
from rwkvpeft.models.rwkv7 import Rwkv7
from rwkvpeft.models.shape import new_shape

HEADER = (
    "Layer,Mode,Rank,Alpha,Dropout,Weight_lr_init,Weight_lr_final,Weight_decay,State_lr_init,State_lr_final,RejectParts"
)
PROFILE = f"""\
{HEADER}
emb,freeze,0,0,0.01,1.00E-06,1.00E-07,0.001,0.05,0.01,
0,full,16,32,0.01,1.00E-03,1.00E-04,0.01,0.05,0.01,"att.key,ln2"
1,lora,4,8,0,1.00E-02,1.00E-03,0,0.05,0.01,
2,bone,8,32,0.01,1.00E-02,1.00E-03,0,0.05,0.01,att.receptance
3,freeze,16,32,0.01,1.00E-02,1.00E-03,0,0.05,0.01,
head,lora,2,4,0,1.00E-02,1.00E-03,0,0.05,0.01,
"""


def read(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random v7 checkpoint of four layers, none of its weights zero."""
    torch.manual_seed(0)
    shape = new_shape("x070", n_layer=4, n_embd=32, vocab_size=256, head_size=16)
    path = tmp_path_factory.mktemp("model") / "four.pth"
    weights = Rwkv7.initial_weights(shape)
    torch.save({name: tensor + 0.05 * torch.randn(tensor.shape) for name, tensor in weights.items()}, path)
    return path


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "profile.csv"
    path.write_text(PROFILE)
    return path


@pytest.fixture
def tuned(train, base, profile, tmp_path):
    """The adapter file of a short run."""
    code, output, errors = train("--load_model", base, "--layer_profile", profile)
    assert code == 0, errors
    assert f"trained: {profile}" in output
    assert f"--base_model {base} --checkpoint" in output
    return tmp_path / "out" / "rwkv-0.pth"


def test_the_file_holds_what_each_layer_trained_and_nothing_of_frozen_ones(base, tuned):
    before, tensors = read(base), read(tuned)
    layers = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    assert layers == {"0", "1", "2"}
    assert not torch.equal(tensors["blocks.0.att.value.weight"], before["blocks.0.att.value.weight"])
    assert "blocks.0.att.key.weight" not in tensors
    assert tensors["blocks.1.att.key.lora_B"].abs().sum() > 0
    assert tensors["blocks.2.att.key.miss"].abs().sum() > 0
    assert "blocks.2.att.receptance.miss" not in tensors
    assert tensors["head.lora_A"].shape == (2, 32)
    assert {name for name in tensors if name.startswith("emb")} == set()


def test_the_recipe_tells_the_rows(tuned):
    recipe = json.loads(tuned.with_suffix(".json").read_text())
    assert recipe["method"] == "profile"
    assert [(row["layer"], row["mode"]) for row in recipe["config"]["rows"]][1:4] == [
        ("0", "full"), ("1", "lora"), ("2", "bone"),
    ]


def test_merged_equals_unmerged(base, tuned, tmp_path):
    merge_files(base, tuned, tmp_path / "merged.pth")
    ids = torch.randint(0, 256, (1, 20))
    unmerged = load_tuned(base, tuned).model(ids)[0]
    assert (unmerged - load_model(base)(ids)[0]).abs().max() > 1e-3
    torch.testing.assert_close(load_model(tmp_path / "merged.pth")(ids)[0], unmerged, rtol=0, atol=1e-5)


def test_a_run_that_is_taken_up_again_ends_where_a_straight_one_does(train, base, profile, tmp_path):
    common = ("--load_model", base, "--layer_profile", profile, "--epoch_count", "2")
    assert train(*common, "--proj_dir", tmp_path / "straight")[0] == 0
    assert train(*common, "--my_exit", "0")[0] == 0
    code, output, errors = train(*common)
    assert code == 0, errors
    assert "going on from" in output
    straight, resumed = read(tmp_path / "straight" / "rwkv-1.pth"), read(tmp_path / "out" / "rwkv-1.pth")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_run_goes_on_from_the_file_of_another(train, base, profile, tuned, tmp_path):
    code, _, errors = train(
        "--load_model", base, "--layer_profile", profile, "--adapter", tuned, "--proj_dir", tmp_path / "on"
    )
    assert code == 0, errors


def test_states_are_trained_in_every_layer_where_the_run_asks(train, base, profile, tmp_path):
    code, _, errors = train("--load_model", base, "--layer_profile", profile, "--peft", "state")
    assert code == 0, errors
    tensors = read(tmp_path / "out" / "rwkv-0.pth")
    assert all(tensors[f"blocks.{layer}.att.time_state"].abs().sum() > 0 for layer in range(4))
    merge_files(base, tmp_path / "out" / "rwkv-0.pth", tmp_path / "merged.pth")
    assert "blocks.3.att.time_state" in read(tmp_path / "merged.pth")


def test_a_quantised_base_keeps_what_is_trained_in_full(train, base, profile, tmp_path):
    code, _, errors = train("--load_model", base, "--layer_profile", profile, "--quant", "fp8")
    assert code == 0, errors
    adapter, output = tmp_path / "out" / "rwkv-0.pth", tmp_path / "merged.pth"
    merge_files(base, adapter, output)
    trained, merged, before = read(adapter), read(output), read(base)
    assert torch.equal(merged["blocks.0.att.value.weight"], trained["blocks.0.att.value.weight"])
    assert not torch.equal(merged["blocks.3.att.value.weight"], before["blocks.3.att.value.weight"])


def test_a_profile_for_another_model_is_refused_before_training(train, profile):
    code, _, errors = train("--layer_profile", profile)
    assert code == 2
    assert "made for 4 layers, and the model has 2" in errors


def test_mistakes_of_the_profile_are_told_together_with_other_flags(train, base, tmp_path):
    (tmp_path / "wrong.csv").write_text("layer,mode,rank\n0-3,lora,\nhead,mean,\n")
    code, _, errors = train("--load_model", base, "--layer_profile", tmp_path / "wrong.csv", "--dropout", "2")
    assert code == 2
    for words in ("--dropout", "wrong.csv:2: mode lora needs a rank", "wrong.csv:3: the mode is unknown"):
        assert words in errors


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--peft", "lora"), "--layer_profile names the method of each layer"),
        (("--peft_config", '{"r": 4}'), "--peft_config has no effect"),
    ],
)
def test_a_method_beside_a_profile_is_refused(train, base, profile, words, complaint):
    code, _, errors = train("--load_model", base, "--layer_profile", profile, *words)
    assert code == 2
    assert complaint in errors


def test_a_row_of_rate_0_leaves_its_tensors_where_they_were(train, base, tmp_path):
    (tmp_path / "still.csv").write_text("layer,mode,rank,lr_init,lr_final\ndefault,bone,4,,\n1,bone,4,0,0\n")
    code, _, errors = train("--load_model", base, "--layer_profile", tmp_path / "still.csv")
    assert code == 0, errors
    tensors = read(tmp_path / "out" / "rwkv-0.pth")
    moved = [bool(tensors[f"blocks.{layer}.att.key.miss"].any()) for layer in range(4)]
    assert moved == [True, False, True, True]
