import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from rwkvpeft.cli.assemble import build_for_training

ROOT = Path(__file__).resolve().parents[2]


def read(path):
    return torch.load(path, weights_only=True)


def test_full_training_writes_a_whole_model_that_has_changed(train, tiny_model, tmp_path):
    code, _, errors = train("--peft", "none")
    assert code == 0, errors
    before, after = read(tiny_model), read(tmp_path / "out" / "rwkv-0.pth")
    assert before.keys() == after.keys()
    assert not torch.equal(before["head.weight"], after["head.weight"])


def test_lora_training_writes_the_adapter_alone(train, tmp_path):
    code, output, errors = train("--peft", "lora", "--peft_config", '{"r": 4}', "--train_parts", "ln")
    assert code == 0, errors
    tensors = read(tmp_path / "out" / "rwkv-0.pth")
    assert {name.rpartition(".")[2] for name in tensors} == {"lora_A", "lora_B", "weight", "bias"}
    assert tensors["blocks.0.att.key.lora_A"].shape == (4, 32)
    assert "merge.py --base_model" in output


def test_pissa_cuts_a_16_bit_weight_without_loss_when_it_computes_in_fp32(train, tiny_model, tmp_path, monkeypatch):
    half = {name: tensor.bfloat16() for name, tensor in read(tiny_model).items()}
    torch.save(half, tmp_path / "half.pth")
    built = []

    def build(*parts):
        built.append(build_for_training(*parts))
        return built[0]

    monkeypatch.setattr("rwkvpeft.cli.assemble.build_for_training", build)
    rate = ("--lr_init", "1e-12", "--lr_final", "1e-12")
    code, _, errors = train("--load_model", tmp_path / "half.pth", "--peft", "pissa", "--precision", "fp32", *rate)
    assert code == 0, errors
    layer = built[0].blocks[0].att.key
    whole = layer.base.weight + layer.lora_B @ layer.lora_A
    torch.testing.assert_close(whole, half["blocks.0.att.key.weight"].float(), rtol=0, atol=1e-6)


def test_state_tuning_writes_one_state_for_each_layer(train, tmp_path):
    code, output, errors = train("--peft", "state")
    assert code == 0, errors
    tensors = read(tmp_path / "out" / "rwkv-0.pth")
    assert sorted(tensors) == ["blocks.0.att.time_state", "blocks.1.att.time_state"]
    assert "--state" in output


def test_a_sidecar_tells_what_merging_needs(train, tmp_path):
    train("--peft", "lora", "--peft_config", '{"r": 4}')
    recipe = json.loads((tmp_path / "out" / "rwkv-0.json").read_text())
    assert (recipe["method"], recipe["config"]["r"], recipe["base_model"]) == ("lora", 4, "tiny.pth")


def test_the_settings_of_a_run_can_be_fed_back(train, tmp_path):
    train("--peft", "state", "--adam_eps", "1e-18")
    written = tmp_path / "out" / "config.yaml"
    code, _, errors = train("--config", written, "--proj_dir", tmp_path / "again")
    first, second = yaml.safe_load(written.read_text()), yaml.safe_load((tmp_path / "again/config.yaml").read_text())
    assert code == 0, errors
    assert second.pop("output") != first.pop("output")
    assert second == first


def test_the_start_report_names_what_runs(train):
    _, output, _ = train("--peft", "lora")
    for words in ("RWKV x070", "LoRA", "operator", "wkv7 by torch", "12 documents"):
        assert words in output


def test_preview_shows_samples_and_leaves_nothing_behind(train, tmp_path):
    code, output, _ = train("--preview", "2")
    assert code == 0
    assert "Assistant" in output
    assert not (tmp_path / "out").exists()


def test_a_jsonl_file_trains_without_conversion(train, jsonl_file):
    code, output, errors = train("--data_file", jsonl_file, "--loss_mask", "qa", "--peft", "lora")
    assert code == 0, errors
    assert "12 documents" in output


def test_training_goes_on_from_an_adapter_file(train, tmp_path):
    train("--peft", "state")
    code, _, errors = train(
        "--peft",
        "state",
        "--adapter",
        tmp_path / "out/rwkv-0.pth",
        "--proj_dir",
        tmp_path / "more",
        "--lr_init",
        "1e-9",
        "--lr_final",
        "1e-9",
    )
    assert code == 0, errors
    name = "blocks.0.att.time_state"
    first, more = read(tmp_path / "out/rwkv-0.pth"), read(tmp_path / "more/rwkv-0.pth")
    torch.testing.assert_close(more[name], first[name], atol=1e-6, rtol=0)


