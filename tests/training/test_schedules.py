"""Learning rates against upstream's, where it is right, and what is mended."""

from __future__ import annotations

import json

import pytest

from rwkvpeft.config.groups import OptimizerConfig, ScheduleConfig
from rwkvpeft.registry import SCHEDULES, find
from rwkvpeft.training.schedules import (
    build_schedule,
    cosine,
    exponential,
    steps_per_epoch,
    warmup_stable_decay,
    weight_decay_at,
)


@pytest.fixture
def recorded(golden):
    return json.loads((golden / "schedules.json").read_text())


def assert_equal_rates(schedule, case, **changes):
    arguments = {
        "total_steps": case["per_epoch"] * case["epochs"],
        "lr_init": case["lr_init"],
        "lr_final": case["lr_final"],
        "warmup_steps": case["warm"],
        **changes,
    }
    found = [schedule(step, **arguments) for step in case["steps"]]
    assert found == pytest.approx(case["lr"], rel=1e-14, abs=1e-18)


@pytest.mark.golden
def test_cosine_is_the_newest_upstreams(recorded):
    cases = [case for case in recorded["finetune"] if (case["source"], case["sched"]) == ("newest", "cos")]
    assert len(cases) >= 4
    for case in cases:
        assert_equal_rates(cosine, case)


@pytest.mark.golden
def test_cosine_without_warm_up_is_junes(recorded):
    cases = [case for case in recorded["finetune"] if (case["source"], case["sched"]) == ("june", "cos")]
    assert len(cases) >= 4
    for case in cases:
        total = case["per_epoch"] * case["epochs"] // case["dev"] // case["acc"]
        assert_equal_rates(cosine, case, warmup_steps=-1, total_steps=total)


@pytest.mark.golden
def test_wsd_down_to_zero_is_junes(recorded):
    cases = [case for case in recorded["finetune"] if (case["source"], case["sched"]) == ("june", "wsd")]
    assert len(cases) >= 3
    for case in cases:
        assert_equal_rates(warmup_stable_decay, case, lr_final=0.0)


@pytest.mark.golden
def test_exponential_is_that_of_rwkv_lm(recorded):
    for case in recorded["pretrain_v5_exp"]:
        assert_equal_rates(exponential, {**case, "per_epoch": case["epoch_steps"], "epochs": case["epoch_count"]})


def test_wsd_ends_at_lr_final():
    rates = [
        warmup_stable_decay(step, total_steps=50, lr_init=1.0, lr_final=0.1, warmup_steps=10) for step in range(51)
    ]
    assert max(rates) == rates[10] == 1.0
    assert rates[50] == pytest.approx(0.1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_ends_at_lr_final_and_stays_there(name):
    schedule = find(SCHEDULES, name, flag="--lr_schedule")
    for step in (100, 150):
        assert schedule(step, total_steps=100, lr_init=1e-3, lr_final=1e-5, warmup_steps=7) == pytest.approx(1e-5)


def test_a_run_that_accumulates_comes_down_to_lr_final():
    config = ScheduleConfig(
        epoch_count=2, accumulate_grad_batches=4, lr_init=1.0, lr_final=0.25, warmup_steps=-1, lr_schedule="linear"
    )
    assert steps_per_epoch(10, 4) == 3
    assert build_schedule(config, epoch_steps=10)(6) == pytest.approx(0.25)


def test_weight_decay_moves_in_a_straight_line():
    config = OptimizerConfig(weight_decay=0.1, weight_decay_final=0.3)
    assert [weight_decay_at(step, total_steps=10, config=config) for step in (0, 5, 10, 20)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.3]
    )
