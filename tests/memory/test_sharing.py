"""What each of several devices holds, by strategy: the parts add up to the whole, and nothing is counted twice."""

from __future__ import annotations

import pytest

from rwkvpeft.adapters.build import build_adapter
from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.parse import build_groups
from rwkvpeft.memory import Expected, expect, least_need
from rwkvpeft.memory.dry_run import Moment
from rwkvpeft.memory.outline import Counts
from rwkvpeft.memory.sharing import SHARES, STEP, beside, gradients_at, held, saving
from rwkvpeft.models.shape import new_shape
from rwkvpeft.registry import STRATEGIES

SMALL = new_shape("x070", n_layer=3, n_embd=128, vocab_size=512)
# 1,000 numbers trained, 600 bytes frozen, of which 200 are quantised weights; a block has 700 bytes, what is in none 50
COUNTS = Counts(frozen_bytes=600, trained=1000, layers=3, packed_bytes=200, block_bytes=700, ends_bytes=50,
                numbers=1100)


def _config(strategy: str, devices: int = 4, peft: str = "none", **values: object) -> TrainConfig:
    return build_groups({"strategy": strategy, "devices": devices, "peft": peft, "precision": "fp32", "ctx_len": 32,
                         "micro_bsz": 1, "accelerator": "cpu", **values})


def _expected(config: TrainConfig) -> Expected:
    return expect(SMALL, config, lambda part: build_adapter(config.method.peft, {}, ["time", "ln"]))


def test_every_strategy_is_known() -> None:
    assert set(SHARES) == set(STRATEGIES)


@pytest.mark.parametrize(
    ("strategy", "frozen", "trained", "optimizer", "copies", "main_memory"),
    [
        ("ddp", 600, 4000, 8000, 0, 0),
        ("fsdp", 300, 1000, 2000, 0, 0),
        ("deepspeed_stage_1", 600, 4000, 2000, 1000, 0),
        ("deepspeed_stage_2", 600, 4000, 2000, 1000, 0),
        ("deepspeed_stage_3", 300, 1000, 2000, 1000, 0),
        ("deepspeed_stage_2_offload", 600, 4000, 0, 0, 5000),
        ("deepspeed_stage_3_offload", 300, 1000, 0, 0, 5000),
    ],
)
def test_between_steps_a_device_holds_its_parts(
    strategy: str, frozen: int, trained: int, optimizer: int, copies: int, main_memory: int
) -> None:
    assert held(COUNTS, 8, _config(strategy).runtime) == (frozen, trained, optimizer, copies, main_memory)


@pytest.mark.parametrize(
    ("strategy", "backward", "step"),
    [
        ("auto", 4000, 4000),
        ("deepspeed_stage_1", 400, 1000),
        ("deepspeed_stage_2", 1000, 1000),
        ("deepspeed_stage_2_offload", 0, 0),
        ("fsdp", 1000, 1000),
    ],
)
def test_gradients_are_held_as_long_and_as_far_as_the_strategy_does(strategy: str, backward: int, step: int) -> None:
    early, all_there = Moment(900, 400), Moment(4000, 4000)
    runtime = _config(strategy).runtime
    assert gradients_at(early, "backward", COUNTS, runtime) == backward
    assert gradients_at(all_there, STEP, COUNTS, runtime) == step


def test_one_device_alone_makes_no_room_for_gradients() -> None:
    assert gradients_at(Moment(900, 400), "backward", COUNTS, _config("auto", devices=1).runtime) == 400


def test_a_bucket_is_never_larger_than_what_is_trained() -> None:
    config = _config("deepspeed_stage_2", ds_bucket_mb=200)
    assert beside("backward", COUNTS, config.runtime) == 4000
    assert beside("forward", COUNTS, config.runtime) == 0


def test_stage_3_leaves_as_many_numbers_gathered_as_travel_together() -> None:
    runtime = _config("deepspeed_stage_3", ds_bucket_mb=100).runtime
    everything, bucket = 400 + 4000, 2 * 4000
    assert beside("forward", COUNTS, runtime) == everything + bucket
    large = COUNTS._replace(numbers=4 * 10**9, trained=4 * 10**9)
    left, bucket = 4 * 10**8, 2 * 4 * 10**8
    assert beside("forward", large, runtime) == pytest.approx(left + bucket, rel=1e-3)


def test_split_weights_are_gathered_by_blocks() -> None:
    assert beside("forward", COUNTS, _config("fsdp").runtime) == 2 * 700 + 50


@pytest.mark.parametrize("peft", ["none", "lora"])
@pytest.mark.parametrize("strategy", SHARES)
def test_the_least_is_never_more_than_the_expected(strategy: str, peft: str) -> None:
    config = _config(strategy, peft=peft)
    least = least_need(SMALL, config, lambda part: build_adapter(peft, {}, ["time", "ln"]))
    assert least.total <= _expected(config).total


def test_each_stage_needs_less_of_a_large_model() -> None:
    stages = ["ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
    totals = [_expected(_config(stage, devices=8, ds_bucket_mb=0)).total for stage in stages]
    assert totals == sorted(totals, reverse=True)


def test_more_devices_need_less_each() -> None:
    few, many = (_expected(_config("deepspeed_stage_3", devices=devices)).total for devices in (2, 16))
    assert many < few


def test_machines_count_as_devices_do() -> None:
    here, there = _config("fsdp", devices=8), _config("fsdp", devices=2, num_nodes=4)
    assert _expected(here) == _expected(there)


def test_an_offloaded_optimizer_is_told_apart_from_the_device() -> None:
    kept, away = (_expected(_config(f"deepspeed_stage_2{end}", accelerator="gpu")) for end in ("", "_offload"))
    assert away.optimizer == 0
    assert away.main_memory > kept.optimizer
    assert away.total == sum(away) - away.main_memory - away.main_saving < kept.total


def test_what_several_processes_hold_is_put_together_to_be_written() -> None:
    alone, split = _config("ddp", devices=4), _config("deepspeed_stage_1", devices=4)
    assert saving(COUNTS, 8, alone) == 0
    assert saving(COUNTS, 8, split) == 12 * 1000
    later = _config("ddp", devices=4, save_async=True)
    assert saving(COUNTS, 8, later) == 12 * 1000


def test_a_gpu_is_not_charged_for_what_is_put_together_in_main_memory() -> None:
    need = _expected(_config("ddp", accelerator="gpu"))
    assert need.saving == 0
    assert need.main_saving == 3 * need.trained
