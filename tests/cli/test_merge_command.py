"""python merge.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkvpeft.checkpoints.adapter import Recipe, save_adapter
from rwkvpeft.checkpoints.files import load_tensors, save_tensors
from rwkvpeft.checkpoints.quantised import Quantiser
from rwkvpeft.cli.merge import main

BASE = {"emb.weight": torch.ones(4, 6), "blocks.0.att.receptance.weight": torch.ones(6, 6),
        "blocks.0.att.key.weight": torch.zeros(6, 6)}
LORA = {"blocks.0.att.key.lora_A": torch.ones(2, 6), "blocks.0.att.key.lora_B": torch.ones(6, 2)}
STATE = {"blocks.0.att.time_state": torch.randn(2, 3, 3)}


@pytest.fixture
def folder(tmp_path):
    save_tensors(tmp_path / "base.pth", BASE)
    save_tensors(tmp_path / "a.pth", LORA)
    save_tensors(tmp_path / "s.pth", STATE)
    return tmp_path


def run(folder: Path, *words: str) -> int:
    arguments = ["--base_model", "base.pth", "--output", "out.pth", *words]
    paths = {name: str(folder / name) for name in ("base.pth", "a.pth", "s.pth", "out.pth")}
    return main([paths.get(word, word) for word in arguments])


def merged_key(folder: Path) -> float:
    return load_tensors(folder / "out.pth")["blocks.0.att.key.weight"][0, 0].item()


def test_alpha_comes_from_the_recipe(folder):
    save_adapter(folder / "a.pth", LORA, Recipe(method="lora", config={"r": 2, "lora_alpha": 6}))
    assert run(folder, "--checkpoint", "a.pth") == 0
    assert merged_key(folder) == 2 * 6 / 2


@pytest.mark.parametrize("flag", ["--checkpoint", "--lora_checkpoint", "--peft_checkpoint"])
def test_upstreams_flags_merge_an_adapter_without_a_recipe(folder, flag):
    assert run(folder, flag, "a.pth", "--type", "lora", "--lora_alpha", "10") == 0
    assert merged_key(folder) == 2 * 10 / 2


def test_without_recipe_and_flag_alpha_is_trainings_default_and_a_note_says_so(folder, capsys):
    assert run(folder, "--checkpoint", "a.pth") == 0
    assert merged_key(folder) == 2 * 32 / 2
    assert "--lora_alpha" in capsys.readouterr().err


def test_the_state_merge_of_the_tutorials_runs(folder):
    assert run(folder, "--state_checkpoint", "s.pth", "--device", "cpu") == 0
    assert torch.equal(load_tensors(folder / "out.pth")["blocks.0.att.time_state"], STATE["blocks.0.att.time_state"])


def test_several_adapters_are_added_by_their_weights(folder):
    other = {"blocks.0.att.key.lora_A": torch.ones(1, 6), "blocks.0.att.key.lora_B": torch.ones(6, 1)}
    save_adapter(folder / "a.pth", LORA, Recipe(method="lora", config={"lora_alpha": 2}))
    save_adapter(folder / "s.pth", other, Recipe(method="lora", config={"lora_alpha": 1}))
    assert run(folder, "--checkpoint", "a.pth", "s.pth", "--weights", "0.5", "-2") == 0
    assert merged_key(folder) == 0.5 * 2 - 2 * 1


def test_a_method_and_a_state_are_merged_together(folder):
    lora = ["--lora_checkpoint", "a.pth", "--type", "lora", "--lora_alpha", "2"]
    assert run(folder, *lora, "--state_checkpoint", "s.pth") == 0
    assert merged_key(folder) == 2
    assert "blocks.0.att.time_state" in load_tensors(folder / "out.pth")


@pytest.mark.parametrize("type_", ["none", "miss", "disha", "bone"])
@pytest.mark.parametrize("part", ["miss", "disha", "bone"])
def test_miss_is_one_method_under_three_names(folder, type_, part):
    save_tensors(folder / "a.pth", {f"blocks.0.att.key.{part}": torch.full((3, 6), 0.5)})
    assert run(folder, "--peft_checkpoint", "a.pth", "--type", type_) == 0
    assert merged_key(folder) == 0.5


@pytest.mark.parametrize("type_", ["none", "pissa"])
def test_pissas_start_values_are_taken_out_of_the_base(folder, type_):
    start = {"blocks.0.att.key.init_lora_A": torch.ones(2, 6), "blocks.0.att.key.init_lora_B": torch.ones(6, 2) / 4}
    save_tensors(folder / "s.pth", start)
    assert run(folder, "--lora_init", "s.pth", "--lora_checkpoint", "a.pth", "--type", type_) == 0
    assert merged_key(folder) == 2 - 0.5


def test_start_values_alone_are_no_adapter(folder, capsys):
    start = {"blocks.0.att.key.init_lora_A": torch.ones(2, 6), "blocks.0.att.key.init_lora_B": torch.ones(6, 2)}
    save_tensors(folder / "s.pth", start)
    assert run(folder, "--checkpoint", "s.pth") == 2
    assert "holds only PiSSA's start values, no adapter" in capsys.readouterr().err
    assert not (folder / "out.pth").exists()


def test_a_file_that_several_flags_name_is_merged_once(folder):
    assert run(folder, "--lora_checkpoint", "a.pth", "--peft_checkpoint", "a.pth", "--lora_alpha", "2") == 0
    assert merged_key(folder) == 2


def quantised_lora(folder: Path, quant: str) -> torch.Tensor:
    """Write the adapter as trained on a base in that format; returns the base's matrix after quantising."""
    torch.manual_seed(1)
    weight = torch.randn(6, 6)
    save_tensors(folder / "base.pth", {**BASE, "blocks.0.att.key.weight": weight})
    save_adapter(folder / "a.pth", LORA, Recipe(method="lora", config={"lora_alpha": 2}, quant=quant))
    return Quantiser("fp8").round_trip("blocks.0.att.key.weight", weight)


