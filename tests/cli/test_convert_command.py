import json

import pytest
import torch

from rwkvpeft.cli.convert import main
from rwkvpeft.cli.merge import main as merge


@pytest.fixture
def convert(capsys):
    """Call the command. Returns code, output, errors."""

    def run(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def lora_file(train, tmp_path):
    """A trained LoRA adapter with its recipe."""
    code, _, errors = train("--peft", "lora", "--peft_config", '{"r": 4}', "--train_parts", "ln")
    assert code == 0, errors
    return tmp_path / "out" / "rwkv-0.pth"


def read(path):
    return torch.load(path, weights_only=True)


def same(path, other):
    first, second = read(path), read(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_trained_adapter_goes_to_a_folder_and_back_without_loss(convert, lora_file, tmp_path):
    pytest.importorskip("safetensors")
    code, output, errors = convert(lora_file, tmp_path / "hf")
    assert code == 0, errors
    assert "LORA" in output
    assert "modules_to_save" in output
    code, _, errors = convert(tmp_path / "hf", tmp_path / "back.pth")
    assert code == 0, errors
    assert same(lora_file, tmp_path / "back.pth")
    assert json.loads((tmp_path / "back.json").read_text()) == json.loads(lora_file.with_suffix(".json").read_text())


def test_a_folder_can_be_merged_as_it_is(convert, lora_file, tiny_model, tmp_path, capsys):
    pytest.importorskip("safetensors")
    convert(lora_file, tmp_path / "hf")
    for adapter in (lora_file, tmp_path / "hf"):
        code = merge(["--base_model", str(tiny_model), "--checkpoint", str(adapter), "--output",
                      str(tmp_path / f"{adapter.name}-merged.pth")])
        assert code == 0, capsys.readouterr().err
    assert same(tmp_path / "rwkv-0.pth-merged.pth", tmp_path / "hf-merged.pth")


def test_training_goes_on_from_a_folder(convert, lora_file, train, tmp_path):
    pytest.importorskip("safetensors")
    convert(lora_file, tmp_path / "hf")
    settings = ("--peft", "lora", "--peft_config", '{"r": 4}', "--train_parts", "ln")
    code, _, errors = train(*settings, "--adapter", tmp_path / "hf", "--proj_dir", tmp_path / "more")
    assert code == 0, errors


def test_a_tuner_of_hugging_face_trains_goes_on_and_is_converted(train, convert, tmp_path):
    pytest.importorskip("peft")
    settings = ("--peft", "adalora", "--peft_config", '{"init_r": 4, "target_r": 2}', "--train_parts", "ln")
    for resume in ("none", "auto"):
        code, _, errors = train(*settings, "--quant", "fp8", "--resume", resume)
        assert code == 0, errors
    file = tmp_path / "out" / "rwkv-0.pth"
    for words in ((file, tmp_path / "hf"), (tmp_path / "hf", tmp_path / "back.pth")):
        code, _, errors = convert(*words)
        assert code == 0, errors
    assert same(file, tmp_path / "back.pth")


def test_an_adapter_without_a_recipe_needs_loras_alpha(convert, lora_file, tmp_path):
    pytest.importorskip("safetensors")
    lora_file.with_suffix(".json").unlink()
    code, _, errors = convert(lora_file, tmp_path / "hf")
    assert code == 2
    assert "--lora_alpha" in errors
    assert convert(lora_file, tmp_path / "hf", "--lora_alpha", 16)[0] == 0
    assert json.loads((tmp_path / "hf" / "adapter_config.json").read_text())["lora_alpha"] == 16


def test_trained_time_parameters_are_refused_unless_they_may_stand_aside(train, convert, tmp_path):
    pytest.importorskip("safetensors")
    train("--peft", "lora", "--peft_config", '{"r": 4}', "--train_parts", "time")
    file = tmp_path / "out" / "rwkv-0.pth"
    code, _, errors = convert(file, tmp_path / "hf")
    assert code == 2
    assert "merge.py" in errors
    code, output, errors = convert(file, tmp_path / "hf", "--set_aside")
    assert code == 0, errors
    assert "computes something else without them" in output
    assert convert(tmp_path / "hf", tmp_path / "back.pth")[0] == 0
    assert same(file, tmp_path / "back.pth")


@pytest.mark.parametrize(
    ("words", "message"),
    [(("in.pth", "out.pth"), "name of a folder"), (("missing.pth", "out"), "does not exist"), ((".", "out"), ".pth")],
)
def test_wrong_names_are_refused(convert, words, message):
    code, _, errors = convert(*words)
    assert code == 2
    assert message in errors
