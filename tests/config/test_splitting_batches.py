"""Batches worked through in parts: the rows of each optimizer step stay the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkvpeft.config.groups import ScheduleConfig, TrainConfig
from rwkvpeft.config.parse import build_groups, parse_train
from rwkvpeft.config.resolve import Machine, resolve
from rwkvpeft.config.settings_file import write_settings
from rwkvpeft.config.splitting_batches import (
    in_smallest_parts,
    other_noise,
    other_samples,
    possible_parts,
    split_batches,
)
from rwkvpeft.data.loader import BatchPlan
from rwkvpeft.errors import ContractError, UserError
from rwkvpeft.training.schedules import build_schedule, steps_to_tokens


def _config(**values: object) -> TrainConfig:
    return build_groups({"lr_init": 1e-3, "lr_final": 1e-5, "warmup_steps": 2, **values})


def _rows_of_steps(schedule: ScheduleConfig, world_size: int) -> list[set[int]]:
    """Positions that each optimizer step takes on all ranks, over three mini-epochs."""
    plans = [
        BatchPlan(schedule.micro_bsz, schedule.epoch_steps, schedule.accumulate_grad_batches, rank, world_size,
                  first_batch=schedule.epoch_begin * schedule.epoch_steps)
        for rank in range(world_size)
    ]
    return [
        {row for plan in plans for batch in range(group.start, group.stop) for row in plan.positions(batch)}
        for group in plans[0].groups(0, 3 * schedule.epoch_steps)
    ]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(("parts", "accumulate"), [(2, 1), (3, 4), (6, 5), (1, 2)])
def test_each_step_takes_the_same_rows(world_size: int, parts: int, accumulate: int) -> None:
    whole = _config(micro_bsz=6, epoch_steps=7, accumulate_grad_batches=accumulate, epoch_begin=2)
    split = split_batches(whole, parts)
    assert split.schedule.micro_bsz == 6 // parts
    assert _rows_of_steps(split.schedule, world_size) == _rows_of_steps(whole.schedule, world_size)


@pytest.mark.parametrize("exit_tokens", [0, 1000, 12345, -54321])
def test_learning_rates_and_the_end_by_tokens_stay(exit_tokens: int) -> None:
    whole = _config(micro_bsz=4, epoch_steps=5, accumulate_grad_batches=2, epoch_count=9, my_exit_tokens=exit_tokens)
    split = split_batches(whole, 4)

    def rates(schedule: ScheduleConfig) -> list[float]:
        shape = build_schedule(schedule, epoch_steps=schedule.epoch_steps, batch_tokens=schedule.micro_bsz * 100)
        return [shape(step) for step in range(30)]

    def end(schedule: ScheduleConfig) -> int | None:
        return steps_to_tokens(schedule, epoch_steps=schedule.epoch_steps, batch_tokens=schedule.micro_bsz * 100)

    assert rates(split.schedule) == pytest.approx(rates(whole.schedule), rel=1e-12)
    assert end(split.schedule) == end(whole.schedule)


def test_a_pass_over_the_data_keeps_its_length_when_it_is_told() -> None:
    whole = _config(micro_bsz=4, epoch_steps=0)
    assert split_batches(whole, 2, epoch_steps=3).schedule.epoch_steps == 6
    assert split_batches(whole, 2).schedule.epoch_steps == 0


def test_rows_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(ContractError, match="5 rows cannot be cut into 2"):
        split_batches(_config(micro_bsz=5), 2)


def test_the_possible_parts_are_the_divisors() -> None:
    assert possible_parts(12) == [1, 2, 3, 4, 6, 12]
    assert possible_parts(1) == [1]
    assert possible_parts(10**10)[-2:] == [10**10 // 2, 10**10]


def test_only_similar_lengths_depend_on_the_rows_of_a_batch() -> None:
    assert other_samples(_config()) is None
    assert other_samples(_config(dataload="pack")) is None
    assert "length_buckets" in (other_samples(_config(length_buckets=True)) or "")


@pytest.mark.parametrize("values", [{"dropout": 0.1}, {"neftune_alpha": 5.0}, {"dataload": "pack"}])
def test_noise_drawn_and_means_taken_for_each_batch_are_told(values: dict[str, object]) -> None:
    assert other_noise(_config()) is None
    assert other_noise(_config(**values)) is not None


@pytest.mark.parametrize(("word", "rows"), [("auto", 12), ("auto:24", 24)])
def test_auto_stands_for_two_settings(word: str, rows: int) -> None:
    values = parse_train(["--micro_bsz", word])
    schedule = build_groups(values).schedule
    assert (schedule.micro_bsz, schedule.micro_split) == (rows, "auto")


def test_auto_may_stand_in_a_file_and_be_read_back(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("schedule:\n  micro_bsz: auto:8\n")
    config = build_groups(parse_train(["--config", str(file)]))
    write_settings(tmp_path / "config.yaml", config)
    again = build_groups(parse_train(["--config", str(tmp_path / "config.yaml")]))
    assert (again.schedule.micro_bsz, again.schedule.micro_split) == (8, "auto")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--micro_bsz auto:many", "--micro_bsz cannot take this value"),
        ("--micro_bsz auto --micro_split 2", "chooses the parts itself"),
        ("--micro_bsz 8 --micro_split 3", "1, 2, 4, 8 or auto"),
        ("--micro_bsz 8 --micro_split half", "1, 2, 4, 8 or auto"),
        pytest.param(f"--micro_bsz 8 --micro_split {'9' * 5000}", "1, 2, 4, 8 or auto", id="5000 digits"),
        ("--micro_bsz auto --length_buckets", "other rows"),
        ("--micro_bsz auto --num_nodes 2", "several machines cannot agree"),
    ],
)
def test_a_split_that_cannot_be_is_refused(words: str, message: str) -> None:
    given = [*words.split(), "--data_file", "lines.jsonl", "--load_model", "model.pth", "--random_seed", "1"]
    with pytest.raises(UserError, match=message) as caught:
        resolve(parse_train(given), Machine("cpu", has_bf16=True))
    assert "settings need a change" not in str(caught.value)


def test_what_is_checked_beforehand_is_the_smallest_that_may_be_chosen() -> None:
    assert in_smallest_parts(_config(micro_bsz=8, micro_split="auto")).schedule.micro_bsz == 1
    assert in_smallest_parts(_config(micro_bsz=8, micro_split="4")).schedule.micro_bsz == 2
