"""Packed rows, batches of similar lengths and mixtures on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def test_a_packed_run_tells_how_full_its_rows_are_and_how_long_a_pass_is(train):
    code, output, errors = train("--dataload", "pack", "--epoch_steps", "0", "--ctx_len", "128")
    assert code == 0, errors
    assert "documents a row" in output
    assert "1 passes over the data" in output


def test_files_are_mixed_by_their_shares(train, binidx_prefix, jsonl_file):
    code, output, errors = train("--data_file", f"{binidx_prefix}:3,{jsonl_file}:1", "--peft", "lora")
    assert code == 0, errors
    assert "75 % of what is drawn, 1 x in a pass" in output
    assert "pairs.jsonl 25 % of what is drawn, 0.333 x in a pass" in output


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--length_buckets --dataload pack", "--dataload is not pad"),
        ("--length_buckets --data_shuffle 0", "--data_shuffle 0"),
        ("--data_file nowhere.jsonl:2,{there}:1", "nowhere.jsonl"),
        ("--data_file {there}:0", "a share above 0"),
        ("--data_file {there}:1,{there}:2 --dataload get --magic_prime 5", "--magic_prime"),
    ],
)
def test_what_cannot_be_done_is_refused(train, jsonl_file, words, named):
    code, _, errors = train(*words.format(there=jsonl_file).split())
    assert code == 2
    assert named in errors


@pytest.mark.slow
def test_two_processes_train_as_one(tiny_model, binidx_prefix, tmp_path):
    words = (
        f"--load_model {tiny_model} --data_file {binidx_prefix} --accelerator cpu --peft lora+state --tokenizer bytes "
        "--ctx_len 64 --epoch_steps 4 --epoch_count 1 --accumulate_grad_batches 2 --random_seed 3 --lr_init 1e-3 "
        "--logit_penalty 0 --dataload pack"
    )
    found, logs = [], []
    for devices, micro_bsz in ((1, 2), (2, 1)):
        folder = tmp_path / str(devices)
        own = ["--devices", str(devices), "--micro_bsz", str(micro_bsz), "--proj_dir", str(folder)]
        command = [sys.executable, str(ROOT / "train.py"), *words.split(), "--peft_config", '{"lora_dropout": 0}', *own]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(folder / "rwkv-0.pth", weights_only=True))
        logs.append([json.loads(line) for line in (folder / "loss_data.jsonl").read_text().splitlines()])
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    assert [step["tokens"] for step in logs[1]] == [step["tokens"] for step in logs[0]]