def test_running_out_of_memory_is_one_message_with_ways_out(train, monkeypatch):
    def fail(**_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: not enough memory: you tried to")

    monkeypatch.setattr("rwkvpeft.training.fit.fit", fail)
    code, _, errors = train("--peft", "none")
    assert code == 2
    assert "not enough memory for this run" in errors
    assert "--micro_split 2 (saves " in errors
    assert "--peft lora" in errors


def test_another_failure_keeps_its_traceback(train, monkeypatch):
    def fail(**_):
        raise RuntimeError("shapes disagree")

    monkeypatch.setattr("rwkvpeft.training.fit.fit", fail)
    with pytest.raises(RuntimeError, match="shapes disagree"):
        train("--peft", "none")


def test_debug_shows_the_traceback_of_a_users_mistake(train, tmp_path):
    (tmp_path / "settings.yaml").write_text("debug: true\n")
    for words in (["--debug"], ["--config", tmp_path / "settings.yaml"]):
        code, _, errors = train("--n_layer", "9", *words)
        assert code == 2
        assert "Traceback" in errors


def test_the_same_command_goes_on_with_the_seed_it_had(train, tmp_path):
    words = ["--peft", "state", "--random_seed", "-1"]
    train(*words)
    seed = yaml.safe_load((tmp_path / "out/config.yaml").read_text())["runtime"]["random_seed"]
    code, output, errors = train(*words)
    assert code == 0, errors
    assert "is complete" in output
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["runtime"]["random_seed"] == seed


def test_a_broken_resume_point_is_told_once(train, tmp_path):
    train("--peft", "state")
    newest = max((tmp_path / "out/resume").glob("step-*"))
    (newest / "resume.json").write_text("junk")
    code, output, errors = train("--peft", "state")
    assert code == 0, errors
    assert output.count("is broken and passed over") == 1


@pytest.mark.slow
def test_a_terminated_run_saves_and_leaves_with_code_0(tiny_model, binidx_prefix, tmp_path):
    words = (
        f"--load_model {tiny_model} --data_file {binidx_prefix} --proj_dir {tmp_path} --accelerator cpu --peft state"
    )
    short = "--ctx_len 16 --micro_bsz 1 --epoch_steps 100000 --epoch_count 1"
    command = [sys.executable, str(ROOT / "train.py"), *words.split(), *short.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        for line in run.stdout:
            if line.startswith("step"):
                break
        run.send_signal(signal.SIGTERM)
        rest = run.stdout.read()
    assert run.returncode == 0, rest
    assert "the same command goes on from" in rest
    assert list((tmp_path / "resume").glob("step-*/resume.json"))


@pytest.mark.slow
def test_two_processes_train_together_with_one_seed(tiny_model, binidx_prefix, tmp_path):
    words = (
        f"--load_model {tiny_model} --data_file {binidx_prefix} --proj_dir {tmp_path} --accelerator cpu --peft state"
    )
    short = "--ctx_len 16 --micro_bsz 1 --epoch_steps 2 --epoch_count 1 --devices 2 --strategy ddp"
    command = [sys.executable, str(ROOT / "train.py"), *words.split(), *short.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("random seed") == 1
    assert (tmp_path / "rwkv-0.pth").is_file()


def test_what_is_computed_twice_is_chosen_again_for_each_run(train, tmp_path, monkeypatch):
    words = ("--peft", "lora", "--grad_cp", "auto", "--epoch_count", 2)
    code, plenty, errors = train(*words, "--my_exit", 0)
    assert code == 0, errors
    assert "computed twice: nothing, the fastest that fits" in plenty
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["runtime"]["grad_cp"] == "auto"
    monkeypatch.setattr("rwkvpeft.cli.assemble.free_memory", lambda device: 1000)
    code, scarce, errors = train(*words)
    assert code == 0, errors
    assert "computed twice: whole blocks, though not expected to fit" in scarce
    assert len((tmp_path / "out" / "loss_data.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(("grad_cp", "what"), [("0", "nothing"), ("selective", "all but"), ("1", "whole blocks")])
def test_what_is_computed_twice_is_what_was_asked_for(train, grad_cp, what):
    code, output, errors = train("--peft", "lora", "--grad_cp", grad_cp)
    assert code == 0, errors
    assert f"computed twice: {what}" in output
    assert f"--grad_cp {grad_cp}" in output


def test_fused_kernels_that_cannot_run_are_an_error_when_asked_for_and_no_word_otherwise(train):
    _, output, _ = train("--peft", "lora")
    assert "rest of a block: plain PyTorch; loss: PyTorch\n" in output
    code, _, errors = train("--peft", "lora", "--fused_kernel")
    assert code == 2
    assert "--fused_kernel cannot run this job" in errors
    assert "device cpu" in errors


def test_fused_kernels_can_be_declined(train):
    code, output, errors = train("--peft", "lora", "--fused_kernel", "false")
    assert code == 0, errors
    assert "rest of a block: plain PyTorch, as asked" in output