def test_the_base_is_quantised_and_back_as_training_did(folder, capsys):
    weight = quantised_lora(folder, "fp8")
    assert run(folder, "--checkpoint", "a.pth") == 0
    assert torch.equal(load_tensors(folder / "out.pth")["blocks.0.att.key.weight"], weight + 2)
    assert "base: quantised to fp8 and back, as in training" in capsys.readouterr().out


def test_a_format_can_be_forced(folder, capsys):
    weight = quantised_lora(folder, "none")
    assert run(folder, "--checkpoint", "a.pth", "--quant", "fp8") == 0
    assert torch.equal(load_tensors(folder / "out.pth")["blocks.0.att.key.weight"], weight + 2)
    assert "as --quant says (the recipe: none)" in capsys.readouterr().out


def test_the_base_can_be_merged_as_it_is(folder, capsys):
    quantised_lora(folder, "fp8")
    assert run(folder, "--checkpoint", "a.pth", "--quant", "none") == 0
    base = load_tensors(folder / "base.pth")["blocks.0.att.key.weight"]
    assert torch.equal(load_tensors(folder / "out.pth")["blocks.0.att.key.weight"], base + 2)
    assert "as it is, although it was fp8 in training" in capsys.readouterr().out


def test_the_outputs_ending_chooses_the_format(folder):
    load_file = pytest.importorskip("safetensors.torch").load_file
    assert main(["--base_model", str(folder / "base.pth"), "--checkpoint", str(folder / "s.pth"),
                 "--output", str(folder / "out.safetensors")]) == 0
    assert set(load_file(folder / "out.safetensors")) == {*BASE, *STATE}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no adapter"),
        (["--checkpoint", "a.pth", "s.pth", "--weights", "1"], "--weights needs one number"),
        (["--checkpoint", "a.pth", "--weights", "nan"], "--weights must be finite"),
        (["--checkpoint", "nowhere.pth"], "nowhere.pth"),
        (["--checkpoint", "a.pth", "--type", "pissa"], "pissa"),
        (["--checkpoint", "a.pth", "--type", "state"], "another kind"),
        (["--checkpoint", "a.pth", "--type", "lroa"], "--type lora"),
        (["--checkpoint", "a.pth", "s.pth", "--lora_init", "a.pth"], "belongs to one adapter"),
        (["--checkpoint", "s.pth", "--type", "state", "--lora_init", "a.pth"], "PiSSA"),
        (["--state_checkpoint", "s.pth", "--lora_alpha", "16"], "no effect"),
        (["--checkpoint", "a.pth", "--format", "hf"], "hf"),
        (["--checkpoint", "a.pth", "--format", "safetensors"], "contradicts the ending"),
        (["--checkpoint", "a.pth", "--format", "pth", "--output", "out.st"], "contradicts the ending"),
        (["--checkpoint", "a.pth", "a.pth"], "same file more than once"),
        (["--checkpoint", "a.pth", "--output", "base.pth"], "overwrite"),
    ],
)
def test_a_mistake_gives_one_message_and_exit_code_2(folder, capsys, words, message):
    before = sorted(folder.iterdir())
    assert run(folder, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert sorted(folder.iterdir()) == before


def test_an_alpha_that_contradicts_the_recipe_is_refused(folder, capsys):
    save_adapter(folder / "a.pth", LORA, Recipe(method="lora", config={"lora_alpha": 6}))
    assert run(folder, "--checkpoint", "a.pth", "--lora_alpha", "16") == 2
    assert "disagrees" in capsys.readouterr().err


def test_help_does_not_import_torch():
    code = "import sys; from rwkvpeft.cli.merge import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
