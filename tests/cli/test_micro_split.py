"""Batches worked through in parts, through the real command: the run is that of whole batches."""

from __future__ import annotations

import json

import pytest
import yaml


def _steps(folder):
    lines = (folder / "loss_data.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["--epoch_steps", 0, "--epoch_count", 2],
        pytest.param(["--dataload", "pack", "--logit_penalty", 0], marks=pytest.mark.slow),
    ],
)
def test_a_run_in_parts_has_the_losses_of_whole_batches(train, tmp_path, words):
    for folder, split in (("whole", 1), ("parts", 5)):
        code, _, errors = train("--proj_dir", tmp_path / folder, "--micro_bsz", 5, "--micro_split", split, *words)
        assert code == 0, errors
    whole, parts = _steps(tmp_path / "whole"), _steps(tmp_path / "parts")
    assert len(whole) == len(parts)
    for one, other in zip(whole, parts, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert (other["tokens"], other["weight"], other["lr"]) == (one["tokens"], one["weight"], one["lr"])


def test_auto_says_what_it_chose_and_is_written_down_as_asked(train, tmp_path):
    code, out, errors = train("--micro_bsz", "auto:4")
    assert code == 0, errors
    assert "rows: 4 a batch, all at once" in out
    schedule = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["schedule"]
    assert (schedule["micro_bsz"], schedule["micro_split"], schedule["epoch_steps"]) == (4, "auto", 2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--dropout", 0.1], "not quite those of whole batches: what --dropout"),
        (["--peft", "lora"], "not quite those of whole batches: what dropout draws"),
    ],
)
def test_what_parts_change_after_all_is_told(train, words, told):
    code, out, errors = train("--micro_bsz", 4, "--micro_split", 2, *words)
    assert code == 0, errors
    assert told in out


def test_nothing_is_told_of_parts_that_change_nothing(train):
    words = ["--micro_bsz", 4, "--micro_split", 2, "--peft", "lora", "--peft_config", '{"lora_dropout": 0}']
    code, out, errors = train(*words)
    assert code == 0, errors
    assert "not quite" not in out
