"""Batches are worked through in the fewest parts that are expected to fit."""

from __future__ import annotations

import pytest

from rwkvpeft.config.groups import TrainConfig
from rwkvpeft.config.parse import build_groups
from rwkvpeft.memory import Expected, NoOutline, choose_parts

# bytes that a row's token takes, by --grad_cp
BYTES = {"0": 4_000_000, "selective": 2_000_000, "1": 1_000_000}


def _config(**values: object) -> TrainConfig:
    return build_groups({"micro_bsz": 12, "micro_split": "auto", "ctx_len": 1024, **values})


def _need(config: TrainConfig) -> Expected:
    rows = config.schedule.micro_bsz
    return Expected(0, 0, 0, 0, activations=rows * (config.data.ctx_len or 0) * BYTES[config.runtime.grad_cp])


@pytest.mark.parametrize(("free_gb", "parts"), [(60, 1), (40, 2), (22, 3), (6, 12), (1, 12)])
def test_the_fewest_parts_that_fit_are_taken(free_gb: float, parts: int) -> None:
    choice = choose_parts(_config(), _need, free=int(free_gb * 1e9), device_type="mps")
    assert choice.parts == parts
    assert f"of {free_gb:.1f} GB" in choice.report or "not even single rows" in choice.report


def test_a_given_number_is_taken_as_it_is() -> None:
    assert choose_parts(_config(micro_split="4"), _need, free=1, device_type="mps") == (4, "")


def test_single_rows_are_taken_when_memory_cannot_be_told() -> None:
    choice = choose_parts(_config(), _need, free=None, device_type="mps")
    assert choice.parts == 12
    assert "cannot be told" in choice.report


def test_single_rows_are_taken_when_the_need_cannot_be_told() -> None:
    def unknown(config: TrainConfig) -> Expected:
        raise NoOutline("the method looks at values")

    assert choose_parts(_config(), unknown, free=10**12, device_type="mps").parts == 12


def test_long_rows_are_taken_one_by_one_before_anything_is_computed_twice() -> None:
    choice = choose_parts(_config(grad_cp="auto"), _need, free=5 * 10**9, device_type="mps")
    assert choice.parts == 12


def test_short_rows_are_rather_computed_twice_than_taken_one_by_one() -> None:
    short = _config(grad_cp="auto", ctx_len=128)
    whole = 12 * 128 * BYTES["1"]
    choice = choose_parts(short, _need, free=int(whole * 1.06), device_type="mps")
    assert choice.parts == 1
