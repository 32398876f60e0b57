"""A run that is killed without warning, again and again, ends with the weights of one that was left alone."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
# threads that wait for each other on a busy machine make a tiny model twenty times slower
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(model, data, folder, *more):
    words = f"--load_model {model} --data_file {data} --proj_dir {folder} --accelerator cpu --tokenizer bytes"
    run = "--ctx_len 48 --micro_bsz 2 --accumulate_grad_batches 2 --epoch_count 3 --epoch_save 1 --save_steps 2"
    method = '--peft lora --peft_config {"r":4,"lora_dropout":0.1} --random_seed 7 --lr_init 1e-3'
    steps = f"--epoch_steps {STEPS * 2 // 3}"
    spoken = " ".join((words, run, steps, method)).split()
    return [sys.executable, str(ROOT / "train.py"), *spoken, *more]


def steps_done(folder):
    log = folder / "loss_data.jsonl"
    return log.read_bytes().count(b"\n") if log.is_file() else 0


def kill_at(run, folder, step):
    """Kill ``run`` a random moment after its log reaches ``step``; False if it ended before."""
    while run.poll() is None:
        if steps_done(folder) >= step:
            time.sleep(random.random() / 20)
            break
        time.sleep(0.002)
    run.kill()
    return run.wait() != 0


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--save_async", "--step_save", "3", "--keep", "30")], ids=["at once", "beside"])
def test_killed_at_random_moments_and_resumed_the_weights_are_the_same_bit_for_bit(
    tiny_model, binidx_prefix, tmp_path, request, more
):
    wanted = request.config.getoption("--kills")
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    subprocess.run(command(tiny_model, binidx_prefix, calm), check=True, capture_output=True, env=ENVIRONMENT)
    targets = sorted(random.Random().sample(range(STEPS * 9 // 10), wanted))
    again, kills = command(tiny_model, binidx_prefix, killed, *more), 0
    for target in targets:
        with subprocess.Popen(again, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT) as run:
            kills += kill_at(run, killed, target)
    last = subprocess.run(again, check=True, capture_output=True, text=True, env=ENVIRONMENT)
    assert kills == wanted, f"killed at {targets}: {last.stdout}"
    for name in ("rwkv-0.pth", "rwkv-1.pth", "rwkv-2.pth"):
        left_alone, resumed = (torch.load(folder / name, weights_only=True) for folder in (calm, killed))
        assert all(torch.equal(tensor, resumed[key]) for key, tensor in left_alone.items()), f"{name}, {targets}"
    assert steps_done(killed) == steps_done(calm) == STEPS
