"""The pairs that scripts/preference_pairs.py makes by rule."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "preference_pairs.py"
FILES = ("pairs.jsonl", "pairs_heldout.jsonl")


def make(folder: Path, *words: str) -> None:
    subprocess.run([sys.executable, SCRIPT, "--output", folder, *words], check=True, capture_output=True)


def read(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pairs")
    make(made)
    return made


def test_there_are_enough_pairs_and_no_question_twice(folder: Path) -> None:
    training, held_out = (read(folder, name) for name in FILES)
    assert (len(training), len(held_out)) == (480, 200)
    assert len({pair["prompt"] for pair in training + held_out}) == 680


@pytest.mark.parametrize("name", FILES)
def test_no_answer_is_preferred_whatever_the_question(folder: Path, name: str) -> None:
    pairs = read(folder, name)
    assert Counter(pair["chosen"] for pair in pairs) == Counter(pair["rejected"] for pair in pairs)
    assert all(len(pair["chosen"]) == len(pair["rejected"]) for pair in pairs)


@pytest.mark.parametrize("name", FILES)
def test_the_last_day_of_the_question_decides(folder: Path, name: str) -> None:
    for pair in read(folder, name):
        last_day = re.findall(r"\w+day", pair["prompt"])[-1]
        begins_with_assent = pair["chosen"].split(",")[0] in ("Yes", "Sure", "Fine", "Right")
        assert begins_with_assent == (last_day not in ("Saturday", "Sunday"))


def test_held_out_questions_are_about_other_things(folder: Path) -> None:
    training, held_out = ({thing(pair) for pair in read(folder, name)} for name in FILES)
    assert len(training) == 30
    assert len(held_out) == 10
    assert not training & held_out


def thing(pair: dict[str, str]) -> str:
    return re.findall(r"\ba (\w+)", pair["prompt"])[0]


def test_a_seed_makes_the_same_pairs_again(folder: Path, tmp_path: Path) -> None:
    make(tmp_path / "same", "--seed", "1")
    make(tmp_path / "other", "--seed", "2")
    first, same, other = ((place / FILES[0]).read_bytes() for place in (folder, tmp_path / "same", tmp_path / "other"))
    assert first == same
    assert first != other


def test_an_odd_number_of_pairs_is_refused(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--output", tmp_path / "out", "--pairs", "3"], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 2
    assert "even" in done.stderr
    assert not (tmp_path / "out").exists()
