"""Reward functions: how they are found, and what is said when they are not as they should be."""

from __future__ import annotations

import pytest

from rwkvpeft.errors import UserError
from rwkvpeft.objectives.reward_functions import load_rewards
from rwkvpeft.objectives.rewards import exact_answer, thinks_first

CODE = """
def length(prompts, answers, records):
    return [len(answer) for answer in answers]

def broken(prompts, answers, records):
    return [record["price"] for record in records]

def short(prompts, answers, records):
    return [1.0]

def nothing(prompts, answers, records):
    return None

def gives(prompts, answers, records):
    return [record["value"] for record in records]

number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text(CODE)
    return path


def judge(spec, values=("x", "y")):
    (function,) = load_rewards([spec])
    records = [{"value": value} for value in values]
    return function.judge(["p"] * len(values), ["answer"] * len(values), records)


def test_a_function_of_a_file_is_called_with_all_answers(file):
    assert judge(f"{file}:length") == [6.0, 6.0]


def test_a_function_of_a_module_is_found_by_its_path():
    (function,) = load_rewards(["rwkvpeft.objectives.rewards:exact_answer"])
    assert function.function is exact_answer


def test_a_weight_stands_behind_an_equals_sign(file):
    assert [one.weight for one in load_rewards([f"{file}:length", f"{file}:length=-0.25"])] == [1.0, -0.25]


def test_functions_of_one_name_are_logged_under_two(file):
    assert [one.name for one in load_rewards([f"{file}:length"] * 2)] == ["length", "length_2"]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("judge", "names no function"),
        ("judge.py", "--reward judge.py:FUNCTION"),
        ("nowhere.py:length", "no file nowhere.py"),
        ("no_such_package.module:length", "No module named 'no_such_package'"),
        ("{file}:missing", "no function missing"),
        ("{file}:number", "number is of type int"),
        ("{file}:length=much", "the weight is no number"),
        ("{file}:length=nan", "the weight is no number"),
    ],
)
def test_a_function_that_cannot_be_found_is_told_at_once(file, spec, told):
    with pytest.raises(UserError, match=told):
        load_rewards([spec.format(file=file)])


def test_a_file_that_cannot_be_run_is_told_with_its_line(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text("import math\nmath.no_such_thing\n")
    with pytest.raises(UserError, match=r"no_such_thing.*judge.py:2"):
        load_rewards([f"{path}:length"])


def test_a_file_that_is_no_python_is_told_with_its_own_line_alone(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text("def right(:\n")
    with pytest.raises(UserError, match=r"invalid syntax \(judge.py, line 1\)\n"):
        load_rewards([f"{path}:right"])


@pytest.mark.parametrize("takes", ["completions, **columns", "prompts, completions, *, answer", "a, b, c, d"])
def test_a_function_that_does_not_take_three_lists_is_told_at_once(tmp_path, takes):
    path = tmp_path / "judge.py"
    path.write_text(f"def right({takes}):\n    return []\n")
    with pytest.raises(UserError, match="cannot be called with three lists") as told:
        load_rewards([f"{path}:right"])
    assert f"it takes ({takes})" in told.value.render()
    assert "(prompts, answers, records)" in told.value.render()


def test_a_function_that_does_not_tell_what_it_takes_is_accepted(tmp_path):
    # max tells no signature
    path = tmp_path / "builtin.py"
    path.write_text("right = max\n")
    assert load_rewards([f"{path}:right"])[0].function is max


def test_a_function_that_fails_is_told_with_its_own_line(file):
    with pytest.raises(UserError, match=r"broken failed\n.*KeyError: 'price', in .*judge.py:6") as told:
        judge(f"{file}:broken")
    assert isinstance(told.value.__cause__, KeyError)


@pytest.mark.parametrize(("name", "told"), [("short", "wrong number of rewards"), ("nothing", "no list of rewards")])
def test_a_function_gives_as_many_rewards_as_there_are_answers(file, name, told):
    with pytest.raises(UserError, match=told):
        judge(f"{file}:{name}", ("a", "b", "c"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, [1.0, 2.0]])
def test_a_reward_is_a_finite_number(file, value):
    with pytest.raises(UserError, match="no finite number"):
        judge(f"{file}:gives", (1.0, value))


def test_truth_values_are_numbers(file):
    assert judge(f"{file}:gives", (True, False, 2)) == [1.0, 0.0, 2.0]


@pytest.mark.parametrize(
    ("answer", "expected", "reward"),
    [
        ("It is 12.", 12, 1.0),
        ("3 + 4 = 7", "7", 1.0),
        ("1,234.50", "1234.5", 1.0),
        ("70", "7", 0.0),
        ("-5", "5", 0.0),
        ("no idea", "5", 0.0),
        ("so 72", "40 + 32 = 72\n#### 72", 1.0),
        (" Paris\n", "Paris", 1.0),
        ("paris", "Paris", 0.0),
    ],
)
def test_the_last_number_of_an_answer_is_compared_with_that_of_the_record(answer, expected, reward):
    assert exact_answer(["?"], [answer], [{"answer": expected}]) == [reward]


def test_a_record_without_an_answer_is_told():
    with pytest.raises(UserError, match="a record has none"):
        exact_answer(["?"], ["1"], [{"question": "?"}])


def test_thoughts_come_first_and_something_behind_them():
    answers = ["<think>so</think> 3", "<think>so</think>", "3 <think>so</think>", " <think>\na\n</think>\nb"]
    assert thinks_first([""] * 4, answers, [{}] * 4) == [1.0, 0.0, 0.0, 1.0]
