"""Learning rates against upstream's, where it is right, and what is mended."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rwkvpeft.config.groups import OptimizerConfig, ScheduleConfig
from rwkvpeft.registry import SCHEDULES, find
from rwkvpeft.training.schedules import (
    batches_before,
    build_schedule,
    cosine,
    exponential,
    steps_per_epoch,
    steps_to_tokens,
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


def by_tokens(case, **changes):
    config = ScheduleConfig(
        epoch_count=1, epoch_begin=case["epoch_begin"], lr_init=case["lr_init"], lr_final=case["lr_final"],
        warmup_steps=case["warm"], my_exit_tokens=case["exit_tokens"], train_stage=3,
    )
    sizes = {"epoch_steps": case["epoch_steps"], "batch_tokens": case["bsz"] * case["ctx"]}
    return replace(config, **changes), sizes


@pytest.mark.golden
def test_the_cosine_by_tokens_is_that_of_rwkv_lm(recorded):
    assert len(recorded["pretrain_v7"]) == 4
    for case in recorded["pretrain_v7"]:
        config, sizes = by_tokens(case)
        schedule = build_schedule(config, **sizes)
        assert [schedule(step) for step in case["steps"]] == pytest.approx(case["lr"], rel=1e-15, abs=1e-18)


@pytest.mark.golden
def test_a_run_ends_by_tokens_at_rwkv_lms_step(recorded):
    for case in recorded["pretrain_v7"]:
        config, sizes = by_tokens(case)
        last = case["epoch_begin"] * case["epoch_steps"] + steps_to_tokens(config, **sizes)
        # RWKV-LM saves and leaves before the step that begins with all tokens seen
        assert (last - 1) * sizes["batch_tokens"] < case["exit_tokens"] <= last * sizes["batch_tokens"]


def test_accumulated_batches_count_their_tokens():
    case = {"epoch_begin": 0, "lr_init": 1.0, "lr_final": 0.1, "warm": -1, "exit_tokens": 160, "epoch_steps": 10,
            "bsz": 2, "ctx": 4}
    config, sizes = by_tokens(case, accumulate_grad_batches=4)
    # mini-epochs of 4 + 4 + 2 batches of 8 tokens
    assert [batches_before(step, epoch_steps=10, accumulate_grad_batches=4) for step in range(5)] == [0, 4, 8, 10, 14]
    assert steps_to_tokens(config, **sizes) == 6
    assert build_schedule(config, **sizes)(6) == pytest.approx(0.1, rel=0.05)


def test_negative_tokens_give_the_mean_of_both_schedules():
    case = {"epoch_begin": 0, "lr_init": 1e-3, "lr_final": 1e-4, "warm": 3, "exit_tokens": 80, "epoch_steps": 10,
            "bsz": 2, "ctx": 4}
    config, sizes = by_tokens(case)
    steps = build_schedule(replace(config, my_exit_tokens=0, lr_schedule="exp"), **sizes)
    tokens = build_schedule(config, **sizes)
    both = build_schedule(replace(config, my_exit_tokens=-80, lr_schedule="exp"), **sizes)
    assert [both(step) for step in range(12)] == pytest.approx([(steps(i) + tokens(i)) / 2 for i in range(12)])


@pytest.mark.parametrize("warmup_steps", [10, 40])
def test_tokens_that_end_within_the_warm_up_leave_the_rate_rising(warmup_steps):
    config = ScheduleConfig(lr_init=1.0, lr_final=0.1, warmup_steps=warmup_steps, my_exit_tokens=80)
    schedule = build_schedule(config, epoch_steps=10, batch_tokens=8)
    assert schedule(9) == pytest.approx(0.01 + 0.99 * 9 / warmup_steps)


def test_a_later_stage_goes_on_where_the_schedule_stood():
    config = ScheduleConfig(epoch_count=4, lr_init=1.0, lr_final=0.1, warmup_steps=2, lr_schedule="exp")
    for tokens in (0, 320):
        whole, later = (
            build_schedule(replace(config, my_exit_tokens=tokens), epoch_steps=10, batch_tokens=8, begun=begun)
            for begun in (0, 30)
        )
        assert [later(step) for step in range(32, 40)] == pytest.approx([whole(step) for step in range(32, 40)])
        assert later(30) == pytest.approx(0.01 * whole(30))


@pytest.mark.golden
def test_weight_decay_beside_the_exponential_rate_is_that_of_rwkv_lm(recorded):
    for case in recorded["pretrain_v5_exp"]:
        config = OptimizerConfig(weight_decay=case["weight_decay"], weight_decay_final=case["weight_decay_final"])
        total = case["epoch_steps"] * case["epoch_count"]
        found = [weight_decay_at(step, total_steps=total, config=config, exponential_from=case["warm"])
                 for step in case["steps"]]
        assert found == pytest.approx(case["weight_decay_now"], rel=1e-14)


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
