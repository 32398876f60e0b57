"""Command lines of RWKV-PEFT's scripts, with --accelerator cpu, --strategy auto and the sizes of a tiny run."""

import json
import shlex

import pytest
import torch

from rwkvpeft.cli.merge import main as merge
from rwkvpeft.cli.train import main

NAMES = "--load_model {model} --proj_dir {out} --data_file {data}"
SIZES = "--vocab_size 256 --n_layer 2 --n_embd 32"
SHORT = "--ctx_len 16 --micro_bsz 2 --epoch_steps 2"
CPU = "--accelerator cpu --devices 1 --precision bf16 --strategy auto --grad_cp 1"
BETAS = "--beta1 0.9 --beta2 0.99 --adam_eps 1e-8"
LORA_CONFIG = """'{{"lora_load":"","lora_r":32,"lora_alpha":32,"lora_dropout":0.0}}'"""

PISSA_CONFIG = """'{{"pissa_load":"","pissa_init":"","pissa_r":32,"svd_niter":4}}'"""
PISSA_PARTS = """'{{"pissa_load":"","pissa_init":"","pissa_r":32,"svd_niter":4,"pissa_parts":"att,ffn"}}'"""
DISHA_CONFIG = """'{{"mode":"bone","load":"","r":64}}'"""
BONE_CONFIG = """'{{"bone_mode":"bone","bone_load":"","bone_r":64}}'"""
# what the scripts of the end of 2024 have in common, and those of February 2025
LATE_2024 = (
    f"{NAMES} --data_type binidx {SIZES} {SHORT} --epoch_count 1 --epoch_begin 0 --epoch_save 1 --pre_ffn 0 "
    f"--head_qk 0 --lr_init 2e-5 --lr_final 2e-5 --warmup_steps 0 {BETAS} {CPU} --dataload pad --loss_mask pad"
)
FEBRUARY = (
    f"{NAMES} {SIZES} --data_type binidx --dataload pad --loss_mask pad {SHORT} --epoch_count 1 --epoch_begin 0 "
    f"--epoch_save 1 --lr_init 2e-5 --lr_final 2e-5 --warmup_steps 0 {BETAS} {CPU} --my_testing x070"
)
OCTOBER = (
    f"{NAMES} {SIZES} --data_type binidx {SHORT} --epoch_count 1 --epoch_save 1 --lr_init 1e-5 --lr_final 1e-5 "
    f"{CPU} --my_testing x070"
)

