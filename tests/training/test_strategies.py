"""Several processes under each kind of strategy compute what one process computes, and resume each other's runs.

The processes are real ones; some cases are run with the drills. ``scripts/strategy_table.py`` tries every strategy with
every kind of method.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkvpeft.config.resolve import Machine, resolve
from rwkvpeft.data.binidx import write_binidx
from rwkvpeft.errors import UserError
from rwkvpeft.models.rwkv7 import Rwkv7
from rwkvpeft.models.shape import new_shape
from rwkvpeft.training.strategies.deepspeed import DeepSpeed
from rwkvpeft.training.strategies.deepspeed_settings import deepspeed_settings, fit_buckets

pytest.importorskip("deepspeed")

ROOT = Path(__file__).resolve().parents[2]
LORA = '--peft lora --peft_config {"r":4,"lora_dropout":0}'


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model whose layers all matter, and rows of different lengths."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    weights = Rwkv7.initial_weights(new_shape("x070", n_layer=2, n_embd=32, vocab_size=64, head_size=16))
    torch.save({name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in weights.items()}, folder / "m.pth")
    write_binidx(folder / "d", (torch.randint(1, 64, (5 + n % 7,)).numpy().astype("uint16") for n in range(40)))
    return folder


@pytest.fixture(scope="module")
def train(inputs, tmp_path_factory):
    """Run train.py; 6 optimizer steps of 8 rows, whatever the processes. Returns proj_dir."""

    def run(words, *, processes=1, rows=4, folder=None, fails=False):
        folder = folder or tmp_path_factory.mktemp("run")
        count = 8 // (rows * processes)
        common = f"--load_model {inputs}/m.pth --data_file {inputs}/d --proj_dir {folder} --accelerator cpu"
        steps = "--ctx_len 12 --epoch_count 2 --epoch_save 1 --random_seed 3 --lr_init 1e-3 --report false"
        dealt = f"--micro_bsz {rows} --accumulate_grad_batches {count} --epoch_steps {3 * count}"
        command = [sys.executable, str(ROOT / "train.py"), *f"{common} {steps} {dealt} --devices {processes}".split()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *words.split()], capture_output=True, text=True, env=environment, timeout=300)
        assert bool(done.returncode) == fails, done.stderr[-3000:]
        return done.stderr if fails else folder

    return run


@pytest.fixture(scope="module")
def alone(train):
    """The same runs by one process that takes 8 rows at once, made once each."""
    made = {}

    def run(words):
        if words not in made:
            made[words] = train(words, rows=8)
        return made[words]

    return run


def settle(path):
    given = {"load_model": "m", "data_file": "d", "random_seed": 1, "strategy": "deepspeed_stage_2"}
    return resolve({**given, "ds_config": str(path)}, Machine("cpu", has_bf16=True))[0]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "loss_data.jsonl").read_text().splitlines()]


def assert_equal_runs(one, other):
    assert losses(other) == pytest.approx(losses(one), abs=1e-5)
    expected = torch.load(one / "rwkv-1.pth", weights_only=True)
    torch.testing.assert_close(torch.load(other / "rwkv-1.pth", weights_only=True), expected, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "method"),
    [
        pytest.param("ddp", "--peft none", marks=pytest.mark.faults),
        pytest.param("deepspeed_stage_1", "--peft none", marks=pytest.mark.faults),
        ("deepspeed_stage_2_offload", f"{LORA} --quant nf4"),
        pytest.param("deepspeed_stage_3", "--peft none", marks=pytest.mark.faults),
        ("deepspeed_stage_3", f"{LORA} --grad_cp 1 --val_split 5"),
        pytest.param("fsdp", "--peft none", marks=pytest.mark.faults),
        ("fsdp", "--peft state --quant nf4 --val_split 5"),
    ],
)
def test_two_processes_compute_what_one_computes(train, alone, strategy, method):
    assert_equal_runs(alone(method), train(f"{method} --strategy {strategy}", processes=2))


@pytest.mark.slow
def test_after_an_evaluation_split_weights_are_saved_with_all_their_moments(train, alone):
    method = "--peft none --val_split 5"
    saved = [
        torch.load(folder / "resume" / "step-00000006" / "tensors.pth", weights_only=True)
        for folder in (alone(method), train(f"{method} --strategy fsdp", processes=2))
    ]
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[0].items():
        torch.testing.assert_close(saved[1][name], tensor, rtol=0, atol=2e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_3"])
def test_a_diagnosis_finds_what_is_broken_in_another_processes_part(inputs, train, strategy):
    tensors = torch.load(inputs / "m.pth", weights_only=True)
    tensors["blocks.1.ffn.key.weight"][-1] = torch.nan
    torch.save(tensors, inputs / "broken.pth")
    words = f"--load_model {inputs}/broken.pth --peft none --skip_broken 0 --strategy {strategy}"
    assert "weights not finite: blocks.1.ffn.key.weight;" in train(words, processes=2, fails=True)


@pytest.mark.slow
def test_a_run_goes_on_under_other_strategies_and_numbers_of_processes(train, alone):
    folder = train(f"{LORA} --strategy deepspeed_stage_2 --my_exit 0", processes=2)
    assert len(losses(folder)) == 3
    train(f"{LORA} --strategy fsdp --save_steps 1", processes=2, folder=folder)
    assert_equal_runs(alone(LORA), folder)
    # back to the end of the first step of the second mini-epoch, as after a crash
    points = sorted((folder / "resume").iterdir())
    assert len(points) == 2
    for point in points[1:]:
        (point / "resume.json").write_text("cut")
    train(f"{LORA} --strategy deepspeed_stage_3", processes=2, folder=folder)
    assert_equal_runs(alone(LORA), folder)


def test_a_deepspeed_file_wins_over_our_settings(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 5}, "wall_clock_breakdown": False}))
    config = settle(path)
    made = deepspeed_settings(config, "cpu")
    assert made["zero_optimization"]["reduce_bucket_size"] == 5
    assert made["zero_optimization"]["stage"] == 2


def test_no_buffer_is_larger_than_what_is_trained(tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"reduce_bucket_size": 50}}')
    zero = fit_buckets(deepspeed_settings(settle(tmp_path / "ds.json"), "cpu"), trained=1000, weights=5000)
    sizes = zero["zero_optimization"]
    assert sizes["reduce_bucket_size"] == 50
    assert sizes["allgather_bucket_size"] == 1000
    assert sizes["stage3_prefetch_bucket_size"] == 5000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read"),
        ("[1]", "no JSON object"),
        ('{"fp16": {"enabled": true}}', "other flags"),
        ('{"zero_optimization": {"stage": 3}}', "another stage"),
        ('{"zero_optimization": 2}', "no object"),
    ],
)
def test_a_deepspeed_file_that_cannot_be_honoured_is_refused(tmp_path, text, reason):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError, match=reason):
        deepspeed_settings(settle(path), "cpu")


@pytest.mark.parametrize("section", [{"reduce_bucket_size": "lots"}, {"reduce_bucket_size": -1}, {"overlap_com": True}])
def test_a_section_that_deepspeed_does_not_take_is_refused_by_the_name_of_its_setting(tmp_path, section):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": section}))
    with pytest.raises(UserError, match="does not take") as caught:
        DeepSpeed(settle(path)).strategy()
    assert next(iter(section)) in caught.value.render()
