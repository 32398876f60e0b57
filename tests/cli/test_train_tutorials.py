"""Command lines of RWKV-PEFT's scripts, with --accelerator cpu, --strategy auto and the sizes of a tiny run."""

import shlex

import pytest

from rwkvpeft.cli.train import main

NAMES = "--load_model {model} --proj_dir {out} --data_file {data}"
SIZES = "--vocab_size 256 --n_layer 2 --n_embd 32"
SHORT = "--ctx_len 16 --micro_bsz 2 --epoch_steps 2"
CPU = "--accelerator cpu --devices 1 --precision bf16 --strategy auto --grad_cp 1"
BETAS = "--beta1 0.9 --beta2 0.99 --adam_eps 1e-8"
LORA_CONFIG = """'{{"lora_load":"","lora_r":32,"lora_alpha":32,"lora_dropout":0.0}}'"""

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


def test_a_switch_for_an_absent_program_is_followed_aloud(train):
    _, output, _ = train("--train_type", "state", "--fla")
    assert "--fla: --op fla cannot run" in output
    assert "wkv7: torch" in output


def test_a_program_asked_for_by_name_is_never_replaced(train):
    code, _, errors = train("--peft", "lora", "--op", "cuda")
    assert code == 2
    assert "--op cuda cannot run" in errors
    assert "torch" in errors
