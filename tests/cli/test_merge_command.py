"""python merge.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkvpeft.checkpoints.adapter import Recipe, save_adapter
from rwkvpeft.checkpoints.files import load_tensors, save_tensors
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


def test_the_outputs_ending_chooses_the_format(folder):
    load_file = pytest.importorskip("safetensors.torch").load_file
    assert main(["--base_model", str(folder / "base.pth"), "--checkpoint", str(folder / "s.pth"),
                 "--output", str(folder / "out.safetensors")]) == 0
    assert set(load_file(folder / "out.safetensors")) == {*BASE, *STATE}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "exactly one adapter"),
        (["--checkpoint", "a.pth", "--state_checkpoint", "s.pth"], "exactly one adapter"),
        (["--checkpoint", "nowhere.pth"], "nowhere.pth"),
        (["--checkpoint", "a.pth", "--type", "pissa"], "pissa"),
        (["--checkpoint", "a.pth", "--type", "state"], "another kind"),
        (["--checkpoint", "a.pth", "--quant", "nf4"], "nf4"),
        (["--checkpoint", "a.pth", "--lora_init", "init.pth"], "PiSSA"),
        (["--checkpoint", "a.pth", "--format", "hf"], "hf"),
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
