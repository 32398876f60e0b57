"""The problems in addition that ``scripts/run_grpo.sh`` teaches, and what judges their answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rwkvpeft.objectives.reward_functions import load_rewards

FOLDER = Path(__file__).resolve().parents[1] / "scripts" / "arithmetic"


def make(folder, *flags):
    command = [sys.executable, str(FOLDER / "problems.py"), "--output", str(folder), *flags]
    subprocess.run(command, check=True, capture_output=True)
    parts = ("demonstrations", "train", "heldout")
    return [[json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()] for part in parts]


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    return make(tmp_path_factory.mktemp("problems"))


def test_held_out_problems_are_shown_nowhere(problems):
    shown, trained, held_out = problems
    assert len(held_out) == 100
    assert len(trained) == 300
    held_out = {record["prompt"] for record in held_out}
    assert held_out.isdisjoint(record["prompt"] for record in trained)
    assert held_out.isdisjoint(record["text"].partition("=")[0] + "=" for record in shown)


def test_answers_to_judge_by_are_right_and_a_share_of_those_to_imitate_is_not(problems):
    shown, trained, held_out = problems
    for record in (*trained, *held_out):
        first, second = record["prompt"].removesuffix("=").split("+")
        assert int(record["answer"]) == int(first) + int(second)
    right = {record["prompt"] + record["answer"] for record in trained}
    assert sum(record["text"] not in right for record in shown) / len(shown) == pytest.approx(0.3, abs=0.03)


def test_problems_follow_from_their_seed(problems, tmp_path):
    assert make(tmp_path / "same") == problems
    assert make(tmp_path / "other", "--seed", "1") != problems


def test_the_right_number_alone_is_rewarded():
    (right,) = load_rewards([f"{FOLDER}/reward.py:right"])
    assert right.judge(["1+2="] * 3, ["3", " 3\n", "13"], [{"answer": "3"}] * 3) == [1.0, 1.0, 0.0]
