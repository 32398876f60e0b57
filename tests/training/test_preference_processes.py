"""Preferences in several processes against the same in one; the processes are real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkvpeft.checkpoints.files import load_tensors
from rwkvpeft.models.rwkv7 import Rwkv7
from rwkvpeft.models.shape import new_shape

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
FULL = "--peft none --objective dpo --sft_share 0.5"
LORA = '--peft lora --peft_config {"r":4,"lora_dropout":0} --objective ipo --length_norm true'


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model whose layers all matter, and pairs of different lengths."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    weights = Rwkv7.initial_weights(new_shape("x070", n_layer=2, n_embd=32, vocab_size=256, head_size=16))
    torch.save({name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in weights.items()}, folder / "m.pth")
    lines = [
        json.dumps({"prompt": "ab" * (n % 5) + "?", "chosen": "y" * (n % 4 + 1), "rejected": "no" * (n % 3 + 1)})
        for n in range(24)
    ]
    (folder / "d.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def train(inputs, tmp_path_factory):
    """Run train.py; 4 optimizer steps of 8 pairs, whatever the processes. Returns proj_dir."""

    def run(words, *, processes=1, rows=4):
        folder = tmp_path_factory.mktemp("run")
        count = 8 // (rows * processes)
        common = f"--load_model {inputs}/m.pth --data_file {inputs}/d.jsonl --proj_dir {folder} --accelerator cpu"
        data = "--data_type jsonl --tokenizer bytes --ctx_len 40 --val_split 5"
        steps = "--epoch_count 2 --epoch_save 1 --random_seed 3 --lr_init 1e-3 --lr_final 1e-3 --report false"
        dealt = f"--micro_bsz {rows} --accumulate_grad_batches {count} --epoch_steps {2 * count}"
        words = f"{common} {data} {steps} {dealt} --devices {processes} {words}".split()
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *words], capture_output=True, text=True, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    return run


@pytest.fixture(scope="module")
def alone(train):
    """The same runs by one process that takes 8 pairs at once, made once each."""
    made = {}

    def run(words):
        if words not in made:
            made[words] = train(words, rows=8)
        return made[words]

    return run


def records(folder, name):
    keys = ("loss", "margin", "accuracy", "sft_loss") if name == "loss_data.jsonl" else ("val_loss",)
    return [[json.loads(line)[key] for key in keys] for line in (folder / name).read_text().splitlines()]


@pytest.mark.parametrize(
    ("strategy", "method"),
    [
        ("ddp", FULL),
        pytest.param("fsdp", FULL, marks=pytest.mark.faults),
        pytest.param("deepspeed_stage_2", FULL, marks=pytest.mark.faults),
        pytest.param("ddp", LORA, marks=pytest.mark.faults),
        ("fsdp", LORA),
    ],
)
def test_two_processes_compute_what_one_computes(train, alone, strategy, method):
    if strategy.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    one, other = alone(method), train(f"{method} --strategy {strategy}", processes=2)
    for name in ("loss_data.jsonl", "val_data.jsonl"):
        torch.testing.assert_close(*map(torch.tensor, (records(other, name), records(one, name))), rtol=0, atol=2e-5)
    expected = load_tensors(one / "rwkv-1.pth")
    torch.testing.assert_close(load_tensors(other / "rwkv-1.pth"), expected, rtol=0, atol=2e-5)
    ours, theirs = (sorted(path.name for path in folder.glob("reference*.pth")) for folder in (other, one))
    if method == FULL:
        assert ours == theirs == ["reference.pth", "reference_held_out.pth"]


def test_micro_batches_compute_what_one_batch_computes(train, alone):
    expected = load_tensors(alone(FULL) / "rwkv-1.pth")
    torch.testing.assert_close(load_tensors(train(FULL, rows=2) / "rwkv-1.pth"), expected, rtol=0, atol=2e-5)
