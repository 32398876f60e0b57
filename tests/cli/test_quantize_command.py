"""python -m rwkvpeft.quantize, and what its files are good for."""

from __future__ import annotations

import json

import pytest
import torch

from rwkvpeft.checkpoints.adapter import Recipe, load_recipe, save_recipe
from rwkvpeft.checkpoints.quantised import model_fingerprint
from rwkvpeft.cli import generate, merge
from rwkvpeft.cli.quantize import main


@pytest.fixture
def quantised(tiny_model, tmp_path):
    assert main(["--model", str(tiny_model), "--quant", "fp8", "--output", str(tmp_path / "q.pth")]) == 0
    return tmp_path / "q.pth"


def test_the_command_says_what_it_saved(tiny_model, tmp_path, capsys):
    assert main(["--model", str(tiny_model), "--quant", "fp8", "--output", str(tmp_path / "q.pth")]) == 0
    assert "12 weights in fp8, 8.00 bits each" in capsys.readouterr().out


def test_a_recipe_beside_the_model_is_carried_along(tiny_model, tmp_path):
    model = tmp_path / "own.pth"
    model.write_bytes(tiny_model.read_bytes())
    save_recipe(model, Recipe("none", tokenizer="bytes", head_size_divisor=4))
    assert main(["--model", str(model), "--quant", "fp8", "--output", str(tmp_path / "q.pth")]) == 0
    recipe = load_recipe(tmp_path / "q.pth")
    assert (recipe.quant, recipe.tokenizer, recipe.head_size_divisor) == ("fp8", "bytes", 4)


def test_text_is_generated_from_a_quantised_file(quantised, capsys):
    words = ["--model", str(quantised), "--prompt", "What", "--max_tokens", "3", "--temperature", "0"]
    assert generate.main([*words, "--device", "cpu"]) == 0
    assert capsys.readouterr().out


def test_an_adapter_trained_on_a_quantised_file_is_merged_into_the_original(quantised, tiny_model, train, tmp_path):
    code, _, err = train("--peft", "lora", "--load_model", quantised, "--proj_dir", tmp_path / "run")
    assert code == 0, err
    recipe = json.loads(next((tmp_path / "run").glob("rwkv-*.json")).read_text())
    assert (recipe["quant"], recipe["base_fingerprint"]) == ("fp8", model_fingerprint(tiny_model))
    adapter = sorted((tmp_path / "run").glob("rwkv-*.pth"))[0]
    words = ["--base_model", str(tiny_model), "--checkpoint", str(adapter), "--output", str(tmp_path / "out.pth")]
    assert merge.main(words) == 0
    assert torch.load(tmp_path / "out.pth", weights_only=True)["blocks.0.att.key.weight"].dtype == torch.float32


def test_a_quantised_file_is_not_trained_whole(quantised, train, tmp_path):
    code, _, err = train("--peft", "none", "--load_model", quantised, "--proj_dir", tmp_path / "run")
    assert code == 2
    assert "cannot be trained themselves" in err


def test_merged_models_cannot_be_asked_of_a_quantised_file(quantised, train, tmp_path):
    words = ("--peft", "lora", "--load_model", quantised, "--proj_dir", tmp_path / "run")
    code, output, err = train(*words, "--merge", "1")
    assert code == 2
    assert "--merge 1 needs the full-precision model" in err
    assert "step 1" not in output


def test_a_missing_model_is_one_message(tmp_path, capsys):
    assert main(["--model", str(tmp_path / "no.pth"), "--quant", "fp8", "--output", str(tmp_path / "q.pth")]) == 2
    assert "no.pth does not exist" in capsys.readouterr().err