LINES = {
    "scripts/run_lora.sh of February 2025": (
        f"{NAMES} {SIZES} --data_type binidx --dataload pad --loss_mask pad {SHORT} --epoch_count 1 --epoch_begin 0 "
        f"--epoch_save 1 --lr_init 2e-5 --lr_final 2e-5 --warmup_steps 0 {BETAS} {CPU} --my_testing x070 "
        f"--peft lora --lora_config {LORA_CONFIG}"
    ),
    "scripts/run_lora.sh of December 2024": (
        f"{NAMES} --data_type binidx {SIZES} {SHORT} --epoch_count 1 --epoch_begin 0 --epoch_save 1 --pre_ffn 0 "
        f"--head_qk 0 --lr_init 2e-5 --lr_final 2e-5 --warmup_steps 0 {BETAS} {CPU} --my_testing x070 --dataload pad "
        f"--loss_mask pad --quant none --peft lora --lora_config {LORA_CONFIG}"
    ),
    "scripts/run_pissa.sh of December 2024": (
        f"{LATE_2024} --rwkv_version x070 --peft pissa --pissa_config {PISSA_CONFIG}"
    ),
    "scripts/run_pissa.sh of February 2025": f"{FEBRUARY} --peft pissa --pissa_config {PISSA_CONFIG}",
    "scripts/run_pissa_fp8.sh of October 2024": (
        f"{LATE_2024} --my_testing x070 --peft pissa --pissa_config {PISSA_PARTS} --train_parts [] --quant fp8"
    ),
    "scripts/run_bone.sh of December 2024": (
        f"{LATE_2024} --my_testing x070 --peft bone --bone_config {BONE_CONFIG} --data_shuffle 0"
    ),
    "scripts/run_disha.sh of February 2025": f"{FEBRUARY} --peft disha --disha_config {DISHA_CONFIG}",
    "scripts/miss.sh of October 2025": f"""{OCTOBER} --peft miss --peft_config '{{{{"r":8}}}}'""",
    "scripts/lora.sh of October 2025": (
        f"{NAMES} {SIZES} --data_type binidx {SHORT} --epoch_count 1 --epoch_save 1 --lr_init 1e-5 --lr_final 1e-5 "
        f"""{CPU} --my_testing x070 --peft lora --peft_config '{{{{"r":8,"lora_alpha":32,"lora_dropout":0.05}}}}'"""
    ),
    "scripts/demo-state-tuning.sh of December 2024": (
        f"{NAMES} {SIZES} --data_type binidx {SHORT} --epoch_count 1 --epoch_begin 0 --epoch_save 1 --pre_ffn 0 "
        f"--head_qk 0 --lr_init 1 --lr_final 1e-2 --warmup_steps 10 {BETAS} {CPU} --my_testing x070 "
        "--train_type state --dataload pad --fla"
    ),
    "scripts/demo-state-tuning.sh of February 2025": (
        f"{NAMES} {SIZES} --data_type binidx --dataload pad --loss_mask pad {SHORT} --epoch_count 1 --epoch_begin 0 "
        f"--epoch_save 1 --lr_init 1 --lr_final 1e-2 --warmup_steps 0 {BETAS} {CPU} --my_testing x070 "
        "--train_type state --dataload pad --op fla"
    ),
    "scripts/state tuning.sh of October 2025": (
        f"{NAMES} {SIZES} --data_type binidx {SHORT} --epoch_count 1 --epoch_save 1 --lr_init 1e-5 --lr_final 1e-5 "
        f"{CPU} --my_testing x070 --peft state --op fla"
    ),
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_tutorials_command_line_runs_unchanged(line, tiny_model, binidx_prefix, tmp_path, capsys):
    words = line.format(model=tiny_model, out=tmp_path, data=binidx_prefix)
    assert main(shlex.split(words)) == 0, capsys.readouterr().err
    assert (tmp_path / "rwkv-0.pth").is_file()
    assert (tmp_path / "rwkv-0.json").is_file()


@pytest.mark.parametrize("quant", ["int8", "nf4", "4bit"])
def test_the_readmes_quantised_training_runs_unchanged(quant, tiny_model, binidx_prefix, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    line = f"{FEBRUARY} --peft lora --lora_config {LORA_CONFIG} --quant {quant}"
    words = line.format(model=tiny_model, out=tmp_path, data=binidx_prefix)
    assert main(shlex.split(words)) == 0, capsys.readouterr().err
    recipe = json.loads((tmp_path / "rwkv-0.json").read_text())
    assert recipe["quant"] == quant


def test_the_tutorials_way_from_pissa_to_a_merged_model(tiny_model, binidx_prefix, tmp_path, capsys):
    line = f"{FEBRUARY} --peft pissa --pissa_config {PISSA_CONFIG}"
    assert main(shlex.split(line.format(model=tiny_model, out=tmp_path, data=binidx_prefix))) == 0
    # RWKV-PEFT's own files hold the start values apart
    adapter = torch.load(tmp_path / "rwkv-0.pth", weights_only=True)
    torch.save({name: tensor for name, tensor in adapter.items() if "init_lora" not in name}, tmp_path / "theirs.pth")
    words = f"--base_model {tiny_model} --lora_init {tmp_path}/init_pissa.pth --type pissa"
    for name, output in (("rwkv-0.pth", "a.pth"), ("theirs.pth", "b.pth")):
        files = f"--lora_checkpoint {tmp_path}/{name} --output {tmp_path}/{output}"
        assert merge([*words.split(), *files.split()]) == 0, capsys.readouterr().err
    ours, theirs = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pth", "b.pth"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_going_on_from_upstreams_pissa_files(tiny_model, binidx_prefix, tmp_path, capsys):
    words = {"model": tiny_model, "data": binidx_prefix}
    first, second = tmp_path / "first", tmp_path / "second"
    line = f"{FEBRUARY} --peft pissa --pissa_config {PISSA_CONFIG}"
    assert main(shlex.split(line.format(out=first, **words))) == 0
    adapter = torch.load(first / "rwkv-0.pth", weights_only=True)
    torch.save({name: tensor for name, tensor in adapter.items() if "init_lora" not in name}, first / "theirs.pth")
    config = {"pissa_load": f"{first}/theirs.pth", "pissa_init": f"{first}/init_pissa.pth", "pissa_r": 32}
    line = f"{FEBRUARY} --peft pissa --pissa_config".format(out=second, **words)
    assert main([*shlex.split(line), json.dumps(config)]) == 0, capsys.readouterr().err
    start = torch.load(second / "init_pissa.pth", weights_only=True)
    assert all(torch.equal(tensor, adapter[name]) for name, tensor in start.items())


def test_a_switch_for_an_absent_program_is_followed_aloud(train):
    _, output, _ = train("--train_type", "state", "--fla")
    assert "--fla: --op fla cannot run" in output
    assert "wkv7 by torch" in output


def test_a_program_asked_for_by_name_is_never_replaced(train):
    code, _, errors = train("--peft", "lora", "--op", "cuda")
    assert code == 2
    assert "--op cuda cannot run" in errors
    assert "torch" in errors
