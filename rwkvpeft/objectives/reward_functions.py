"""Python functions that judge a model's answers: found by name, called with many at once, and what they give checked.

Such a function belongs to the user, who names it with ``--reward``, and is run on purpose; nothing in the data is ever
run. It is called with three lists of one length, an entry for each answer, and gives as many numbers::

    def reward(prompts: list[str], answers: list[str], records: list[Mapping[str, Any]]) -> list[float]: ...
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from rwkvpeft.errors import UserError

_EXPECTED = "package.module:function or FILE.py:function, with =WEIGHT behind it if that is not 1"


class RewardFunction(NamedTuple):
    """``spec`` is what the user wrote, ``name`` what its mean is logged as; the rewards count ``weight`` times."""

    spec: str
    name: str
    weight: float
    function: Callable[[list[str], list[str], list[Mapping[str, Any]]], Any]

    def judge(
        self, prompts: Sequence[str], answers: Sequence[str], records: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """The reward of each answer, not weighted.

        Raises: UserError if the function fails, or gives anything but one finite number for each answer.
        """
        try:
            given = self.function(list(prompts), list(answers), list(records))
        except UserError:
            raise
        except Exception as reason:
            raise UserError(f"the reward function {self.spec} failed", found=_where(reason),
                            fix="mend the function; the run can then be resumed") from reason
        try:
            found = list(given)
        except TypeError as reason:
            raise UserError(f"the reward function {self.spec} gave no list of rewards", found=repr(given)[:80],
                            expected=f"{len(answers)} numbers, one for each answer") from reason
        if len(found) != len(answers):
            raise UserError(f"the reward function {self.spec} gave a wrong number of rewards",
                            found=len(found), expected=f"{len(answers)}, one for each answer")
        return [self._number(value, answer) for value, answer in zip(found, answers, strict=True)]

    def _number(self, value: object, answer: str) -> float:
        try:
            # a text of digits is a mistake, not a reward
            number = math.nan if isinstance(value, str) else float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"the reward function {self.spec} gave something that is no finite number",
                            found=f"{value!r} for the answer {answer[:80]!r}", expected="a float for each answer")
        return number


def load_rewards(specs: Sequence[str]) -> list[RewardFunction]:
    """Import the functions that ``--reward`` names. Names for logging differ, also where functions share one.

    Raises: UserError for what is not written as it should be, cannot be imported or is no function.
    """
    found: list[RewardFunction] = []
    for spec in specs:
        place, colon, rest = spec.rpartition(":")
        attribute, _, weight = rest.partition("=")
        if not (colon and place and attribute.isidentifier()):
            raise UserError(f"--reward {spec} names no function", expected=_EXPECTED,
                            fix=f"--reward {spec}:FUNCTION" if spec.endswith(".py") else None)
        function = getattr(_module(place, spec), attribute, None)
        if not callable(function):
            raise UserError(f"--reward {spec}: {place} has no function {attribute}",
                            found=None if function is None else f"{attribute} is of type {type(function).__name__}",
                            expected=_EXPECTED)
        _check_parameters(function, spec)
        name = _name(attribute, [other.name for other in found])
        found.append(RewardFunction(spec, name, _weight(weight, spec), function))
    return found


def _check_parameters(function: Callable[..., Any], spec: str) -> None:
    """Raises: UserError if the function cannot be called with three lists, as those of other trainers cannot."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        # some that are written in C do not tell what they take
        return
    try:
        signature.bind([], [], [])
    except TypeError as reason:
        raise UserError(f"--reward {spec} cannot be called with three lists", found=f"it takes {signature}",
                        expected="(prompts, answers, records); the other fields of the data stand in the records",
                        ) from reason


def _name(attribute: str, taken: Sequence[str]) -> str:
    name, number = attribute, 2
    while name in taken:
        name, number = f"{attribute}_{number}", number + 1
    return name


def _weight(text: str, spec: str) -> float:
    try:
        weight = float(text or 1)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"--reward {spec}: the weight is no number", found=text, expected=_EXPECTED)
    return weight


def _module(place: str, spec: str) -> ModuleType:
    """The module of that name, or the one that a file holds."""
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise UserError(f"--reward {spec}: there is no file {place}", expected=_EXPECTED)
    try:
        return _from_file(Path(place).resolve()) if is_file else importlib.import_module(place)
    except Exception as reason:
        raise UserError(f"--reward {spec} cannot be imported", found=_where(reason), expected=_EXPECTED) from reason


@cache
def _from_file(path: Path) -> ModuleType:
    # as for a module with a name, what stands in it is run once
    outline = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    assert outline is not None
    assert outline.loader is not None
    module = importlib.util.module_from_spec(outline)
    outline.loader.exec_module(module)
    return module


def _where(reason: Exception) -> str:
    """The error and the line of the user's code that it came from."""
    text = f"{type(reason).__name__}: {reason}"
    frames = [frame for frame in traceback.extract_tb(reason.__traceback__) if "importlib" not in frame.filename]
    # the first frame is the call in this file; what cannot be compiled tells its place itself
    if len(frames) < 2 or isinstance(reason, SyntaxError):
        return text
    last = frames[-1]
    return f"{text}, in {last.name}, {last.filename}:{last.lineno}"
